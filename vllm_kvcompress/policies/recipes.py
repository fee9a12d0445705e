"""Named methods: which scorer, which layer schedule, which head allocation, which options.

Standard library only; the scorers themselves live in the neighbouring files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

GRANULARITIES = ("page", "token")


@dataclass(frozen=True)
class OptionSpec:
    """One option of a method: its default, allowed type and values.

    Attributes:
        default: value when the user gives none.
        kind: type that a value must have (an int passes for float, a bool never for int).
        choices: allowed values, or None for any.
        minimum, maximum: inclusive bounds of a number, or None.
        help: one line for the user.
    """

    default: Any
    kind: type
    help: str
    choices: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, as words to follow the option's name; None if fine."""
        if self.kind is float:
            right_type = isinstance(value, int | float) and not isinstance(value, bool)
        elif self.kind is int:
            right_type = isinstance(value, int) and not isinstance(value, bool)
        else:
            right_type = isinstance(value, self.kind)
        if not right_type:
            return f"must be of type {self.kind.__name__}"
        if self.kind is float and not math.isfinite(value):
            return "must be finite"
        if self.choices is not None and value not in self.choices:
            return f"must be one of {', '.join(map(str, self.choices))}"
        if self.minimum is not None and value < self.minimum:
            return f"must be at least {self.minimum}"
        if self.maximum is not None and value > self.maximum:
            return f"must be at most {self.maximum}"
        return None


@dataclass(frozen=True)
class Recipe:
    """A method the user can name.

    Attributes:
        name: the name on the flag.
        scorer: key into `SCORER_OPTIONS` and `policies.SCORERS`.
        schedule: how pages are shared among layers, 'uniform' or 'pyramid'.
        allocation: how a layer's pages are shared among its KV heads, 'uniform' or 'ada'.
        summary: one line for the user.
        paper: where the method comes from.
    """

    name: str
    scorer: str
    schedule: str
    allocation: str
    summary: str
    paper: str


_COMMON = {
    "granularity": OptionSpec(
        "page", str, "keep whole pages, or gather kept tokens into pages", GRANULARITIES
    )
}
_SNAPKV = {
    "pool_kernel": OptionSpec(
        7, int, "width of the pooling along keys, odd; 1 = none", tuple(range(1, 64, 2))
    ),
    "pool_kind": OptionSpec("max", str, "pooling along keys", ("max", "avg")),
    "group_reduce": OptionSpec(
        "mean", str, "how the query heads of one KV head are joined", ("mean", "max")
    ),
}
SCORER_OPTIONS: dict[str, dict[str, OptionSpec]] = {
    "snapkv": _SNAPKV,
    "streamingllm": {
        "num_sinks": OptionSpec(4, int, "first tokens always kept", minimum=0),
    },
    "knorm": {},
    "random": {"seed": OptionSpec(0, int, "seed of the scores", minimum=0, maximum=2**32 - 1)},
}
SCHEDULE_OPTIONS: dict[str, dict[str, OptionSpec]] = {
    "uniform": {},
    "pyramid": {
        "beta": OptionSpec(
            20.0, float, "last layer's share is base/beta; 1 = uniform", minimum=1.0
        ),
    },
}
ALLOCATION_OPTIONS: dict[str, dict[str, OptionSpec]] = {
    "uniform": {},
    "ada": {
        "alpha": OptionSpec(
            0.2,
            float,
            "share of the mean budget guaranteed to each head",
            minimum=0.0,
            maximum=1.0,
        ),
    },
}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "snapkv",
            "snapkv",
            "uniform",
            "uniform",
            "attention of the last queries, same budget everywhere",
            "SnapKV, arXiv 2404.14469",
        ),
        Recipe(
            "pyramidkv",
            "snapkv",
            "pyramid",
            "uniform",
            "SnapKV scores, more budget for low layers",
            "PyramidKV, arXiv 2406.02069",
        ),
        Recipe(
            "ada-snapkv",
            "snapkv",
            "uniform",
            "ada",
            "SnapKV scores, heads of a layer compete for its budget",
            "Ada-KV, arXiv 2407.11550",
        ),
        Recipe(
            "ada-pyramidkv",
            "snapkv",
            "pyramid",
            "ada",
            "PyramidKV schedule, heads of a layer compete",
            "Ada-KV, arXiv 2407.11550",
        ),
        Recipe(
            "streamingllm",
            "streamingllm",
            "uniform",
            "uniform",
            "first tokens and the most recent ones",
            "StreamingLLM, arXiv 2309.17453",
        ),
        Recipe(
            "knorm",
            "knorm",
            "uniform",
            "uniform",
            "keys of small L2 norm",
            "L2-norm compression, arXiv 2406.11430",
        ),
        Recipe(
            "random", "random", "uniform", "uniform", "seeded random scores, a control", "control"
        ),
    )
}


def option_specs(recipe: Recipe) -> dict[str, OptionSpec]:
    """Every option that `recipe` takes, by name."""
    return {
        **_COMMON,
        **SCORER_OPTIONS[recipe.scorer],
        **SCHEDULE_OPTIONS[recipe.schedule],
        **ALLOCATION_OPTIONS[recipe.allocation],
    }
