"""What is chosen from: scores of pages or tokens, and how many a first of two scores decides on."""

from __future__ import annotations

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.policies.base import LayerScores
from vllm_kvcompress.policies.setting import Setting


def entries_per_page(setting: Setting, block_size: int) -> int:
    """Things to choose from that fill a page: its tokens, or 1 if whole pages are chosen."""
    return block_size if setting.granularity == "token" else 1


def entry_scores(scores: LayerScores, setting: Setting, block_size: int) -> LayerScores:
    """Scores of what is chosen from: of tokens, or of whole pages. NaN stays; ops rank it last."""
    first, second = scores.first, scores.second
    if setting.granularity == "page":
        reduce = setting.option("page_reduce")
        first = ops.page_scores(first, block_size, reduce)
        second = None if second is None else ops.page_scores(second, block_size, reduce)
    return LayerScores(first, second)


def first_stage_counts(
    counts: torch.Tensor,
    guaranteed: torch.Tensor,
    share: float,
    tokens_per_entry: int,
    num_tail_tokens: torch.Tensor | int,
) -> torch.Tensor:
    """Entries that a first score decides on, of two (CriticalKV).

    As in kvpress, the share is one of all kept tokens, and the window fills it first; what a
    stream is guaranteed is its own best by the first score.

    Args:
        counts: [..., S] integers, entries that each stream keeps.
        guaranteed: [..., S], entries that it is assured of.
        share: of what is kept, in [0, 1].
        tokens_per_entry: 1, or the page's tokens where entries are pages.
        num_tail_tokens: tokens kept beside the region, per request.

    Returns:
        Like `counts`.
    """
    kept = counts * tokens_per_entry + num_tail_tokens
    in_first = (kept * share).to(counts.dtype) - num_tail_tokens
    return (in_first.clamp(min=0) // tokens_per_entry).maximum(guaranteed).minimum(counts)
