"""vLLM's attention layers and metadata builder for a CUDA engine, made by their own constructors.

A model and its configuration are all that stands in. An attribute that vLLM's classes read is
therefore there, since they set it themselves.
"""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends import fa_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvcompress.memory import CacheShape
from vllm_kvcompress.vllm_integration.platforms.cuda.attention import (
    KVCompressCUDABackend,
    KVCompressCUDAMetadataBuilder,
)
from vllm_kvcompress.vllm_integration.platforms.cuda.engine import CUDAEngine

SCALE = 0.2


@functools.cache
def _default_config() -> VllmConfig:
    return VllmConfig()


def make_vllm_config(dtype: torch.dtype, flash_attn_version: int) -> VllmConfig:
    """vLLM's defaults, with what a plain decoder's model says where it is asked."""
    config = copy.copy(_default_config())
    for name in ("attention_config", "compilation_config"):
        setattr(config, name, copy.copy(getattr(config, name)))
    config.attention_config.flash_attn_version = flash_attn_version
    config.compilation_config.static_forward_context = {}
    config.model_config = SimpleNamespace(
        dtype=dtype,
        is_mm_prefix_lm=False,
        is_diffusion=False,
        rswa_window=None,
        hf_config=SimpleNamespace(model_type="llama"),
        hf_text_config=SimpleNamespace(),
    )
    return config


def need_flash_attention(version: int, attention: str) -> None:
    """Skip where vLLM's own ops were chosen and do not have it, saying so."""
    if attention == "vllm" and not fa_utils.is_fa_version_supported(version):
        pytest.skip(f"vLLM has no FlashAttention {version} for this GPU")


def make_layers(
    config: VllmConfig, shape: CacheShape, names: list[str], device: torch.device
) -> dict[str, Attention]:
    """vLLM's layers with our impl, registered in the configuration as a model's are."""
    with set_current_vllm_config(config), torch.device(device):
        return {
            name: Attention(
                shape.num_kv_heads * shape.num_queries_per_kv,
                shape.head_size,
                SCALE,
                shape.num_kv_heads,
                prefix=name,
                attn_backend=KVCompressCUDABackend,
            )
            for name in names
        }


def make_builder(
    config: VllmConfig, shape: CacheShape, engine: CUDAEngine, device: torch.device
) -> KVCompressCUDAMetadataBuilder:
    """The builder of layers that `make_layers` has made, bound to their engine."""
    spec = FullAttentionSpec(
        block_size=shape.block_size,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        dtype=config.model_config.dtype,
    )
    names: list[Any] = list(config.compilation_config.static_forward_context)
    with set_current_vllm_config(config):
        builder = KVCompressCUDAMetadataBuilder(spec, names, config, device)
    builder.bind(engine)
    return builder
