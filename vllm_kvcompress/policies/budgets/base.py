"""What every way to share a request's pages has in common.

All totals are exact in pages. Every head of every layer gets at least one page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.ops import apportion


@dataclass(frozen=True)
class PageSupply:
    """The pages that a request's streams share. A stream is one KV head of one layer.

    Attributes:
        num_layers, num_heads: L and H; there are L * H streams.
        mean_pages: of a stream, on average.
        max_pages: a stream has to choose from.
        page_size: entries that fill a page: 1 where pages are chosen, their tokens where tokens
            are.
    """

    num_layers: int
    num_heads: int
    mean_pages: int
    max_pages: int
    page_size: int = 1

    @property
    def total_pages(self) -> int:
        """Of all streams."""
        return self.mean_pages * self.num_layers * self.num_heads


@dataclass(frozen=True)
class BudgetPlan:
    """What is known of a request's budgets before its scores are.

    Attributes:
        num_pages: [L, H] int64, if scores have no say in it; else None.
        total_pages: [G] int64 pages to share in each group of streams that compete: the heads of
            a layer (G = L) or all of them (G = 1). Empty if there are none.
        guaranteed: [G] int64, entries that each stream of a group is assured of.
    """

    num_pages: torch.Tensor | None
    total_pages: torch.Tensor
    guaranteed: torch.Tensor

    @property
    def num_groups(self) -> int:
        """G."""
        return self.total_pages.numel()

    def guaranteed_per_layer(self, num_layers: int) -> torch.Tensor:
        """[L] int64, entries that each head of a layer is assured of."""
        if self.num_pages is not None:
            return torch.zeros(num_layers, dtype=torch.int64)
        return self.guaranteed.expand(num_layers)


@dataclass(frozen=True)
class StreamBudgets:
    """Pages of every stream.

    Attributes:
        num_pages: [L, H] int64, each >= 1.
        guaranteed: [L] int64, entries (pages or tokens) that each head is assured of.
    """

    num_pages: torch.Tensor
    guaranteed: torch.Tensor


@dataclass(frozen=True)
class Budgets(ABC):
    """One way to share pages. A frozen dataclass, whose fields are its options.

    Attributes:
        scope: how far scores are compared, of `recipes.SCOPES`.
        summary: one line for the user.
    """

    scope: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def plan(self, supply: PageSupply) -> BudgetPlan:
        """What can be told without scores.

        Raises:
            ValueError: if an option does not fit the model.
        """

    def check_model(self, num_layers: int, num_heads: int) -> None:
        """Raise ValueError unless the options fit a model's layers and (local) KV heads."""
        self.plan(PageSupply(num_layers, num_heads, mean_pages=1, max_pages=1))

    def share(
        self, scores: torch.Tensor, mean_pages: int, page_size: int = 1, backend: str = "torch"
    ) -> StreamBudgets:
        """Pages of every stream.

        Args:
            scores: [L, H, N] float32; one entry per page (page_size 1) or per token.
            mean_pages: of a stream, on average.
            page_size: entries of `scores` per page.
            backend: 'torch' or 'native', of the ops.

        Returns:
            Pages summing to mean_pages * L * H.

        Raises:
            ValueError: if an option does not fit the model.
        """
        num_layers, num_heads, num_entries = scores.shape
        plan = self._plan(scores, num_layers, mean_pages, page_size)
        guaranteed = plan.guaranteed_per_layer(num_layers)
        if plan.num_pages is not None:
            return StreamBudgets(plan.num_pages, guaranteed)
        groups = scores.reshape(plan.num_groups, -1, num_entries)
        pages = _compete(groups, plan.total_pages, page_size, plan.guaranteed, backend)
        return StreamBudgets(pages.view(num_layers, num_heads), guaranteed)

    def _plan(
        self, scores: torch.Tensor, num_layers: int, mean_pages: int, page_size: int
    ) -> BudgetPlan:
        """The plan for streams with scores [..., H, N]."""
        num_heads, num_entries = scores.shape[-2:]
        max_pages = num_entries // page_size
        return self.plan(PageSupply(num_layers, num_heads, mean_pages, max_pages, page_size))


NO_GROUPS = torch.empty(0, dtype=torch.int64)


def weighted_pages(weights: Sequence[float], total: int, max_pages: int) -> list[int]:
    """`total` pages in proportion to weights, each in [1, max_pages]."""
    scale = total / sum(weights)
    return apportion([weight * scale for weight in weights], total, 1, max_pages)


def guaranteed_entries(share: float, mean_pages: int, page_size: int) -> int:
    """Entries that a stream is assured of, as a share of its mean budget."""
    # A head that is promised anything is promised at least one whole page.
    guaranteed = int(share * mean_pages * page_size)
    return max(1, guaranteed) if page_size == 1 else guaranteed


def _compete(
    groups: torch.Tensor,
    total_pages: torch.Tensor,
    page_size: int,
    guaranteed: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """[G, R] pages for G groups of R rows [G, R, N] that compete for `total_pages` [G] of them."""
    num_groups, num_rows, num_entries = groups.shape
    if backend == "native":
        num_pages = ops.joint_page_counts(
            groups.flatten(0, 1)[None],
            torch.tensor([num_entries], dtype=torch.int32),
            total_pages[None].int(),
            guaranteed[None].int(),
            page_size,
            backend="native",
        )
        return num_pages.view(num_groups, num_rows).long()
    pages = []
    for scores, total, sure in zip(groups, total_pages.tolist(), guaranteed.tolist(), strict=True):
        counts = ops.joint_top_counts(scores, total * page_size, sure, backend)
        if page_size > 1:
            ideal = [count / page_size for count in counts.tolist()]
            counts = torch.tensor(apportion(ideal, total, 1, num_entries // page_size))
        pages.append(counts)
    return torch.stack(pages)
