"""PyramidKV: more for low layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.ops import apportion
from vllm_kvcompress.policies.budgets.base import PageSupply
from vllm_kvcompress.policies.budgets.uniform import Uniform
from vllm_kvcompress.policies.options import option


@dataclass(frozen=True)
class Pyramid(Uniform):
    """Linear from `2 * mean - mean / beta` in the first layer to `mean / beta` in the last.

    Source: PyramidKV, arXiv 2406.02069, eq. 3-4. Where a head has fewer pages to choose from
    than twice the mean, the layers share uniformly, as the authors do for prompts shorter than
    that. The authors' code floors its step and overspends (L=80 at 128 tokens: +27 %); here the
    sum is exact. kvpress' PyramidKVPress counts the window inside a layer's number and clamps
    where this goes uniform.
    """

    summary: ClassVar[str] = "falls linearly from the first to last layer"

    beta: float = option(2.0, "last layer's share is base/beta; 1 = uniform", minimum=1.0)

    def layer_pages(self, supply: PageSupply) -> list[int]:
        """See the class."""
        num_layers, mean_pages = supply.num_layers, supply.mean_pages
        if num_layers == 1 or supply.max_pages < 2 * mean_pages:
            return [mean_pages] * num_layers
        low = mean_pages / self.beta
        high = 2 * mean_pages - low
        step = (high - low) / (num_layers - 1)
        ideal = [high - step * layer for layer in range(num_layers)]
        return apportion(ideal, mean_pages * num_layers, 1, supply.max_pages)
