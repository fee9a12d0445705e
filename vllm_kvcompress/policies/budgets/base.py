"""What every way to share a request's pages has in common.

All totals are exact in pages. Every head of every layer gets at least one page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

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
