"""What a prompt's streams keep, in plain torch: the judge of what engines select.

Nothing of it is shared with `compaction.selection` but the budgets' plans, the scores of entries,
and the count that a first score decides on. What is best is ranked by the ops' references, which
engines with other backends do not run. Streams are (layer, KV head), layer first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies.base import LayerScores
from vllm_kvcompress.policies.budgets.base import Budgets, PageSupply
from vllm_kvcompress.policies.entries import (
    entries_per_page,
    entry_scores,
    first_stage_counts,
)
from vllm_kvcompress.policies.registry import make_budgets


@dataclass(frozen=True)
class Selection:
    """What one prompt keeps. L layers, H KV heads.

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


@dataclass(frozen=True)
class StreamBudgets:
    """Pages of every stream.

    Attributes:
        num_pages: [L, H] int64, each >= 1.
        guaranteed: [L] int64, entries (pages or tokens) that each head is assured of.
    """

    num_pages: torch.Tensor
    guaranteed: torch.Tensor


def share(
    budgets: Budgets, scores: torch.Tensor, mean_pages: int, page_size: int = 1
) -> StreamBudgets:
    """Pages of every stream, summing to mean_pages * L * H.

    Args:
        budgets: any.
        scores: [L, H, N] float32; one entry per page (page_size 1) or per token.
        mean_pages: of a stream, on average.
        page_size: entries of `scores` per page.

    Raises:
        ValueError: if an option does not fit the model.
    """
    num_layers, num_heads, num_entries = scores.shape
    max_pages = num_entries // page_size
    plan = budgets.plan(PageSupply(num_layers, num_heads, mean_pages, max_pages, page_size))
    guaranteed = plan.guaranteed_per_layer(num_layers)
    if plan.num_pages is not None:
        return StreamBudgets(plan.num_pages, guaranteed)
    pages = []
    groups = scores.reshape(plan.num_groups, -1, num_entries)
    for group, total, sure in zip(
        groups, plan.total_pages.tolist(), plan.guaranteed.tolist(), strict=True
    ):
        counts = ops.joint_top_counts(group, total * page_size, sure, "reference")
        if page_size > 1:
            ideal = [count / page_size for count in counts.tolist()]
            counts = torch.tensor(ops.apportion(ideal, total, 1, max_pages))
        pages.append(counts)
    return StreamBudgets(torch.stack(pages).view(num_layers, num_heads), guaranteed)


def select(
    scores: Sequence[LayerScores],
    config: KVCompressConfig,
    mean_pages: int,
    block_size: int,
    num_tail_tokens: int = 0,
) -> Selection:
    """Choose what each (layer, KV head) keeps.

    Args:
        scores: one per layer, on the CPU; candidates are a multiple of block_size.
        config: names the budgets and the granularity.
        mean_pages: region pages per stream on average; the total is exact.
        block_size: tokens per page.
        num_tail_tokens: prompt tokens that are kept beside the region.
    """
    entries = [entry_scores(layer, config, block_size) for layer in scores]
    first = ops.nan_last(torch.stack([layer.first for layer in entries]))
    page_size = entries_per_page(config, block_size)
    budgets = share(make_budgets(config), first, mean_pages, page_size)
    assert int(budgets.num_pages.sum()) == mean_pages * first.shape[0] * first.shape[1]
    counts = budgets.num_pages.reshape(-1) * page_size
    flat = first.flatten(0, 1)
    if all(layer.second is not None for layer in entries):
        seconds = [layer.second for layer in entries if layer.second is not None]
        second = ops.nan_last(torch.stack(seconds))
        in_first = first_stage_counts(
            counts,
            budgets.guaranteed.repeat_interleave(first.shape[1]),
            config.option("first_stage"),
            block_size // page_size,
            num_tail_tokens,
        )
        # The best by the first score come before all others.
        rows = torch.arange(flat.shape[0]).repeat_interleave(in_first)
        combined = second.flatten(0, 1).clone()
        combined[rows, ops.select_top(flat, in_first, "reference")] = float("inf")
        flat = combined
    return Selection(
        budgets.num_pages, ops.select_top(flat, counts, "reference"), config.granularity
    )
