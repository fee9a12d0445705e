"""From scores to the pages or tokens that each head keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.policies.base import LayerScores
from vllm_kvcompress.policies.registry import make_budgets

if TYPE_CHECKING:
    from vllm_kvcompress.config import KVCompressConfig


@dataclass(frozen=True)
class Selection:
    """What one prompt keeps. L layers, H KV heads; streams are (layer, head), layer first.

    Attributes:
        num_pages: [L, H] int64, region pages of each stream, all >= 1.
        indices: [sum] int64, per stream ascending: kept page numbers (granularity 'page') or
            kept token positions (granularity 'token', `block_size` per page).
        granularity: 'page' or 'token'.
    """

    num_pages: torch.Tensor
    indices: torch.Tensor
    granularity: str

    @property
    def page_offsets(self) -> torch.Tensor:
        """[L * H + 1] int64, first virtual page of each stream, and their number."""
        offsets = torch.zeros(self.num_pages.numel() + 1, dtype=torch.int64)
        offsets[1:] = self.num_pages.reshape(-1).cumsum(0)
        return offsets


def select(
    scores: Sequence[LayerScores],
    config: KVCompressConfig,
    mean_pages: int,
    block_size: int,
    num_tail_tokens: int = 0,
    backend: str = "torch",
) -> Selection:
    """Choose what each (layer, KV head) keeps.

    Args:
        scores: one per layer, on the CPU; candidates are a multiple of block_size.
        config: names the budgets and the granularity.
        mean_pages: region pages per stream on average; the total is exact.
        block_size: tokens per page.
        num_tail_tokens: prompt tokens that are kept beside the region.
        backend: 'torch' or 'native', of the ops.

    Returns:
        The selection; its pages sum to mean_pages * L * H.
    """
    num_pages, flat = share_pages(scores, config, mean_pages, block_size, num_tail_tokens, backend)
    counts = num_pages.reshape(-1) * entries_per_page(config, block_size)
    return Selection(num_pages, ops.select_top(flat, counts, backend), config.granularity)


def share_pages(
    scores: Sequence[LayerScores],
    config: KVCompressConfig,
    mean_pages: int,
    block_size: int,
    num_tail_tokens: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of each stream, and the scores by which it fills them; arguments as in `select`.

    Returns:
        [L, H] int64 pages of each stream, and [L * H, N] float32 scores of entries, the best of
        which each stream keeps.
    """
    entries = [entry_scores(layer, config, block_size) for layer in scores]
    first = torch.stack([layer.first for layer in entries])
    page_size = entries_per_page(config, block_size)
    budgets = make_budgets(config).share(first, mean_pages, page_size, backend)
    assert int(budgets.num_pages.sum()) == mean_pages * first.shape[0] * first.shape[1]
    counts = budgets.num_pages.reshape(-1) * page_size
    flat = first.flatten(0, 1)
    if all(layer.second is not None for layer in entries):
        second = torch.stack([layer.second for layer in entries if layer.second is not None])
        in_first = first_stage_counts(
            counts,
            budgets.guaranteed.repeat_interleave(first.shape[1]),
            config.option("first_stage"),
            block_size // page_size,
            num_tail_tokens,
        )
        flat = _two_stages(flat, second.flatten(0, 1), in_first, backend)
    return budgets.num_pages, flat


def entries_per_page(config: KVCompressConfig, block_size: int) -> int:
    """Things to choose from that fill a page: its tokens, or 1 if whole pages are chosen."""
    return block_size if config.granularity == "token" else 1


def entry_scores(scores: LayerScores, config: KVCompressConfig, block_size: int) -> LayerScores:
    """Scores of what is chosen from: of the tokens, or of whole pages."""
    first, second = scores.first, scores.second
    if config.granularity == "page":
        reduce = config.option("page_reduce")
        first = ops.page_scores(first, block_size, reduce)
        second = None if second is None else ops.page_scores(second, block_size, reduce)
    return LayerScores(_ranked(first), None if second is None else _ranked(second))


def _ranked(scores: torch.Tensor) -> torch.Tensor:
    """NaN as the worst: a request's embeddings can be anything, and NaN has no rank."""
    return torch.where(scores.isnan(), float("-inf"), scores)


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


def _two_stages(
    first: torch.Tensor, second: torch.Tensor, counts: torch.Tensor, backend: str
) -> torch.Tensor:
    """`second`, with each row's best `counts` entries by `first` raised to +inf."""
    rows = torch.arange(first.shape[0]).repeat_interleave(counts)
    combined = second.clone()
    combined[rows, ops.select_top(first, counts, backend)] = float("inf")
    return combined
