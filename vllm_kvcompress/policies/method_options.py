"""What options a method takes: those of its scorer, of its budgets and of every method."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_kvcompress.policies.builtin import budgets_class
from vllm_kvcompress.policies.common_options import (
    CommonOptions,
    PublishedOption,
    RecentOption,
    can_compare,
)
from vllm_kvcompress.policies.options import OptionSpec, options_of
from vllm_kvcompress.policies.recipes import Recipe
from vllm_kvcompress.policies.registry import scorer_class

if TYPE_CHECKING:
    from vllm_kvcompress.policies.base import Scorer


def option_specs(recipe: Recipe, budgets: str | None = None) -> dict[str, OptionSpec]:
    """Every option that `recipe` takes, by name, with the recipe's own defaults.

    Args:
        recipe: the method.
        budgets: key into `BUDGETS`; None = the recipe's own.

    Raises:
        BrokenScorerError: if another package brings the scorer, and it cannot be used.
    """
    scorer = scorer_class(recipe.scorer)
    specs = {
        **_common_options(scorer),
        **options_of(scorer),
        **options_of(budgets_class(budgets or recipe.budgets)),
    }
    if recipe.published is not None:
        specs.update(options_of(PublishedOption))
    if scorer.rates_window:
        specs.update(options_of(RecentOption))
    for name, default in {"budgets": recipe.budgets, **recipe.defaults}.items():
        if name in specs:
            specs[name] = replace(specs[name], default=default)
    return specs


def _common_options(scorer: type[Scorer]) -> dict[str, OptionSpec]:
    specs = options_of(CommonOptions)
    if scorer.signed:
        specs["page_reduce"] = replace(specs["page_reduce"], choices=("max", "mean"))
    return specs


def pair_problem(scorer: str, budgets: str) -> str | None:
    """Why a scorer and budgets make no sense together, as one sentence; None if they do."""
    rated = scorer_class(scorer)
    if can_compare(rated, budgets):
        return None
    return (
        f"scorer {scorer!r} cannot be combined with budgets {budgets!r}, because "
        f"{rated.scope_reason}"
    )
