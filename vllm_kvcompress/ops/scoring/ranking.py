"""The best entries of rows of scores. None writes to its arguments; all are deterministic."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.dispatch import by_native, choose
from vllm_kvcompress.ops.scoring import reference


def joint_top_counts(
    scores: torch.Tensor, total: int, guaranteed: int, backend: str = "torch"
) -> torch.Tensor:
    """How many entries each row gets when rows compete for `total` entries (Ada-KV).

    Args:
        scores: [R, n] float32.
        total: entries to give out over all rows, <= R * n.
        guaranteed: best entries of each row that count in any case, R * guaranteed <= total.
        backend: 'torch', 'native' (compiled) or 'reference'.

    Returns:
        [R] int64 summing to total. Equal scores: the entry that ranks higher in its row, then
        the lower row, first, so that rows with equal scores share evenly.

    Raises:
        ValueError: if the numbers do not fit.
    """
    num_rows, num_entries = scores.shape
    check(
        0 <= guaranteed <= num_entries and num_rows * guaranteed <= total <= scores.numel(),
        f"cannot give {total} of {num_rows} x {num_entries} entries, {guaranteed} sure per row",
    )
    return choose(_COUNTS, backend)(scores, total, guaranteed)


def _joint_top_counts(scores: torch.Tensor, total: int, guaranteed: int) -> torch.Tensor:
    num_rows = scores.shape[0]
    by_rank = scores.sort(dim=1, descending=True, stable=True).values
    # Rank by rank, so that a stable sort prefers the higher rank, then the lower row.
    rest = by_rank[:, guaranteed:].t().flatten()
    winners = rest.sort(descending=True, stable=True).indices[: total - num_rows * guaranteed]
    return torch.bincount(winners % num_rows, minlength=num_rows) + guaranteed


def _joint_top_counts_natively(scores: torch.Tensor, total: int, guaranteed: int) -> torch.Tensor:
    ints: dict[str, Any] = {"dtype": torch.int32, "device": scores.device}
    numbers = torch.tensor([[scores.shape[1]], [total], [guaranteed]], **ints)
    entries, totals, sure = numbers[0], numbers[1:2], numbers[2:]
    counts = torch.empty(1, scores.shape[0], **ints)
    by_native("joint_page_counts")(scores[None], entries, totals, sure, counts, page_size=1)
    return counts[0].long()


_COUNTS = {
    "torch": _joint_top_counts,
    "native": _joint_top_counts_natively,
    "reference": reference.joint_top_counts,
}


def select_top(scores: torch.Tensor, counts: torch.Tensor, backend: str = "torch") -> torch.Tensor:
    """The best entries of each row, a different number per row.

    Args:
        scores: [R, n] float32.
        counts: [R] int64, entries to take, each in [0, n].
        backend: 'torch', 'native' (compiled) or 'reference'.

    Returns:
        [sum(counts)] int64: each row's chosen indices ascending, rows one after another.
        Equal scores: the lower index first. Syncs with the host (the size depends on data).

    Raises:
        ValueError: if the counts do not fit the scores.
    """
    num_rows, num_entries = scores.shape
    check(
        counts.shape == (num_rows,) and bool(((counts >= 0) & (counts <= num_entries)).all()),
        f"want {num_rows} counts in [0, {num_entries}], got {counts.tolist()}",
    )
    return choose(_TOP, backend)(scores, counts)


def _select_top(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    num_rows, num_entries = scores.shape
    order = scores.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(num_entries, device=scores.device).expand(num_rows, -1)
    keep_mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    keep_mask.scatter_(1, order, ranks < counts.to(scores.device)[:, None])
    return keep_mask.nonzero()[:, 1]


def _select_top_natively(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    ints: dict[str, Any] = {"dtype": torch.int32, "device": scores.device}
    width = torch.tensor([scores.shape[1]], **ints)
    wanted = counts.to(**ints)[None]
    offsets = torch.empty(1, scores.shape[0] + 1, **ints)
    indices = torch.empty(1, int(counts.sum()), **ints)
    by_native("select_entries")(scores[None], width, wanted, offsets, indices, page_size=1)
    return indices[0].long()


_TOP = {
    "torch": _select_top,
    "native": _select_top_natively,
    "reference": reference.select_top,
}
