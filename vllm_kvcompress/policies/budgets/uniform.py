"""Every layer and head gets as much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.policies.budgets.base import NO_GROUPS, BudgetPlan, Budgets, PageSupply


@dataclass(frozen=True)
class Uniform(Budgets):
    """The same for every stream. What gives layers shares of their own derives from it."""

    scope: ClassVar[str] = "head"
    summary: ClassVar[str] = "the same for every layer and head"

    def layer_pages(self, supply: PageSupply) -> list[int]:
        """Pages per KV head of each layer, before heads compete.

        Returns:
            L numbers in [1, max_pages], summing to mean_pages * L.
        """
        return [supply.mean_pages] * supply.num_layers

    def plan(self, supply: PageSupply) -> BudgetPlan:
        """The layers' pages, for all heads of a layer alike."""
        pages = torch.tensor(self.layer_pages(supply))[:, None].expand(-1, supply.num_heads)
        return BudgetPlan(pages, NO_GROUPS, NO_GROUPS)
