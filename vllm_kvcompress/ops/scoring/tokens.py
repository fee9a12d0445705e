"""Scores along tokens: pooled, and of whole pages.

None writes to its arguments; all are deterministic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.dispatch import choose
from vllm_kvcompress.ops.scoring import reference

PAGE_REDUCTIONS = ("max", "mean", "rms")


def pool_scores(
    scores: torch.Tensor, kernel: int, kind: str, backend: str = "torch"
) -> torch.Tensor:
    """Pool along the last axis, stride 1, same length.

    Args:
        scores: [..., n] float32.
        kernel: odd width; 1 returns the scores unchanged.
        kind: 'max', or 'avg' (positions outside count as 0, as in the SnapKV code).
        backend: 'torch' or 'reference'.

    Returns:
        Like `scores`.

    Raises:
        ValueError: on an even kernel or an unknown kind.
    """
    check(kernel >= 1 and kernel % 2 == 1, f"pool kernel must be odd and positive, got {kernel}")
    check(kind in ("max", "avg"), f"pool kind must be 'max' or 'avg', got {kind!r}")
    return choose(_POOL, backend)(scores, kernel, kind)


def _pool_scores(scores: torch.Tensor, kernel: int, kind: str) -> torch.Tensor:
    if kernel == 1 or scores.shape[-1] == 0:
        return scores
    if kind == "max":
        flat = scores.reshape(-1, 1, scores.shape[-1])
        return F.max_pool1d(flat, kernel, stride=1, padding=kernel // 2).view(scores.shape)
    # Faster on a CPU than torch's average pooling, and the same to the bit.
    padded = F.pad(scores, (kernel // 2, kernel // 2))
    first, *others = padded.unfold(-1, scores.shape[-1], 1).unbind(-2)
    total = first.clone()
    for other in others:
        total += other
    return total / kernel


_POOL = {"torch": _pool_scores, "reference": reference.pool_scores}


def page_scores(
    scores: torch.Tensor, page_size: int, reduce: str = "max", backend: str = "torch"
) -> torch.Tensor:
    """Score of a page from its tokens'.

    Args:
        scores: [..., n] float32, n a multiple of page_size; not negative for 'rms'.
        page_size: tokens per page.
        reduce: 'max' (its best token), 'mean', or 'rms' (root mean square, between the two).
        backend: 'torch' or 'reference'.

    Returns:
        [..., n / page_size] float32.

    Raises:
        ValueError: if n is not a multiple of page_size, or on an unknown reduction.
    """
    num_tokens = scores.shape[-1]
    check(
        num_tokens % page_size == 0,
        f"{num_tokens} scores are not whole pages of {page_size} tokens",
    )
    check(reduce in PAGE_REDUCTIONS, f"unknown page reduction {reduce!r}")
    return choose(_PAGES, backend)(scores, page_size, reduce)


def _page_scores(scores: torch.Tensor, page_size: int, reduce: str) -> torch.Tensor:
    num_tokens = scores.shape[-1]
    pages = scores.unflatten(-1, (num_tokens // page_size, page_size))
    best = pages.amax(dim=-1)
    if reduce == "max":
        return best
    if reduce == "mean":
        return pages.mean(dim=-1)
    # Relative to the best, since squares of small scores would underflow.
    unit = torch.where((best > 0) & best.isfinite(), best, 1.0)
    return unit * (pages / unit[..., None]).square().mean(dim=-1).sqrt()


_PAGES = {"torch": _page_scores, "reference": reference.page_scores}
