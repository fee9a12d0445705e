"""The best entries of rows of scores. None writes to its arguments; all are deterministic."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.dispatch import choose
from vllm_kvcompress.ops.scoring import reference


def nan_last(scores: torch.Tensor) -> torch.Tensor:
    """Scores with NaN, which has no rank, as -inf: a request's embeddings can be anything."""
    return torch.where(scores.isnan(), float("-inf"), scores)


def joint_top_counts(
    scores: torch.Tensor, total: int, guaranteed: int, backend: str = "torch"
) -> torch.Tensor:
    """How many entries each row gets when rows compete for `total` entries (Ada-KV).

    Args:
        scores: [R, n] float32.
        total: entries to give out over all rows, <= R * n.
        guaranteed: best entries of each row that count in any case, R * guaranteed <= total.
        backend: 'torch' or 'reference'.

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


_COUNTS = {
    "torch": _joint_top_counts,
    "reference": reference.joint_top_counts,
}


def select_top(scores: torch.Tensor, counts: torch.Tensor, backend: str = "torch") -> torch.Tensor:
    """The best entries of each row, a different number per row.

    Args:
        scores: [R, n] float32.
        counts: [R] int64, entries to take, each in [0, n].
        backend: 'torch' or 'reference'.

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


_TOP = {
    "torch": _select_top,
    "reference": reference.select_top,
}
