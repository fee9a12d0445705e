"""Which entries every stream keeps, and moving them: on a GPU without the host, or on a CPU.

An entry is what scores are given to: a page, or a token. Streams are (layer, KV head), layer first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_kvcompress.ops import reference_paged as reference
from vllm_kvcompress.ops.checks import check, check_backend
from vllm_kvcompress.ops.native import native_ops
from vllm_kvcompress.ops.pool_checks import BLOCK_SIZES, check_rows, triton_kernels

MAX_STREAMS = 8192


def apportion(ideal: Sequence[float], total: int, lower: int, upper: int) -> list[int]:
    """Whole numbers close to `ideal` that sum to `total`, by largest remainder. On the host.

    Args:
        ideal: wished shares; their sum should be near `total`.
        total: exact sum of the result.
        lower, upper: inclusive bounds of every share.

    Returns:
        One share per entry; equal remainders go to the earlier entry.

    Raises:
        ValueError: if the bounds cannot hold `total`.
    """
    size = len(ideal)
    check(
        size * lower <= total <= size * upper,
        f"cannot share {total} pages among {size} places of {lower} to {upper} pages each",
    )
    shares = [min(max(int(x), lower), upper) for x in ideal]
    missing = total - sum(shares)
    step = 1 if missing > 0 else -1
    for _ in range(abs(missing)):
        open_places = [
            i for i in range(size) if (shares[i] < upper if step > 0 else shares[i] > lower)
        ]
        best = max(open_places, key=lambda i: (step * (ideal[i] - shares[i]), -i))
        shares[best] += step
    return shares


def joint_page_counts(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    total_pages: torch.Tensor,
    guaranteed: torch.Tensor,
    page_size: int = 1,
    backend: str = "triton",
) -> torch.Tensor:
    """How many pages each stream gets when the streams of a group compete.

    The best entries of a group win, each stream being sure of its best `guaranteed`; equal scores
    as in `scoring.joint_top_counts`. Where entries are tokens, shares are made whole pages by
    largest remainder, at least one each. A group is a layer's heads (Ada-KV) or all streams.

    Args:
        scores: [R, S, N] float32; entries past num_entries are not read. NaN counts as -inf.
        num_entries: [R] int32, whole pages' worth of entries that each stream can choose from.
        total_pages: [R, G] int32, pages to share in each group of S / G streams one after
            another; at least one and at most num_entries / page_size per stream.
        guaranteed: [R, G] int32, entries; S / G of them are at most the group's total.
        page_size: entries per page: 1, or 16 to 128 tokens; any number for 'native' on a CPU.
        backend: 'triton', 'native' (compiled) or 'reference'.

    Returns:
        [R, S] int32, sums per group exactly total_pages. No host sync, graph-safe, deterministic.

    Raises:
        ValueError: on shapes or types that do not fit. Values are not looked at.
        RuntimeError: if the backend cannot run here.
    """
    num_requests, num_streams = _check_scores(scores, num_entries, page_size, backend)
    num_groups = total_pages.shape[-1]
    for name, numbers in (("total_pages", total_pages), ("guaranteed", guaranteed)):
        check(
            numbers.shape == (num_requests, num_groups)
            and numbers.dtype == torch.int32
            and numbers.is_contiguous(),
            f"want {name} [{num_requests}, G] int32, got {tuple(numbers.shape)} {numbers.dtype}",
        )
    check(
        num_groups > 0 and num_streams % num_groups == 0,
        f"{num_streams} streams are not {num_groups} equal groups",
    )
    num_pages = scores.new_empty(num_requests, num_streams, dtype=torch.int32)
    arguments = (scores, num_entries, total_pages, guaranteed, num_pages)
    if check_backend(backend, "triton", "native") == "reference":
        reference.joint_page_counts(*arguments, page_size, apportion)
    elif backend == "native":
        native_ops(*arguments).joint_page_counts(*arguments, page_size)
    else:
        triton_kernels(*arguments).joint_page_counts(*arguments, page_size=page_size)
    return num_pages


def select_entries(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_pages: torch.Tensor,
    max_pages: int,
    page_size: int = 1,
    backend: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each stream's best entries, `num_pages * page_size` of them.

    Args:
        scores, num_entries, page_size: as in `joint_page_counts`.
        num_pages: [R, S] int32, at most num_entries / page_size each.
        max_pages: greatest sum of a request's num_pages.
        backend: 'triton', 'native' (compiled) or 'reference'.

    Returns:
        page_offsets [R, S + 1] int32, first virtual page of each stream, and indices
        [R, max_pages * page_size] int32: streams one after another, each ascending; equal scores:
        the lower index first. Entries past a request's last are undefined. No host sync,
        graph-safe, deterministic.

    Raises:
        ValueError: on shapes or types that do not fit. Values are not looked at.
        RuntimeError: if the backend cannot run here.

    Example:
        scores [[[1, 3, 2], [5, 4, 5]]], num_pages [[1, 2]]: page_offsets [[0, 1, 3]],
        indices [[1, 0, 2]].
    """
    _check_selection(scores, num_entries, num_pages, page_size, backend)
    page_offsets, indices = _selection_results(scores, max_pages, page_size)
    arguments = (scores, num_entries, num_pages, page_offsets, indices)
    if check_backend(backend, "triton", "native") == "reference":
        reference.select_entries(*arguments, page_size)
    elif backend == "native":
        native_ops(*arguments).select_entries(*arguments, page_size)
    else:
        triton_kernels(*arguments).select_entries(*arguments, page_size=page_size)
    return page_offsets, indices


def compact(
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    page_offsets: torch.Tensor,
    indices: torch.Tensor,
    *,
    max_region_blocks: int,
    granularity: str = "page",
    key_offsets: torch.Tensor | None = None,
    value_offsets: torch.Tensor | None = None,
    backend: str = "triton",
) -> None:
    """Copy what is kept of each prompt into its region, keys and values of all streams.

    Args:
        pool: [num_pages, b, 2 d] as in `ragged_decode`, written at the regions' pages. Prompt
            pages are only read, so no order of the copies matters.
        rows, block_table: as in `ragged_decode`; requests without a region are left alone.
        page_offsets, indices: of `select_entries`; entries are pages or tokens of the prompt,
            all of them before the region. Sums are num_region_blocks * S pages.
        max_region_blocks: greatest number of region blocks.
        granularity: 'page' or 'token'.
        key_offsets, value_offsets: [b, d] int64 of a `PageOrder`, 'native' on a CPU only; None =
            plain pages. Read with granularity 'token'.
        backend: 'triton', 'native' (compiled) or 'reference'.

    No host sync, graph-safe, deterministic.

    Raises:
        ValueError: on shapes or types that do not fit. Values are not looked at.
        RuntimeError: if the backend cannot run here.
    """
    num_streams = page_offsets.shape[-1] - 1
    entries_per_page = _check_compaction(
        pool, rows, block_table, num_streams, max_region_blocks, granularity, backend
    )
    offsets = _checked_offsets(pool, key_offsets, value_offsets, backend)
    num_requests = rows.shape[0]
    check(
        page_offsets.shape == (num_requests, num_streams + 1)
        and page_offsets.dtype == torch.int32
        and page_offsets.is_contiguous(),
        f"want page offsets [{num_requests}, L * H + 1] int32, "
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
    arguments = (pool, rows, block_table, page_offsets, indices)
    if check_backend(backend, "triton", "native") == "reference":
        reference.compact(*arguments, entries_per_page)
    elif backend == "native":
        native_ops(*arguments).compact(*arguments, *offsets, max_region_blocks, entries_per_page)
    else:
        triton_kernels(*arguments).compact(
            *arguments, max_region_blocks=max_region_blocks, entries_per_page=entries_per_page
        )


def select_and_compact(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_pages: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_region_blocks: int,
    granularity: str = "page",
    key_offsets: torch.Tensor | None = None,
    value_offsets: torch.Tensor | None = None,
    backend: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`select_entries`, then `compact`; one launch for the 'native' backend.

    Args:
        scores, num_entries, num_pages: as in `select_entries`; a request's num_pages sum to its
            num_region_blocks * S.
        pool, rows, block_table, max_region_blocks, granularity, key_offsets, value_offsets: as in
            `compact`.
        backend: 'triton', 'native' (compiled) or 'reference'.

    Returns:
        page_offsets and indices, as `select_entries`. No host sync, graph-safe, deterministic.

    Raises:
        ValueError: on shapes or types that do not fit. Values are not looked at.
        RuntimeError: if the backend cannot run here.
    """
    num_streams = scores.shape[1]
    page_size = 1 if granularity == "page" else pool.shape[1]
    max_pages = max_region_blocks * num_streams
    offsets = _checked_offsets(pool, key_offsets, value_offsets, backend)
    if check_backend(backend, "triton", "native") != "native":
        page_offsets, indices = select_entries(
            scores, num_entries, num_pages, max_pages, page_size, backend
        )
        compact(
            pool,
            rows,
            block_table,
            page_offsets,
            indices,
            max_region_blocks=max_region_blocks,
            granularity=granularity,
            backend=backend,
        )
        return page_offsets, indices
    _check_compaction(pool, rows, block_table, num_streams, max_region_blocks, granularity, backend)
    _check_selection(scores, num_entries, num_pages, page_size, backend)
    page_offsets, indices = _selection_results(scores, max_pages, page_size)
    arguments = (scores, num_entries, num_pages, page_offsets, indices, pool, rows, block_table)
    native_ops(*arguments).select_and_compact(*arguments, *offsets, max_region_blocks, page_size)
    return page_offsets, indices


def move_entries(
    source: torch.Tensor,
    source_index: torch.Tensor,
    target: torch.Tensor,
    target_index: torch.Tensor,
    backend: str = "triton",
) -> None:
    """Copy entries (pages, or tokens) from anywhere to anywhere.

    Args:
        source: [n, e], contiguous.
        source_index: [m] int64; a negative one moves nothing.
        target: [k, e] of the same type, contiguous, written; may be `source`.
        target_index: [m] int64, likewise; no entry twice, none that is a source of `source` itself.
        backend: 'triton' or 'reference'.

    No host sync, graph-safe, deterministic.

    Raises:
        ValueError: on shapes or types that do not fit. Values are not looked at.
        RuntimeError: if the backend cannot run here.
    """
    for name, entries in (("source", source), ("target", target)):
        check(
            entries.dim() == 2
            and entries.is_contiguous()
            and entries.shape[1] == source.shape[1]
            and entries.dtype == source.dtype,
            f"want a contiguous {name} [entries, elements], "
            f"got {tuple(entries.shape)} {entries.dtype}",
        )
    for name, index in (("source", source_index), ("target", target_index)):
        check(
            index.shape == (source_index.numel(),)
            and index.dtype == torch.int64
            and index.is_contiguous(),
            f"want {name} index [{source_index.numel()}] int64, "
            f"got {tuple(index.shape)} {index.dtype}",
        )
    arguments = (source, source_index, target, target_index)
    if check_backend(backend, "triton") == "reference":
        reference.move_entries(*arguments)
    else:
        triton_kernels(*arguments).move_entries(*arguments)


def _check_compaction(
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    num_streams: int,
    max_region_blocks: int,
    granularity: str,
    backend: str,
) -> int:
    """Entries per page; ValueError unless these can be compacted."""
    check_rows(rows, block_table)
    check(
        pool.dim() == 3
        and pool.is_contiguous()
        and (pool.shape[1] in BLOCK_SIZES or _takes_any_size(backend, pool)),
        f"want a contiguous pool [pages, block size, 2 d], got {tuple(pool.shape)}",
    )
    check(
        num_streams > 0 and pool.shape[0] % num_streams == 0,
        f"a pool of {pool.shape[0]} pages is not whole blocks of {num_streams}",
    )
    check(max_region_blocks >= 0, f"max_region_blocks is {max_region_blocks}")
    check(granularity in ("page", "token"), f"unknown granularity {granularity!r}")
    return 1 if granularity == "page" else pool.shape[1]


def _checked_offsets(
    pool: torch.Tensor,
    key_offsets: torch.Tensor | None,
    value_offsets: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The element order of pages; ValueError unless the backend and the pool have it."""
    check(
        (key_offsets is None and value_offsets is None) or _takes_any_size(backend, pool),
        f"backend {backend!r} on {pool.device} knows plain pages only",
    )
    want = (pool.shape[1], pool.shape[2] // 2) if pool.dim() == 3 else None
    for offsets in (key_offsets, value_offsets):
        check(
            offsets is None
            or (offsets.shape == want and offsets.dtype == torch.int64 and offsets.is_contiguous()),
            f"want offsets {want} int64",
        )
    return key_offsets, value_offsets


def _check_selection(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_pages: torch.Tensor,
    page_size: int,
    backend: str,
) -> None:
    num_requests, num_streams = _check_scores(scores, num_entries, page_size, backend)
    check(
        num_pages.shape == (num_requests, num_streams)
        and num_pages.dtype == torch.int32
        and num_pages.is_contiguous(),
        f"want num_pages [{num_requests}, {num_streams}] int32, "
        f"got {tuple(num_pages.shape)} {num_pages.dtype}",
    )


def _selection_results(
    scores: torch.Tensor, max_pages: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page offsets and indices, to be written."""
    num_requests, num_streams, _ = scores.shape
    page_offsets = scores.new_empty(num_requests, num_streams + 1, dtype=torch.int32)
    return page_offsets, scores.new_empty(num_requests, max_pages * page_size, dtype=torch.int32)


def _takes_any_size(backend: str, tensor: torch.Tensor) -> bool:
    """Whether pages may have any number of tokens."""
    return backend == "native" and tensor.device.type == "cpu"


def _check_scores(
    scores: torch.Tensor, num_entries: torch.Tensor, page_size: int, backend: str
) -> tuple[int, int]:
    check(
        scores.dim() == 3 and scores.dtype == torch.float32 and scores.stride(2) == 1,
        f"want scores [R, S, N] float32, got {tuple(scores.shape)} {scores.dtype}",
    )
    num_requests, num_streams, _ = scores.shape
    check(
        num_entries.shape == (num_requests,) and num_entries.dtype == torch.int32,
        f"want num_entries [{num_requests}] int32, "
        f"got {tuple(num_entries.shape)} {num_entries.dtype}",
    )
    check(
        0 < num_streams <= MAX_STREAMS,
        f"1 to {MAX_STREAMS} streams can be selected from, not {num_streams}",
    )
    check(
        page_size in (1, *BLOCK_SIZES) or (page_size > 0 and _takes_any_size(backend, scores)),
        f"pages of {page_size} entries are not supported",
    )
    return num_requests, num_streams
