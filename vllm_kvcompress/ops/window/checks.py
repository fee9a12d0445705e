"""Argument checks that the window ops share."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.limits import QUERY_DTYPES, check_pool, check_rows
from vllm_kvcompress.ops.structs import Pool, Prompts


def check_prompt_pool(
    pool: Pool, query: torch.Tensor, offsets: torch.Tensor | None, backend: str
) -> None:
    """As `check_pool`, but 'native' takes pages of any size and order, and of any query type."""
    if backend != "native":
        check(pool.order is None, f"backend {backend!r} reads plain pages only")
        check_pool(pool, query)
        return
    pages, num_kv_heads = pool.pages, pool.num_kv_heads
    num_heads, head_size = query.shape[1:]
    check(
        query.stride(2) == 1 and query.dtype in QUERY_DTYPES,
        f"want dense rows of bf16, fp16 or fp32, got {query.dtype} of stride {query.stride(2)}",
    )
    check(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        f"{num_heads} query heads are not groups of {num_kv_heads} KV heads",
    )
    check(
        pages.dim() == 3
        and pages.is_contiguous()
        and pages.shape[2] == 2 * head_size
        and pages.dtype in QUERY_DTYPES,
        f"want a contiguous pool [pages, block size, {2 * head_size}] of bf16, fp16 or fp32, "
        f"got {tuple(pages.shape)} {pages.dtype}",
    )
    check(
        offsets is None
        or (
            offsets.shape == (pages.shape[1], head_size)
            and offsets.dtype == torch.int64
            and offsets.is_contiguous()
        ),
        f"want offsets [{pages.shape[1]}, {head_size}] int64",
    )


def check_layers(layer: int, num_scored: int, num_layers: int, backend: str) -> None:
    """Raise ValueError unless these layers share the pool and can be scored at once."""
    last = layer + num_scored - 1
    check(
        0 <= layer <= last < num_layers,
        f"layer {layer if num_scored == 1 else f'{layer} to {last}'} is not among {num_layers}",
    )
    check(num_scored == 1 or backend != "native", "'native' scores one layer at a time")


def check_prompts(prompts: Prompts, num_requests: int) -> None:
    """Raise ValueError unless these are so many prompts."""
    check(
        len(prompts.rows) == num_requests,
        f"want {num_requests} row descriptors, got {len(prompts.rows)}",
    )
    check_rows(prompts.rows)
    check_lengths(prompts, num_requests)


def check_lengths(prompts: Prompts, num_requests: int) -> None:
    """Raise ValueError unless so many prompts say what of them is rated and what competes."""
    for name, lens in (
        ("num_rated", prompts.num_rated),
        ("num_candidates", prompts.num_candidates),
    ):
        check(
            lens.shape == (num_requests,) and lens.dtype == torch.int32,
            f"want {name} [{num_requests}] int32, got {tuple(lens.shape)} {lens.dtype}",
        )
