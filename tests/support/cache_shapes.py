"""Shapes of caches, said in one line."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_kvcompress.memory import CacheShape, PageFormat


def cache_shape(
    num_layers: int,
    num_kv_heads: int,
    num_queries_per_kv: int,
    head_size: int,
    block_size: int,
    dtype: str = "float32",
) -> CacheShape:
    """A cache of plain pages."""
    page = PageFormat(dtype, block_size, head_size)
    return CacheShape(num_layers, num_kv_heads, num_queries_per_kv, page)


def with_dtype(shape: CacheShape, dtype: torch.dtype) -> CacheShape:
    """The same shape with elements of another type."""
    return replace(shape, page=replace(shape.page, dtype=str(dtype).removeprefix("torch.")))
