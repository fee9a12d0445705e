"""What a model's attention layers can tell a scorer beyond keys and queries."""

from __future__ import annotations

from typing import Any, cast

import torch
from vllm.model_executor.layers.linear import RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.config import KVCompressConfigError
from vllm_kvcompress.policies.base import Rotary


def layer_parameters(
    model: torch.nn.Module, name: str, layer: Any, needs: frozenset[str]
) -> LayerParameters:
    """Parameters of one attention layer.

    Args:
        model: the whole model on this rank, weights loaded.
        name: of the layer, e.g. "model.layers.0.self_attn.attn".
        layer: vLLM's `Attention` of that name.
        needs: what the scorer declares; only that is looked for.

    Raises:
        KVCompressConfigError: if the model's layer does not have it in a known form.
    """
    owner = _owner(model, name)
    output_weight = output_root = rotary = None
    if "output_weight" in needs:
        output_weight = _output_weight(owner, name, layer)
    if "output_root" in needs:
        output_root = ops.output_root(_output_weight(owner, name, layer))
    if "rotary" in needs:
        rotary = _rotary(owner, name)
    sinks = layer.impl.sinks
    if sinks is not None:
        sinks = sinks.detach().float().view(layer.num_kv_heads, -1)
    return LayerParameters(
        scale=layer.impl.scale,
        logits_soft_cap=layer.impl.logits_soft_cap or 0.0,
        output_weight=output_weight,
        output_root=output_root,
        rotary=rotary,
        sinks=sinks,
    )


def output_copy_bytes(model: torch.nn.Module, name: str, layer: Any) -> int:
    """Memory that a layer's `output_weight` takes beside the model's own weights."""
    projection = _output_projection(_owner(model, name), name, layer)
    if _is_plain(projection):
        return 0
    return projection.input_size_per_partition * projection.output_size * layer.dtype.itemsize


def _owner(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module that has the projections around the attention of this name."""
    return model.get_submodule(name.rpartition(".")[0])


def _is_plain(projection: RowParallelLinear) -> bool:
    """Whether the weight is there as the checkpoint has it; one that vLLM packs is not."""
    size = (projection.output_size, projection.input_size_per_partition)
    return (
        type(projection.quant_method) is UnquantizedLinearMethod and projection.weight.shape == size
    )


def _output_projection(owner: torch.nn.Module, name: str, layer: Any) -> RowParallelLinear:
    size = layer.num_heads * layer.head_size
    # With LoRA a projection is wrapped; all requests are scored by the model's own weights.
    own = [getattr(child, "base_layer", child) for child in owner.children()]
    found = [
        child
        for child in own
        if isinstance(child, RowParallelLinear) and child.input_size_per_partition == size
    ]
    if len(found) != 1:
        raise KVCompressConfigError(
            f"this method needs the output projection of layer {name}, and {len(found)} "
            f"candidates are there; methods that need none: see `vllm-kvcompress methods`"
        )
    return found[0]


def _output_weight(owner: torch.nn.Module, name: str, layer: Any) -> torch.Tensor:
    """[H, g, d, m] columns of the output projection for each query head of this rank."""
    projection = _output_projection(owner, name, layer)
    if _is_plain(projection):
        weight = cast(torch.Tensor, projection.weight).detach().t()
    else:
        # The weight itself may be packed or quantized; what it does to unit vectors is not.
        size = projection.input_size_per_partition
        unit = torch.eye(size, dtype=layer.dtype, device=layer.kv_cache.device)
        weight = projection.quant_method.apply(projection, unit, bias=None)
    group = layer.num_heads // layer.num_kv_heads
    return weight.unflatten(0, (layer.num_kv_heads, group, layer.head_size))


def _rotary(owner: torch.nn.Module, name: str) -> Rotary:
    found = [child for child in owner.children() if isinstance(child, RotaryEmbeddingBase)]
    if len(found) != 1 or getattr(found[0], "cos_sin_cache", None) is None:
        raise KVCompressConfigError(
            f"this method needs the rotary position encoding of layer {name}, and none of a "
            "known form is there"
        )
    return Rotary(found[0].cos_sin_cache, found[0].is_neox_style)
