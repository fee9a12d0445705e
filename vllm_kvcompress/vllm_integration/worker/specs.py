"""Specs of a model's KV cache: which layers are compressed, and which cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVQuantMode,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.vllm_integration.scheduler.spec import KVCompressSpec


def with_setting(
    specs: Mapping[str, KVCacheSpec],
    layers: Mapping[str, Any],
    config: KVCompressConfig,
    one_shot_tokens: int,
    is_buffer_counted: bool,
) -> dict[str, KVCacheSpec]:
    """Specs of all layers, those with full attention carrying our setting.

    Args:
        specs: vLLM's, by layer name.
        layers: vLLM's attention layers by name.
        config, one_shot_tokens, is_buffer_counted: see `KVCompressSpec`.

    Raises:
        KVCompressConfigError: if the model has layers that cannot be compressed, or differ.
    """
    windowed: dict[str, KVCacheSpec] = {}
    compressed: dict[str, KVCompressSpec] = {}
    for name, spec in specs.items():
        if type(spec) is SlidingWindowSpec:
            windowed[name] = spec
            continue
        if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
            raise KVCompressConfigError(
                "KV compression needs layers with full attention or a sliding window; layer "
                f"{name} has {type(spec).__name__}"
            )
        problem = _layer_problem(layers[name], spec)
        if problem:
            raise KVCompressConfigError(f"KV compression cannot handle layer {name}: {problem}")
        compressed[name] = KVCompressSpec.from_full_attention(
            spec, config, one_shot_tokens, is_buffer_counted
        )
    shapes = {(spec, layers[name].num_heads) for name, spec in compressed.items()}
    if len(shapes) > 1:
        raise KVCompressConfigError(
            f"KV compression needs the same heads in every full layer; found {shapes}"
        )
    if not compressed:
        raise KVCompressConfigError("KV compression: this model has no KV cache to compress")
    return {**windowed, **compressed}


def compressed_specs(specs: Mapping[str, KVCacheSpec]) -> dict[str, KVCompressSpec]:
    """Those of layers that are compressed."""
    return {name: spec for name, spec in specs.items() if isinstance(spec, KVCompressSpec)}


def group_to_compress(groups: Sequence[KVCacheGroupSpec]) -> int:
    """Number of the group of blocks whose layers are compressed.

    Raises:
        KVCompressConfigError: if vLLM has made several of them.
    """
    ours = [i for i, g in enumerate(groups) if isinstance(g.kv_cache_spec, KVCompressSpec)]
    if len(ours) != 1:
        raise KVCompressConfigError(
            "KV compression needs all layers with full attention in one group of blocks; vLLM "
            f"makes {len(ours)} of them beside {len(groups) - len(ours)} groups of other layers"
        )
    return ours[0]


def unwrapped(kv_cache_config: KVCacheConfig) -> KVCacheConfig:
    """The same, without vLLM's wrapper around the specs of a group where all are equal.

    vLLM wraps them where groups differ in bytes per layer, and its wrapper does not know of layers
    that join a group later, since they share another's cache.
    """
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            first, *others = spec.kv_cache_specs.values()
            if all(other == first for other in others):
                group = replace(group, kv_cache_spec=first)
        groups.append(group)
    return replace(kv_cache_config, kv_cache_groups=groups)


def readers_of(context: dict[str, Any], names: list[str]) -> dict[str, str]:
    """Layers without a cache of their own, and the layers whose cache they read.

    Args:
        context: vLLM's layers by name.
        names: of a group of full-attention layers.

    Raises:
        KVCompressConfigError: if a layer with a cache lies between, or they have other heads.
    """
    targets = {name: context[name].kv_sharing_target_layer_name for name in names}
    readers = {name: target for name, target in targets.items() if target is not None}
    for name, target in readers.items():
        index = extract_layer_index(name)
        before = [n for n in names if n not in readers and extract_layer_index(n) < index]
        # What a one-shot prompt evicts is there only until the next layer's is.
        if target != max(before, key=extract_layer_index, default=None):
            raise KVCompressConfigError(
                f"KV compression needs layer {name} to share the cache of the last full-attention "
                f"layer before it that has one; it shares that of {target}"
            )
        if context[name].num_heads != context[target].num_heads:
            raise KVCompressConfigError(
                f"KV compression needs layers that share a cache to have the same heads; {name} "
                f"has {context[name].num_heads}, {target} {context[target].num_heads}"
            )
    return readers


def _layer_problem(layer: Any, spec: FullAttentionSpec) -> str | None:
    """Why a full-attention layer cannot be compressed; None if it can."""
    if spec.kv_quant_mode != KVQuantMode.NONE:
        # A checkpoint may ask for this itself, whatever --kv-cache-dtype says.
        return f"its KV cache is quantized ({spec.kv_quant_mode.name})"
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        return "ALiBi needs every key's position in the cache"
    if layer.head_size_v != layer.head_size:
        return f"value head size {layer.head_size_v} differs from {layer.head_size}"
    return None
