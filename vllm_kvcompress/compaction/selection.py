"""What streams keep, of a batch of prompts, the host waiting for nothing.

R is the number of prompts, L of layers, H of KV heads, S = L * H of streams, N of a stream's
entries (pages, or tokens).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.staging import flat_places
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import CacheShape, RequestGeometry
from vllm_kvcompress.ops.transfers import to_device
from vllm_kvcompress.policies.budgets.base import PageSupply
from vllm_kvcompress.policies.entries import entries_per_page, first_stage_counts
from vllm_kvcompress.policies.registry import make_budgets


@dataclass(frozen=True)
class PromptBudgets:
    """What is known of a prompt's budgets before its scores are.

    Attributes:
        num_pages: [S] int32, if scores have no say in it; else None.
        totals: [G] int32 pages to share in each group of streams that compete, G = L or 1.
        guaranteed: [G] int32 entries that each stream of a group is assured of.
        stream_guaranteed: [S] int32, the same per stream.
        layer_pages: [L] int64 pages of each layer; their sum alone, where all layers compete.
    """

    num_pages: np.ndarray | None
    totals: np.ndarray
    guaranteed: np.ndarray
    stream_guaranteed: np.ndarray
    layer_pages: np.ndarray


@dataclass(frozen=True)
class Choice:
    """What some streams keep: of each, its best entries.

    Attributes:
        num_pages: [R, s] int32 of each stream.
        scores: [R, s, N] float32.
        max_pages: the greatest sum of a prompt's pages.
    """

    num_pages: torch.Tensor
    scores: torch.Tensor
    max_pages: int


class Chooser:
    """Shares pages among streams.

    Args:
        config: validated setting.
        shape: of the paged cache.
        device: of the scores.
        backend: of the ops that select.
    """

    def __init__(
        self, config: KVCompressConfig, shape: CacheShape, device: torch.device, backend: str
    ) -> None:
        self._config, self._shape = config, shape
        self._device, self._backend = device, backend
        self.per_page = entries_per_page(config, shape.block_size)
        # By a prompt's numbers; nothing in it holds on to the pool.
        self._budgets = functools.lru_cache(maxsize=4096)(
            functools.partial(_prompt_budgets, config, shape)
        )

    def budgets(self, geometries: Sequence[RequestGeometry]) -> list[PromptBudgets]:
        """Of prompts, before their scores are known."""
        return [self._budgets(g.num_region_blocks, g.first_kept_block) for g in geometries]

    def choose(
        self,
        geometries: Sequence[RequestGeometry],
        num_entries: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor | None,
        layer: int | None = None,
    ) -> Choice:
        """What streams keep, of one layer or of all.

        Args:
            geometries: of the prompts.
            num_entries: [R] int32 that compete.
            first, second: [R, S, N] float32 scores; see `LayerScores`.
            layer: 0-based index; None = all layers.
        """
        budgets = self.budgets(geometries)
        streams = slice(None) if layer is None else self._shape.streams(layer)
        first = first[:, streams].contiguous()
        max_pages = int(max(budget.layer_pages[layer].sum() for budget in budgets))
        num_pages = self._count_pages(budgets, num_entries, first, layer)
        if second is None:
            return Choice(num_pages, first, max_pages)
        sure = np.stack([budget.stream_guaranteed[streams] for budget in budgets])
        guaranteed = to_device(sure, self._device)
        tails = np.array([[g.num_tail_tokens] for g in geometries], np.int32)
        in_first = first_stage_counts(
            num_pages * self.per_page,
            guaranteed,
            self._config.option("first_stage"),
            self._shape.block_size // self.per_page,
            to_device(tails, self._device),
        )
        offsets, indices = ops.select_entries(
            first, num_entries, in_first, max_pages * self.per_page, backend=self._backend
        )
        return Choice(num_pages, _raised(second[:, streams], offsets, indices), max_pages)

    def select(
        self, choice: Choice, num_entries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Page offsets and indices of what is kept, as `ops.select_entries` gives them."""
        return ops.select_entries(
            choice.scores,
            num_entries,
            choice.num_pages,
            choice.max_pages,
            self.per_page,
            backend=self._backend,
        )

    def _count_pages(
        self,
        budgets: Sequence[PromptBudgets],
        num_entries: torch.Tensor,
        first: torch.Tensor,
        layer: int | None,
    ) -> torch.Tensor:
        """[R, s] int32 pages of each of `first`'s streams."""
        streams = slice(None) if layer is None else self._shape.streams(layer)
        groups = slice(None) if layer is None else slice(layer, layer + 1)
        fixed = [b.num_pages[streams] for b in budgets if b.num_pages is not None]
        # By the budgets' kind, so of all prompts or of none.
        if fixed:
            return to_device(np.stack(fixed), self._device)
        limits = [np.stack([b.totals[groups], b.guaranteed[groups]]) for b in budgets]
        totals, group_sure = to_device(np.stack(limits, axis=1), self._device)
        return ops.joint_page_counts(
            first, num_entries, totals, group_sure, self.per_page, backend=self._backend
        )


def _prompt_budgets(
    config: KVCompressConfig, shape: CacheShape, mean_pages: int, max_pages: int
) -> PromptBudgets:
    page_size = entries_per_page(config, shape.block_size)
    supply = PageSupply(shape.num_layers, shape.num_kv_heads, mean_pages, max_pages, page_size)
    plan = make_budgets(config).plan(supply)
    per_layer = plan.guaranteed_per_layer(shape.num_layers)
    pages = plan.num_pages
    return PromptBudgets(
        num_pages=None if pages is None else pages.flatten().int().numpy(),
        totals=plan.total_pages.int().numpy(),
        guaranteed=plan.guaranteed.int().numpy(),
        stream_guaranteed=per_layer.repeat_interleave(shape.num_kv_heads).int().numpy(),
        layer_pages=(plan.total_pages if pages is None else pages.sum(dim=1)).numpy(),
    )


def _raised(scores: torch.Tensor, offsets: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[R, s, N] scores, those of chosen entries raised to +inf."""
    num_prompts, num_streams, width = scores.shape
    # Places past the last entry go to a column behind; rows are as far apart as scores' are.
    num_places = num_streams * width
    raised = scores.new_empty(num_prompts, num_places + ops.score_width(1))
    raised[:, :num_places] = scores.flatten(1)
    raised.scatter_(1, flat_places(offsets, indices, width), float("inf"))
    return raised[:, :num_places].unflatten(1, (num_streams, width))
