"""Options that methods have in common, whatever their scorer and budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_kvcompress.policies.builtin import budgets_class
from vllm_kvcompress.policies.options import option
from vllm_kvcompress.policies.recipes import BUDGETS, SCOPES

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


def can_compare(scorer: type[Scorer], budgets: str) -> bool:
    """Whether a scorer's scores can be compared as far as budgets do."""
    return SCOPES.index(budgets_class(budgets).scope) <= SCOPES.index(scorer.scope)
