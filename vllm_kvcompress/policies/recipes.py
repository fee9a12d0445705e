"""Named methods: which scorer, which budgets, which options. A manifest, standard library only.

Command lines read it for their help without loading torch. What a scorer or a budget takes and
needs stands in its class; `registry.py` finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# What competes with what, in growing order: a scorer names how far its scores can be compared,
# a budget how far it compares them.
SCOPES = ("head", "layer", "model")

# Name: file in scorers/, class.
SCORERS = {
    "snapkv": "snapkv:SnapKV",
    "defensive": "defensivekv:DefensiveKV",
    "span": "span:Span",
    "span-keydiff": "span_keydiff:SpanKeyDiff",
    "critical": "criticalkv:CriticalKV",
    "expected-attention": "expected_attention:ExpectedAttention",
    "h2o": "h2o:H2O",
    "tova": "tova:TOVA",
    "keydiff": "keydiff:KeyDiff",
    "knorm": "knorm:KNorm",
    "streamingllm": "streamingllm:StreamingLLM",
    "chunkkv": "chunkkv:ChunkKV",
    "random": "random:Random",
}

# Name: file in budgets/, class.
BUDGETS = {
    "uniform": "uniform:Uniform",
    "pyramid": "pyramid:Pyramid",
    "ada": "ada:Ada",
    "ada-pyramid": "ada:AdaPyramid",
    "joint": "joint:Joint",
    "static": "static:Static",
}


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
        package: name and version of the package that brings the method; empty if it is this one.
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
    package: str = ""

    def as_published(self) -> Recipe:
        """The same method with its paper's scorer and defaults; itself where they are its own."""
        form = self.published
        if form is None:
            return self
        defaults = {**form.defaults, "published": True}
        return replace(self, scorer=form.scorer, defaults=defaults, window=form.window)


_ALIKE = "keeps the same tokens in all heads of a layer, so a small share holds few facts"
_BLIND = "does not look at the question, so it loses facts that the question asks for"

# Found better than what the papers have, on two models (docs/quality.md): whoever in the window
# looks at a token counts, facts are widened as a whole, and single tokens fill the pages.
_WORST_CASE = {"window_reduce": "max", "group_reduce": "max", "pool_kernel": 11}
_TOKENS = {"granularity": "token"}
# Where the paper is about budgets, the scores are span's: level with SnapKV's on a 1.5B model, far
# ahead on a 135M one.
_BY_SPAN = {**_TOKENS, "page_reduce": "mean"}
_AS_SNAPKV = Form("snapkv", {**_TOKENS, "beta": 20.0})
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
            _WORST_CASE | _TOKENS,
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
            {**_WORST_CASE, "score_power": 2},
            window=16,
            published=Form(
                "snapkv",
                {**_TOKENS, "score_power": 2, "window_reduce": "sum", "group_reduce": "sum"},
            ),
        ),
        Recipe(
            "defensivekv",
            "defensive",
            "ada",
            "worst case over window and query heads, weighted by value norms",
            "DefensiveKV, arXiv 2510.13334",
            window=16,
            published=Form("defensive", {**_TOKENS, "mass_first": 0.9, "alpha": 0.0}),
        ),
        Recipe(
            "layer-defensivekv",
            "defensive",
            "joint",
            "DefensiveKV scores, all layers and heads compete",
            "DefensiveKV, arXiv 2510.13334",
            window=16,
            published=Form("defensive", {**_TOKENS, "mass_first": 0.9, "floor": 0.0}),
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
            _WORST_CASE | _TOKENS,
            window=16,
            published=_AS_CRITICALKV,
        ),
        Recipe(
            "ada-criticalkv",
            "critical",
            "ada",
            "CriticalKV scores, heads of a layer compete",
            "CriticalKV, arXiv 2502.03805",
            _WORST_CASE | _TOKENS,
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
            {**_TOKENS, "span_kernel": 11},
            window=16,
            published=Form("tova", _TOKENS),
            weakness=_ALIKE,
        ),
        Recipe(
            "chunkkv",
            "chunkkv",
            "uniform",
            "whole chunks by attention, layers share choices",
            "ChunkKV, arXiv 2502.00299",
            _TOKENS,
            window=16,
            published=Form("chunkkv", _TOKENS),
            weakness=_ALIKE,
        ),
        Recipe(
            "keydiff",
            "keydiff",
            "uniform",
            "keys least like the mean key; blind to the question",
            "KeyDiff, arXiv 2504.15364",
            _TOKENS,
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
