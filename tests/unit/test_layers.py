"""The output projection as scorers see it: of the model's own memory where that can be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod

from vllm_kvcompress.config import KVCompressConfigError
from vllm_kvcompress.vllm_integration.worker.layers import layer_parameters, output_copy_bytes

NUM_KV_HEADS, GROUP, HEAD_SIZE, HIDDEN = 2, 3, 4, 10
NAME = "block.attn"


class Packed:
    """A quantization, or a CPU's layout: `weight` is not what is multiplied with."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def apply(self, layer, x, bias=None):
        return x @ self.weight.t()


def model_with(weight: torch.Tensor, is_packed: bool) -> torch.nn.Module:
    projection = object.__new__(RowParallelLinear)
    torch.nn.Module.__init__(projection)
    projection.output_size, projection.input_size_per_partition = weight.shape
    projection.quant_method = Packed(weight) if is_packed else UnquantizedLinearMethod()
    projection.weight = torch.nn.Parameter(weight.new_empty(0) if is_packed else weight)
    model, block = torch.nn.Module(), torch.nn.Module()
    block.o_proj, block.attn = projection, torch.nn.Module()
    model.block = block
    return model


@pytest.fixture
def layer() -> SimpleNamespace:
    """As much of vLLM's Attention as is read."""
    return SimpleNamespace(
        num_heads=NUM_KV_HEADS * GROUP,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
        kv_cache=torch.zeros(0),
        impl=SimpleNamespace(sinks=None, scale=0.5, logits_soft_cap=None),
    )


@pytest.mark.parametrize("is_packed", [False, True])
def test_output_weight_has_each_query_heads_columns(layer, is_packed):
    weight = torch.randn(HIDDEN, NUM_KV_HEADS * GROUP * HEAD_SIZE)
    model = model_with(weight, is_packed)
    parameters = layer_parameters(model, NAME, layer, frozenset({"output_weight"}))
    got = parameters.output_weight
    assert got.shape == (NUM_KV_HEADS, GROUP, HEAD_SIZE, HIDDEN)
    for head in range(NUM_KV_HEADS * GROUP):
        columns = weight[:, head * HEAD_SIZE : (head + 1) * HEAD_SIZE]
        torch.testing.assert_close(got[head // GROUP, head % GROUP], columns.t())
    # What is not packed is no second copy, and so follows updates too.
    shares = got.untyped_storage().data_ptr() == model.block.o_proj.weight.data_ptr()
    assert shares == (not is_packed)
    num_bytes = output_copy_bytes(model, NAME, layer)
    assert num_bytes == (weight.nbytes if is_packed else 0)


def test_a_layer_without_a_projection_is_refused(layer):
    model = model_with(torch.randn(HIDDEN, HEAD_SIZE), False)
    with pytest.raises(KVCompressConfigError, match="0 candidates are there"):
        layer_parameters(model, NAME, layer, frozenset({"output_root"}))
