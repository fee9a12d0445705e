"""No step on the CUDA side waits for the device: it is run on a device that has no contents.

That is torch's 'meta'. Whoever wants a number of its tensors on the host (`.item()`, `.tolist()`,
a mask's number of entries, a tensor as a condition) gets an error, and so does who mixes them with
tensors of the host.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from cache_shapes import cache_shape

pytest.importorskip("vllm")

from cuda_side import CUDASide
from device_labels import no_waiting
from device_work import DeviceWork
from engine_rig import METHODS, Chunks, Request, Rig
from gpu.recording import record
from paged_pool import DEVICE
from plain_flash_attention import use_plain_attention
from reachable import tensors_of
from rig_checks import SCALE
from vllm.v1.attention.backends import flash_attn

from vllm_kvcompress import ops
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.base import ChunkInputs, Rotary, ScoreInputs

SHAPE = cache_shape(2, 2, 3, 64, 16)
WINDOW = 8


class NoContents(CUDASide):
    """The device without contents. What vLLM's FlashAttention backend launches does nothing."""

    def __init__(self):
        super().__init__(device=torch.device("meta"))

    def prepare(self, patch):
        def attend(q, *, return_softmax_lse=False, **rest):
            lse = q.new_empty(q.shape[1], len(q), dtype=torch.float32)
            return (rest["out"], lse) if return_softmax_lse else rest["out"]

        use_plain_attention(patch)
        patch.setattr(flash_attn, "flash_attn_varlen_func", attend)
        patch.setattr(flash_attn, "reshape_and_cache_flash", lambda *args: None)
        module = ModuleType("vllm.vllm_flash_attn")
        module.flash_attn_varlen_func = attend
        patch.setitem(sys.modules, "vllm.vllm_flash_attn", module)


def config_of(method, granularity="page", budget=64):
    options = (("granularity", granularity),)
    return KVCompressConfig(method, budget=budget, window=WINDOW, options=options)


def serve(rig: Rig, step: Callable[[Chunks], None]) -> list[Request]:
    """Prompts in chunks and whole, staged and not, several at once; suffixes; single tokens.

    Args:
        rig: with the requests that this gives back.
        step: of the rig, one that checks results or one that does not.
    """
    block = rig.shape.block_size
    first, dense, second = (
        Request("a", 7 * block + 5),
        Request("dense", block + 3),
        Request("b", 6 * block),
    )
    staged = [
        Request("c", 6 * block + 3, is_one_shot=True),
        Request("d", 5 * block + 9, is_one_shot=True),
    ]
    step([(first, 2 * block), (dense, block + 3)])
    step([(dense, 1), (first, 5 * block + 1), (second, 6 * block)])
    step([(second, 1), (first, 4), *((r, r.prompt_len) for r in staged)])
    step([(first, 1), (staged[0], 1), (second, 19)])
    rig.engine.forget(["c", "d"])
    again = Request("c", 6 * block + 3, is_one_shot=True)
    step([(first, 1), (again, again.prompt_len)])
    return [first, dense, second, *staged]


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("method", [*METHODS, "span-keydiff"])
def test_no_step_waits_for_the_device(monkeypatch, method, granularity):
    rig = Rig(monkeypatch, NoContents(), SHAPE, config_of(method, granularity))
    launches = record(lambda: serve(rig, rig.run))
    assert "compact_kernel" in {launch.name for launch in launches}
    # Not even what is told of requests, until somebody asks for it.
    assert {"a", "b", "c", "d", "dense"} == set(rig.stats._requests)
    # And none of it stays on the device.
    assert tensors_of(rig.stats) == []


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_a_gpu(monkeypatch, method, granularity):
    """Preparing, attending, scoring and compacting, in CUDA's own mode that forbids it."""
    config = config_of(method, granularity)
    rig = Rig(monkeypatch, CUDASide(), SHAPE, config, may_wait=False)
    assert all(r.selection is not None for r in serve(rig, rig.step) if r.name != "dense")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the GPU's own mode tells")
@pytest.mark.parametrize(
    ("method", "granularity"), [("span", "page"), ("h2o", "token"), ("random", "page")]
)
def test_no_step_waits_for_a_device_with_contents(monkeypatch, labels, method, granularity):
    config = config_of(method, granularity, budget=48)
    rig = Rig(monkeypatch, CUDASide(), cache_shape(1, 1, 2, 64, 16), config, may_wait=False)
    assert all(r.selection is not None for r in serve(rig, rig.step) if r.name != "dense")


@pytest.mark.parametrize("method", METHODS)
def test_no_policy_waits_for_the_device(labels, method):
    """Those that kernels cannot score are run on the device as they are."""
    num_tokens, hidden = 100, 24
    heads, group, size = SHAPE.num_kv_heads, SHAPE.num_queries_per_kv, SHAPE.head_size

    def random(*size):
        return torch.rand(size, generator=generator, device=DEVICE)

    generator = torch.Generator(DEVICE).manual_seed(0)
    scorer = make_scorer(KVCompressConfig(method, budget=64, window=WINDOW))
    query, key = random(heads, group, num_tokens, size), random(heads, num_tokens, size)
    weight = random(heads, group, size, hidden)
    common = {"scale": SCALE, "rotary": Rotary(random(600, size))}
    root = ops.output_root(weight)
    with no_waiting(DEVICE):
        observed = None
        if "all_queries" in scorer.needs:
            chunk = ChunkInputs(query=query, key=key, first=0, logits_soft_cap=0.0, **common)
            observed = scorer.observe(chunk, None)
        inputs = ScoreInputs(
            key=key,
            num_candidates=num_tokens - WINDOW,
            budget_tokens=64,
            window_query=query[:, :, -WINDOW:],
            value=random(heads, num_tokens, size),
            output_weight=weight,
            output_root=root,
            observed=observed,
            **common,
        )
        scores = scorer.score(inputs)
    assert scores.first.device == key.device and not scores.first.isnan().any()


def test_layers_of_a_decode_step_launch_the_decode_kernel_only(monkeypatch):
    rig = Rig(monkeypatch, NoContents(), SHAPE, config_of("span"))
    first, second, dense = Request("a", 205), Request("b", 150), Request("dense", 20)
    work, metadata = DeviceWork(), []

    def prepare():
        rig.run([(first, 205), (second, 150), (dense, 20)])
        metadata.append(rig.metadata([(first, 1), (dense, 1)]))

    record(prepare)
    tokens = rig.random_tokens(2)
    outputs = [torch.empty_like(query) for _, _, query in tokens]

    def decode():
        with work:
            rig.run_layers(*metadata, tokens, outputs)

    launches = record(decode)
    assert [launch.name for launch in launches] == ["ragged_decode_kernel"] * SHAPE.num_layers
    assert work.names == []


def test_who_asks_a_tensor_is_found_out(monkeypatch):
    compact = ops.select_and_compact

    def asking(scores, *arguments, **options):
        scores.max().item()
        return compact(scores, *arguments, **options)

    monkeypatch.setattr(ops, "select_and_compact", asking)
    rig = Rig(monkeypatch, NoContents(), SHAPE, config_of("snapkv"))
    with pytest.raises(RuntimeError, match="meta"):
        record(lambda: serve(rig, rig.run))
