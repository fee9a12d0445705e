"""Copies of what prompts keep into their regions, all layers and heads at once."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.dispatch import by_native, by_triton, choose
from vllm_kvcompress.ops.limits import BLOCK_SIZES, check_rows, takes_any_size
from vllm_kvcompress.ops.move import by_torch, reference
from vllm_kvcompress.ops.pages import PageOrder
from vllm_kvcompress.ops.select.entries import (
    check_selection,
    select_entries,
    selection_results,
)
from vllm_kvcompress.ops.structs import Pool, Rows


def _without_order(provider: Any) -> Any:
    """For providers that know plain pages only."""

    def call(*tensors: torch.Tensor, order: PageOrder | None, **options: Any) -> None:
        assert order is None
        provider(*tensors, **options)

    return call


def _with_offsets(provider: Any) -> Any:
    """For compiled ops, which take the two tensors of an order."""

    def call(*tensors: torch.Tensor, order: PageOrder | None, **options: Any) -> None:
        key_offsets = None if order is None else order.key_offsets
        value_offsets = None if order is None else order.value_offsets
        provider(*tensors, key_offsets=key_offsets, value_offsets=value_offsets, **options)

    return call


_COMPACT = {
    "triton": _without_order(by_triton("compact")),
    "native": _with_offsets(by_native("compact")),
    "torch": by_torch.compact,
    "reference": _without_order(reference.compact),
}
_SELECT_AND_COMPACT = _with_offsets(by_native("select_and_compact"))


def compact(
    pool: Pool,
    rows: Rows,
    page_offsets: torch.Tensor,
    indices: torch.Tensor,
    *,
    max_region_blocks: int,
    granularity: str = "page",
    backend: str = "triton",
) -> None:
    """Copy what is kept of each prompt into its region, keys and values of all streams.

    Args:
        pool: written at the regions' pages, in any type. Prompt pages are only read, so no order of
            the copies matters. An order of elements is for 'torch', and for 'native' on a CPU.
        rows: requests without a region are left alone.
        page_offsets, indices: of `select_entries`; entries are pages or tokens of the prompt,
            all of them before the region. Sums are num_region_blocks * S pages.
        max_region_blocks: greatest number of region blocks.
        granularity: 'page' or 'token'.
        backend: 'triton', 'native' (compiled), 'torch' or 'reference'.

    Deterministic; no host sync and graph-safe, but for 'torch'.

    Raises:
        ValueError: on shapes or types that do not fit. Values are not looked at.
        RuntimeError: if the backend cannot run here.
    """
    entries_per_page = _check_compaction(pool, rows, max_region_blocks, granularity, backend)
    num_requests, num_streams = len(rows), pool.num_streams
    check(
        page_offsets.shape == (num_requests, num_streams + 1)
        and page_offsets.dtype == torch.int32
        and page_offsets.is_contiguous(),
        f"want page offsets [{num_requests}, {num_streams} + 1] int32, "
        f"got {tuple(page_offsets.shape)} {page_offsets.dtype}",
    )
    want = max_region_blocks * num_streams * entries_per_page
    check(
        indices.dim() == 2
        and indices.shape[0] == num_requests
        and indices.shape[1] >= want
        and indices.dtype == torch.int32
        and indices.stride(1) == 1,
        f"want indices [{num_requests}, {want}] int32, got {tuple(indices.shape)} {indices.dtype}",
    )
    choose(_COMPACT, backend)(
        pool.pages,
        rows.descriptors,
        rows.block_table,
        page_offsets,
        indices,
        order=pool.order,
        max_region_blocks=max_region_blocks,
        entries_per_page=entries_per_page,
    )


def select_and_compact(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_pages: torch.Tensor,
    pool: Pool,
    rows: Rows,
    *,
    max_region_blocks: int,
    granularity: str = "page",
    backend: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`select_entries`, then `compact`; one launch for the 'native' backend.

    Args:
        scores, num_entries, num_pages: as in `select_entries`; a request's num_pages sum to its
            num_region_blocks * S.
        pool, rows, max_region_blocks, granularity: as in `compact`.
        backend: 'triton', 'native' (compiled), 'torch' or 'reference'.

    Returns:
        page_offsets and indices, as `select_entries`. Deterministic; no host sync and graph-safe,
        but for 'torch'.

    Raises:
        ValueError: on shapes or types that do not fit. Values are not looked at.
        RuntimeError: if the backend cannot run here.
    """
    page_size = _check_compaction(pool, rows, max_region_blocks, granularity, backend)
    max_pages = max_region_blocks * pool.num_streams
    if backend != "native":
        selection = select_entries(scores, num_entries, num_pages, max_pages, page_size, backend)
        compact(
            pool,
            rows,
            *selection,
            max_region_blocks=max_region_blocks,
            granularity=granularity,
            backend=backend,
        )
        return selection
    check_selection(scores, num_entries, num_pages, page_size, backend)
    selection = selection_results(scores, max_pages, page_size)
    _SELECT_AND_COMPACT(
        scores,
        num_entries,
        num_pages,
        *selection,
        pool.pages,
        rows.descriptors,
        rows.block_table,
        order=pool.order,
        max_region_blocks=max_region_blocks,
        page_size=page_size,
    )
    return selection


def _check_compaction(
    pool: Pool, rows: Rows, max_region_blocks: int, granularity: str, backend: str
) -> int:
    """Entries per page; ValueError unless these can be compacted."""
    choose(_COMPACT, backend)
    pages, num_streams = pool.pages, pool.num_streams
    check_rows(rows)
    check(
        pages.dim() == 3
        and pages.is_contiguous()
        and (pages.shape[1] in BLOCK_SIZES or takes_any_size(backend, pages)),
        f"want a contiguous pool [pages, block size, 2 d], got {tuple(pages.shape)}",
    )
    check(
        num_streams > 0 and pages.shape[0] % num_streams == 0,
        f"a pool of {pages.shape[0]} pages is not whole blocks of {num_streams}",
    )
    _check_order(pool, backend)
    check(max_region_blocks >= 0, f"max_region_blocks is {max_region_blocks}")
    check(granularity in ("page", "token"), f"unknown granularity {granularity!r}")
    return 1 if granularity == "page" else pool.block_size


def _check_order(pool: Pool, backend: str) -> None:
    if pool.order is None:
        return
    check(
        takes_any_size(backend, pool.pages),
        f"backend {backend!r} on {pool.pages.device} knows plain pages only",
    )
    want = (pool.block_size, pool.head_size)
    for offsets in (pool.order.key_offsets, pool.order.value_offsets):
        check(
            offsets.shape == want and offsets.dtype == torch.int64 and offsets.is_contiguous(),
            f"want offsets {want} int64",
        )
