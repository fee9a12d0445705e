"""All heads of all layers compete for one budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.policies.budgets.base import (
    BudgetPlan,
    Budgets,
    PageSupply,
    guaranteed_entries,
)
from vllm_kvcompress.policies.options import share_option


@dataclass(frozen=True)
class Joint(Budgets):
    """Each head is sure of its best `floor * mean`; the rest goes to the model's best scores.

    Source: KV-Compress, arXiv 2410.00161, section 3; Layer-DefensiveKV, arXiv 2510.13334.
    """

    scope: ClassVar[str] = "model"
    summary: ClassVar[str] = "all heads of all layers compete"

    floor: float = share_option(0.05, "share of the mean budget guaranteed to each head")

    def plan(self, supply: PageSupply) -> BudgetPlan:
        """One group of all streams."""
        guaranteed = guaranteed_entries(self.floor, supply.mean_pages, supply.page_size)
        return BudgetPlan(None, torch.tensor([supply.total_pages]), torch.tensor([guaranteed]))
