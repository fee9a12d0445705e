"""Ada-KV: the heads of a layer compete for its pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.policies.budgets.base import BudgetPlan, PageSupply, guaranteed_entries
from vllm_kvcompress.policies.budgets.pyramid import Pyramid
from vllm_kvcompress.policies.budgets.uniform import Uniform
from vllm_kvcompress.policies.options import share_option


@dataclass(frozen=True)
class Ada(Uniform):
    """Each head is sure of its best `alpha * mean`; the rest goes to the layer's best scores.

    Source: Ada-KV, arXiv 2407.11550, algorithm 1, in kvpress' form.
    """

    scope: ClassVar[str] = "layer"
    summary: ClassVar[str] = "heads of a layer compete"

    alpha: float = share_option(0.2, "share of the mean budget guaranteed to each head")

    def plan(self, supply: PageSupply) -> BudgetPlan:
        """One group per layer."""
        means = self.layer_pages(supply)
        guaranteed = [guaranteed_entries(self.alpha, mean, supply.page_size) for mean in means]
        totals = [mean * supply.num_heads for mean in means]
        return BudgetPlan(None, torch.tensor(totals), torch.tensor(guaranteed))


@dataclass(frozen=True)
class AdaPyramid(Pyramid, Ada):
    """The layers' pages are those of `Pyramid`; a layer's heads share them as in `Ada`."""

    scope: ClassVar[str] = "layer"
    summary: ClassVar[str] = "pyramid over layers, heads compete"
