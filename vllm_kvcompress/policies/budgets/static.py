"""Shares from a table that the user gives."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from vllm_kvcompress.policies.budgets.base import (
    NO_GROUPS,
    BudgetPlan,
    PageSupply,
    weighted_pages,
)
from vllm_kvcompress.policies.budgets.uniform import Uniform
from vllm_kvcompress.policies.options import option


def parse_table(value: Any) -> tuple[Any, ...]:
    """A table as nested tuples of floats; a string names a JSON file that holds it.

    Raises:
        ValueError: if it is no table, in words that follow the option's name.
    """
    if isinstance(value, str):
        try:
            value = json.loads(Path(value).expanduser().read_text())
        except OSError as error:
            raise ValueError(f"names a file that cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise ValueError(f"names a file that is not JSON ({error})") from None
    problem = "must be [weight per layer] or [[weight per head] per layer], all weights > 0"
    if not isinstance(value, list | tuple) or not value or value[0] in ([], ()):
        raise ValueError(problem)
    rows = [row if isinstance(row, list | tuple) else [row] for row in value]
    weights = [weight for row in rows for weight in row]
    if len({(isinstance(row, list | tuple), len(rows[i])) for i, row in enumerate(value)}) != 1:
        raise ValueError(f"{problem}, and the same number of heads in every layer")
    for weight in weights:
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 < weight <= sys.float_info.max:
            raise ValueError(problem)
    if isinstance(value[0], list | tuple):
        return tuple(tuple(map(float, row)) for row in value)
    return tuple(map(float, value))


@dataclass(frozen=True)
class Static(Uniform):
    """In proportion to fixed weights, of layers or of every head of every layer."""

    summary: ClassVar[str] = "fixed weights from a table"

    table: tuple[Any, ...] = option(
        None,
        "weights per layer, or per layer and head; or a JSON file",
        kind=tuple,
        parse=parse_table,
    )

    def layer_pages(self, supply: PageSupply) -> list[int]:
        """Of a table of weights per layer."""
        return weighted_pages(self.table, supply.mean_pages * supply.num_layers, supply.max_pages)

    def plan(self, supply: PageSupply) -> BudgetPlan:
        """See the class.

        Raises:
            ValueError: if the table does not fit the model.
        """
        self._check_shape(supply.num_layers, supply.num_heads)
        if not self._has_heads:
            return super().plan(supply)
        weights = [weight for row in self.table for weight in row]
        pages = torch.tensor(weighted_pages(weights, supply.total_pages, supply.max_pages))
        return BudgetPlan(pages.view(supply.num_layers, supply.num_heads), NO_GROUPS, NO_GROUPS)

    @property
    def _has_heads(self) -> bool:
        return isinstance(self.table[0], tuple)

    def _check_shape(self, num_layers: int, num_heads: int) -> None:
        if len(self.table) != num_layers:
            raise ValueError(
                f"the budget table has {len(self.table)} layers, the model {num_layers}"
            )
        if self._has_heads and len(self.table[0]) != num_heads:
            raise ValueError(
                f"the budget table has {len(self.table[0])} heads, the model {num_heads}"
            )
