"""Named methods: which scorer, which budgets, which options.

Standard library only; the scorers themselves live in the neighbouring files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

GRANULARITIES = ("page", "token")
# What competes with what, in growing order: a scorer names how far its scores can be compared,
# a budget how far it compares them.
SCOPES = ("head", "layer", "model")


@dataclass(frozen=True)
class OptionSpec:
    """One option of a method: its default, allowed type and values.

    Attributes:
        default: value when the user gives none.
        kind: type that a value must have (an int passes for float, a bool never for int).
        help: one line for the user.
        choices: allowed values, or None for any.
        minimum, maximum: inclusive bounds of a number, or None.
        parse: turns a given value into what is stored, raising ValueError with the problem in
            words; replaces all other checks.
    """

    default: Any
    kind: type
    help: str
    choices: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    parse: Callable[[Any], Any] | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, as words to follow the option's name; None if fine."""
        if self.parse is not None:
            try:
                self.parse(value)
            except ValueError as error:
                return str(error)
            return None
        if self.kind is float:
            right_type = isinstance(value, int | float) and not isinstance(value, bool)
        elif self.kind is int:
            right_type = isinstance(value, int) and not isinstance(value, bool)
        else:
            right_type = isinstance(value, self.kind)
        if not right_type:
            return f"must be of type {self.kind.__name__}"
        if self.kind is float and not abs(value) <= sys.float_info.max:
            return "must be finite"
        if self.choices is not None and value not in self.choices:
            return f"must be one of {', '.join(map(str, self.choices))}"
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {self.maximum}"
        return None


@dataclass(frozen=True)
class ScorerInfo:
    """What the rest of the package must know of a scorer without loading torch.

    Attributes:
        options: its options by name.
        scope: how far its scores can be compared, of `SCOPES`.
        why: the reason, where the scope is not the whole model; follows "because".
        signed: whether scores can be negative, so that their squares mean nothing.
        scores_window: whether tokens of the window are rated too, so that they can be evicted.
    """

    options: dict[str, OptionSpec]
    scope: str = "model"
    why: str = ""
    signed: bool = False
    scores_window: bool = False


@dataclass(frozen=True)
class BudgetInfo:
    """One way to share a request's pages among layers and heads.

    Attributes:
        options: its options by name.
        scope: how far it compares scores, of `SCOPES`.
        summary: one line for the user.
    """

    options: dict[str, OptionSpec]
    scope: str
    summary: str


@dataclass(frozen=True)
class Form:
    """A recipe as its paper has it.

    Attributes:
        scorer: key into `SCORERS`.
        defaults: option defaults that differ from those of the recipe's parts.
        window: default of the setting `window`, tokens.
    """

    scorer: str
    defaults: Mapping[str, Any]
    window: int = 32


@dataclass(frozen=True)
class Recipe:
    """A method the user can name.

    Attributes:
        name: the name on the flag.
        scorer: key into `SCORERS`.
        budgets: key into `BUDGETS`; the option 'budgets' overrides it.
        summary: one line for the user.
        paper: where the method comes from.
        defaults: option defaults of this recipe that differ from its parts' own.
        window: default of the setting `window`, tokens.
        weakness: what its answers lack by its nature, whatever its options, to follow "it"; empty
            if nothing that is known.
        published: the paper's scorer and defaults, which the option 'published' asks for; None
            where they are the recipe's own.
    """

    name: str
    scorer: str
    budgets: str
    summary: str
    paper: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    window: int = 32
    published: Form | None = None
    weakness: str = ""

    def as_published(self) -> Recipe:
        """The same method with its paper's scorer and defaults; itself where they are its own."""
        form = self.published
        if form is None:
            return self
        defaults = {**form.defaults, "published": True}
        return replace(self, scorer=form.scorer, defaults=defaults, window=form.window)


def _flag(default: bool, help: str) -> OptionSpec:
    return OptionSpec(default, bool, help, (True, False))


def _share(default: float, help: str) -> OptionSpec:
    return OptionSpec(default, float, help, minimum=0.0, maximum=1.0)


def _kernel(default: int, help: str) -> OptionSpec:
    return OptionSpec(default, int, help + ", odd; 1 = none", tuple(range(1, 64, 2)))


def _table(value: Any) -> tuple[Any, ...]:
    """A static budget table as nested tuples; a string names a JSON file that holds it."""
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


_WINDOW_ATTENTION = {
    "pool_kernel": _kernel(7, "width of the pooling along keys"),
    "pool_kind": OptionSpec("max", str, "pooling along keys", ("max", "avg")),
    "window_reduce": OptionSpec(
        "mean", str, "how the window's queries are joined", ("mean", "sum", "max")
    ),
    "group_reduce": OptionSpec(
        "mean", str, "how the query heads of one KV head are joined", ("mean", "sum", "max")
    ),
    "score_power": OptionSpec(1, int, "1 = attention, 2 = squared attention", (1, 2)),
    "pool_first": _flag(True, "pool each query head before they are joined (else after)"),
}
_SPAN = {
    "pool_kernel": _kernel(5, "width of the mean pooling along keys"),
    "value_norm": _flag(True, "weigh by what the values do to the layer's output"),
    "span_kernel": _kernel(11, "width of the last max pooling, so that facts stay whole"),
    "near_tokens": OptionSpec(
        8, int, "keys up to a query's own that do not count for it", minimum=1
    ),
}
_LAST_POOLING = {"span_kernel": _kernel(1, "width of a last max pooling")}
_CHUNK = {
    "chunk_length": OptionSpec(10, int, "tokens per chunk", minimum=1),
    "reuse_layers": OptionSpec(2, int, "layers that share the first one's choice", minimum=1),
}
_EVERY_HEAD_ALIKE = "it scores all heads of a layer alike, so they cannot compete"

SCORERS: dict[str, ScorerInfo] = {
    "snapkv": ScorerInfo(_WINDOW_ATTENTION),
    "defensive": ScorerInfo(
        {
            "pool_kernel": _kernel(5, "width of the mean pooling along keys"),
            "value_norm": _flag(True, "weigh by the norm of the projected values"),
            "mass_first": _share(0.0, "attention mass whose tokens come first; the paper: 0.9"),
        }
    ),
    "span": ScorerInfo(_SPAN, scores_window=True),
    "span-keydiff": ScorerInfo(
        {
            **_SPAN,
            "keydiff_kernel": _kernel(5, "width of the max pooling of KeyDiff scores"),
            "first_stage": _share(0.25, "share of a head's budget filled by attention"),
        },
        scores_window=True,
    ),
    "critical": ScorerInfo(
        {
            **_WINDOW_ATTENTION,
            "epsilon": OptionSpec(1e-4, float, "added to scores before weighing", minimum=0.0),
            "first_stage": _share(0.5, "share of a head's budget filled by attention alone"),
        }
    ),
    "expected-attention": ScorerInfo(
        {
            "num_future": OptionSpec(512, int, "future positions to average over", minimum=1),
            "num_sinks": OptionSpec(4, int, "first tokens always kept", minimum=0),
            "covariance": _flag(True, "use the queries' covariance, not their mean alone"),
            "value_norm": _flag(True, "weigh by the norm of the values"),
            "epsilon": OptionSpec(0.0, float, "added to scores before weighing", minimum=0.0),
        }
    ),
    "h2o": ScorerInfo(
        {
            "recent": _share(0.5, "share of the kept tokens that are simply the latest"),
            "normalize": _flag(False, "divide by the number of queries that saw the token"),
        }
    ),
    "tova": ScorerInfo(_LAST_POOLING, "head", _EVERY_HEAD_ALIKE),
    "keydiff": ScorerInfo(_LAST_POOLING, signed=True),
    "knorm": ScorerInfo(
        {}, "layer", "key norms of different layers have different scales", signed=True
    ),
    "streamingllm": ScorerInfo(
        {"num_sinks": OptionSpec(4, int, "first tokens always kept", minimum=0)},
        "head",
        _EVERY_HEAD_ALIKE,
    ),
    "chunkkv": ScorerInfo(_CHUNK, "head", _EVERY_HEAD_ALIKE),
    "random": ScorerInfo(
        {"seed": OptionSpec(0, int, "seed of the scores", minimum=0, maximum=2**32 - 1)}
    ),
}

_BETA = OptionSpec(2.0, float, "last layer's share is base/beta; 1 = uniform", minimum=1.0)
_ALPHA = _share(0.2, "share of the mean budget guaranteed to each head")
BUDGETS: dict[str, BudgetInfo] = {
    "uniform": BudgetInfo({}, "head", "the same for every layer and head"),
    "pyramid": BudgetInfo({"beta": _BETA}, "head", "falls linearly from the first to last layer"),
    "ada": BudgetInfo({"alpha": _ALPHA}, "layer", "heads of a layer compete"),
    "ada-pyramid": BudgetInfo(
        {"alpha": _ALPHA, "beta": _BETA}, "layer", "pyramid over layers, heads compete"
    ),
    "joint": BudgetInfo(
        {"floor": _share(0.05, "share of the mean budget guaranteed to each head")},
        "model",
        "all heads of all layers compete",
    ),
    "static": BudgetInfo(
        {
            "table": OptionSpec(
                None,
                tuple,
                "weights per layer, or per layer and head; or a JSON file",
                parse=_table,
            )
        },
        "head",
        "fixed weights from a table",
    ),
}

_COMMON = {
    "one_shot": OptionSpec(
        "auto",
        str,
        "no blocks for what a prompt of one step evicts; auto: if there is no room for them",
        ("auto", "always", "never"),
    ),
    "headroom": OptionSpec(
        0.125,
        float,
        "tokens to be generated, per token to compute, before a preemption; 0: let in as vLLM does",
        minimum=0.0,
    ),
    "granularity": OptionSpec(
        "page", str, "keep whole pages, or gather kept tokens into pages", GRANULARITIES
    ),
    "suffix_tokens": OptionSpec(
        0,
        int,
        "experimental: compact this many tokens before the prompt's end, compute the rest after",
        minimum=0,
    ),
}

_ALIKE = "keeps the same tokens in all heads of a layer, so a small share holds few facts"
_BLIND = "does not look at the question, so it loses facts that the question asks for"

# Found better than what the papers have, on two models (docs/quality.md): whoever in the window
# looks at a token counts, facts are widened as a whole, and single tokens fill the pages.
_WORST_CASE = {
    "window_reduce": "max",
    "group_reduce": "max",
    "pool_kernel": 11,
    "granularity": "token",
}
# Where the paper is about budgets, the scores are span's: level with SnapKV's on a 1.5B model, far
# ahead on a 135M one.
_BY_SPAN = {"granularity": "token", "page_reduce": "mean"}
_AS_SNAPKV = Form("snapkv", {"granularity": "token", "beta": 20.0})
_AS_CRITICALKV = replace(_AS_SNAPKV, scorer="critical")

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "snapkv",
            "snapkv",
            "uniform",
            "attention of the last queries, same budget everywhere",
            "SnapKV, arXiv 2404.14469",
            _WORST_CASE,
            window=16,
            published=_AS_SNAPKV,
        ),
        Recipe(
            "pyramidkv",
            "span",
            "pyramid",
            "more budget for low layers, by the scores of span",
            "PyramidKV, arXiv 2406.02069",
            _BY_SPAN,
            window=16,
            published=_AS_SNAPKV,
        ),
        Recipe(
            "ada-snapkv",
            "span",
            "ada",
            "heads of a layer compete for its budget, by the scores of span",
            "Ada-KV, arXiv 2407.11550",
            _BY_SPAN,
            window=16,
            published=_AS_SNAPKV,
        ),
        Recipe(
            "ada-pyramidkv",
            "span",
            "ada-pyramid",
            "PyramidKV schedule, heads of a layer compete by the scores of span",
            "Ada-KV, arXiv 2407.11550",
            _BY_SPAN,
            window=16,
            published=_AS_SNAPKV,
        ),
        Recipe(
            "kvc",
            "snapkv",
            "joint",
            "squared attention, all layers and heads compete",
            "KV-Compress, arXiv 2410.00161",
            # Squares of single tokens let few heads take all: 0.4 of a 135M model's needles.
            {**_WORST_CASE, "score_power": 2, "granularity": "page"},
            window=16,
            published=Form(
                "snapkv",
                {
                    "score_power": 2,
                    "window_reduce": "sum",
                    "group_reduce": "sum",
                    "granularity": "token",
                },
            ),
        ),
        Recipe(
            "defensivekv",
            "defensive",
            "ada",
            "worst case over window and query heads, weighted by value norms",
            "DefensiveKV, arXiv 2510.13334",
            window=16,
            published=Form("defensive", {"mass_first": 0.9, "alpha": 0.0, "granularity": "token"}),
        ),
        Recipe(
            "layer-defensivekv",
            "defensive",
            "joint",
            "DefensiveKV scores, all layers and heads compete",
            "DefensiveKV, arXiv 2510.13334",
            window=16,
            published=Form("defensive", {"mass_first": 0.9, "floor": 0.0, "granularity": "token"}),
        ),
        Recipe(
            "span",
            "span",
            "joint",
            "DefensiveKV scores widened to whole facts, all layers and heads compete",
            "ours, docs/quality.md",
            _BY_SPAN,
            window=16,
        ),
        Recipe(
            "span-keydiff",
            "span-keydiff",
            "joint",
            "span scores share the budget, KeyDiff fills most of it; for questions not yet seen",
            "ours, docs/quality.md",
        ),
        Recipe(
            "criticalkv",
            "critical",
            "uniform",
            "half by attention, half by attention times projected value norm",
            "CriticalKV, arXiv 2502.03805",
            _WORST_CASE,
            window=16,
            published=_AS_CRITICALKV,
        ),
        Recipe(
            "ada-criticalkv",
            "critical",
            "ada",
            "CriticalKV scores, heads of a layer compete",
            "CriticalKV, arXiv 2502.03805",
            _WORST_CASE,
            window=16,
            published=_AS_CRITICALKV,
        ),
        Recipe(
            "expected-attention",
            "expected-attention",
            "uniform",
            "attention that future queries are expected to pay; blind to the question",
            "Expected Attention, arXiv 2510.00636",
            weakness=_BLIND,
        ),
        Recipe(
            "h2o",
            "h2o",
            "uniform",
            "attention summed over all queries, half of the budget for recent tokens",
            "H2O, arXiv 2306.14048",
            weakness="sums up all queries, so it loses facts that only the question asks for",
        ),
        Recipe(
            "tova",
            "tova",
            "uniform",
            "attention of the last query",
            "TOVA, arXiv 2401.06104",
            {"granularity": "token", "span_kernel": 11},
            window=16,
            published=Form("tova", {"granularity": "token"}),
            weakness=_ALIKE,
        ),
        Recipe(
            "chunkkv",
            "chunkkv",
            "uniform",
            "whole chunks by attention, layers share choices",
            "ChunkKV, arXiv 2502.00299",
            {"granularity": "token"},
            window=16,
            published=Form("chunkkv", {"granularity": "token"}),
            weakness=_ALIKE,
        ),
        Recipe(
            "keydiff",
            "keydiff",
            "uniform",
            "keys least like the mean key; blind to the question",
            "KeyDiff, arXiv 2504.15364",
            {"granularity": "token"},
            weakness=_BLIND,
        ),
        Recipe(
            "knorm",
            "knorm",
            "uniform",
            "keys of small L2 norm",
            "L2-norm compression, arXiv 2406.11430",
            weakness=_BLIND,
        ),
        Recipe(
            "streamingllm",
            "streamingllm",
            "uniform",
            "first tokens and the most recent ones",
            "StreamingLLM, arXiv 2309.17453",
            weakness="forgets what stands in the middle of a prompt",
        ),
        Recipe(
            "random",
            "random",
            "uniform",
            "seeded random scores, a control",
            "control",
            weakness="keeps tokens at random, to compare other methods with",
        ),
    )
}


def option_specs(recipe: Recipe, budgets: str | None = None) -> dict[str, OptionSpec]:
    """Every option that `recipe` takes, by name, with the recipe's own defaults.

    Args:
        recipe: the method.
        budgets: key into `BUDGETS`; None = the recipe's own.
    """
    chosen = budgets or recipe.budgets
    page_reductions = ("max", "mean") if SCORERS[recipe.scorer].signed else ("max", "mean", "rms")
    specs = {
        **_COMMON,
        "page_reduce": OptionSpec(
            "max", str, "a page's score from its tokens', with granularity page", page_reductions
        ),
        "budgets": OptionSpec(
            recipe.budgets, str, "how pages are shared among layers and heads", tuple(BUDGETS)
        ),
        **SCORERS[recipe.scorer].options,
        **BUDGETS[chosen].options,
    }
    if recipe.published is not None:
        specs["published"] = _flag(
            False, "take the form of the paper: its scores, window, budgets and single tokens"
        )
    if SCORERS[recipe.scorer].scores_window:
        specs["recent_tokens"] = OptionSpec(
            8, int, "latest tokens that are always kept, at most the window", minimum=1
        )
    for name, default in recipe.defaults.items():
        if name in specs:
            specs[name] = replace(specs[name], default=default)
    return specs


def pair_problem(scorer: str, budgets: str) -> str | None:
    """Why a scorer and a budget make no sense together, as one sentence; None if they do."""
    info = SCORERS[scorer]
    if SCOPES.index(BUDGETS[budgets].scope) <= SCOPES.index(info.scope):
        return None
    return f"scorer {scorer!r} cannot be combined with budgets {budgets!r}, because {info.why}"
