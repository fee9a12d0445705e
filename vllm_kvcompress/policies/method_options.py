"""What options a method takes: those of its scorer, of its budgets and of every method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_kvcompress.policies.options import OptionSpec, option, options_of
from vllm_kvcompress.policies.recipes import BUDGETS, SCOPES, Recipe
from vllm_kvcompress.policies.registry import budgets_class, scorer_class

if TYPE_CHECKING:
    from vllm_kvcompress.policies.base import Scorer

GRANULARITIES = ("page", "token")
# What stands beside the options in a setting.
SETTINGS = ("method", "budget", "ratio", "window", "options")


@dataclass(frozen=True)
class CommonOptions:
    """Options of every method."""

    one_shot: str = option(
        "auto",
        "no blocks for what a prompt of one step evicts; auto: if there is no room for them",
        choices=("auto", "always", "never"),
    )
    headroom: float = option(
        0.125,
        "tokens to be generated, per token to compute, before a preemption; 0: let in as vLLM does",
        minimum=0.0,
    )
    granularity: str = option(
        "page", "keep whole pages, or gather kept tokens into pages", choices=GRANULARITIES
    )
    suffix_tokens: int = option(
        0,
        "experimental: compact this many tokens before the prompt's end, compute the rest after",
        minimum=0,
    )
    page_reduce: str = option(
        "max",
        "a page's score from its tokens', with granularity page",
        choices=("max", "mean", "rms"),
    )
    budgets: str = option(
        "uniform", "how pages are shared among layers and heads", choices=tuple(BUDGETS)
    )


@dataclass(frozen=True)
class PublishedOption:
    """Option of a method whose defaults are not its paper's."""

    published: bool = option(
        False, "take the form of the paper: its scores, window, budgets and single tokens"
    )


@dataclass(frozen=True)
class RecentOption:
    """Option of a method that rates the window's tokens too."""

    recent_tokens: int = option(
        8, "latest tokens that are always kept, at most the window", minimum=1
    )


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


def can_compare(scorer: type[Scorer], budgets: str) -> bool:
    """Whether a scorer's scores can be compared as far as budgets do."""
    return SCOPES.index(budgets_class(budgets).scope) <= SCOPES.index(scorer.scope)
