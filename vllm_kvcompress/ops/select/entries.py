"""Shares of streams that compete, and each stream's best entries."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.dispatch import by_native, by_triton, choose
from vllm_kvcompress.ops.limits import BLOCK_SIZES, takes_any_size
from vllm_kvcompress.ops.select import by_torch, reference

MAX_STREAMS = 8192
_COUNT = {
    "triton": by_triton("joint_page_counts"),
    "native": by_native("joint_page_counts"),
    "torch": by_torch.joint_page_counts,
    "reference": reference.joint_page_counts,
}
_SELECT = {
    "triton": by_triton("select_entries"),
    "native": by_native("select_entries"),
    "torch": by_torch.select_entries,
    "reference": reference.select_entries,
}


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
    as in `joint_top_counts`. Where entries are tokens, shares are made whole pages by
    largest remainder, at least one each. A group is a layer's heads (Ada-KV) or all streams.

    Args:
        scores: [R, S, N] float32; entries past num_entries are not read. NaN counts as -inf.
        num_entries: [R] int32, whole pages' worth of entries that each stream can choose from.
        total_pages: [R, G] int32, pages to share in each group of S / G streams one after
            another; at least one and at most num_entries / page_size per stream.
        guaranteed: [R, G] int32, entries; S / G of them are at most the group's total.
        page_size: entries per page: 1, or 16 to 128 tokens; any number for 'torch', and for
            'native' on a CPU.
        backend: 'triton', 'native' (compiled), 'torch' or 'reference'.

    Returns:
        [R, S] int32, sums per group exactly total_pages. Deterministic; no host sync
        and graph-safe, but for 'torch'.

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
    count = choose(_COUNT, backend)
    count(scores, num_entries, total_pages, guaranteed, num_pages, page_size=page_size)
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
        backend: 'triton', 'native' (compiled), 'torch' or 'reference'.

    Returns:
        page_offsets [R, S + 1] int32, first virtual page of each stream, and indices
        [R, max_pages * page_size] int32: streams one after another, each ascending; equal scores:
        the lower index first. Entries past a request's last are undefined. Deterministic;
        no host sync and graph-safe, but for 'torch'.

    Raises:
        ValueError: on shapes or types that do not fit. Values are not looked at.
        RuntimeError: if the backend cannot run here.

    Example:
        scores [[[1, 3, 2], [5, 4, 5]]], num_pages [[1, 2]]: page_offsets [[0, 1, 3]],
        indices [[1, 0, 2]].
    """
    check_selection(scores, num_entries, num_pages, page_size, backend)
    page_offsets, indices = selection_results(scores, max_pages, page_size)
    select = choose(_SELECT, backend)
    select(scores, num_entries, num_pages, page_offsets, indices, page_size=page_size)
    return page_offsets, indices


def check_selection(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_pages: torch.Tensor,
    page_size: int,
    backend: str,
) -> None:
    """Raise ValueError unless these can be selected from."""
    num_requests, num_streams = _check_scores(scores, num_entries, page_size, backend)
    check(
        num_pages.shape == (num_requests, num_streams)
        and num_pages.dtype == torch.int32
        and num_pages.is_contiguous(),
        f"want num_pages [{num_requests}, {num_streams}] int32, "
        f"got {tuple(num_pages.shape)} {num_pages.dtype}",
    )


def selection_results(
    scores: torch.Tensor, max_pages: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page offsets and indices, to be written."""
    num_requests, num_streams, _ = scores.shape
    page_offsets = scores.new_empty(num_requests, num_streams + 1, dtype=torch.int32)
    return page_offsets, scores.new_empty(num_requests, max_pages * page_size, dtype=torch.int32)


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
        page_size in (1, *BLOCK_SIZES) or (page_size > 0 and takes_any_size(backend, scores)),
        f"pages of {page_size} entries are not supported",
    )
    return num_requests, num_streams
