"""What the user asked for: one frozen, hashable object, parsed and validated here.

Its import loads the standard library only, and so does the refusal of an unknown method: command
lines name the right one at once. Making a setting loads its scorer's class, and so torch.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_kvcompress.memory import Geometry, Retention, Schedule, shared_geometry
from vllm_kvcompress.memory.one_shot import OneShot
from vllm_kvcompress.policies.builtin import budgets_class
from vllm_kvcompress.policies.common_options import SETTINGS
from vllm_kvcompress.policies.method_options import option_specs, pair_problem
from vllm_kvcompress.policies.options import OptionSpec, options_of
from vllm_kvcompress.policies.recipes import BUDGETS, RECIPES, Recipe
from vllm_kvcompress.policies.registry import BrokenScorerError, find_recipe, method_names

DEFAULT_METHOD = "span"
DEFAULT_BUDGET = 2048
# Tokens per block by vLLM's platform. vLLM's own 128 on a CPU are too coarse for pages per head.
DEFAULT_BLOCK_SIZE = {"CPU": 32, "CUDA": 16}
# Whole pages per head below which answers are lost: docs/quality.md, ablations.
_FEW_PAGES = 4
# A ratio is looked at for prompts of at least so many tokens; shorter ones are hardly worth it.
_LONG_PROMPT = 1024
# Follows an option that only the other of a method's two forms takes, by whether this one is the
# published one.
_OTHER_FORM = {
    False: " (an option of the paper's form: set 'published' to true)",
    True: " (not an option of the paper's form: leave out 'published')",
}


class KVCompressConfigError(ValueError):
    """A KV-compression setting that cannot work; the message is one line for the user."""


@dataclass(frozen=True)
class KVCompressConfig:
    """One validated KV-compression setting.

    Attributes:
        method: one of `policies.registry.method_names`.
        budget: tokens kept per KV head and layer on average, the window included;
            None when `ratio` is given.
        ratio: fraction of each prompt's tokens to remove, in [0, 1); None when `budget`
            is given. 0 removes nothing.
        window: the last prompt tokens, whose queries score the others; always kept, unless the
            method rates them too. None is replaced by the method's own.
        options: (name, value) pairs of the method's options, defaults filled in, sorted.

    Raises:
        KVCompressConfigError: if any value is out of range or the parts contradict.
    """

    method: str
    budget: int | None = None
    ratio: float | None = None
    # Never None once made.
    window: int = None  # type: ignore[assignment]
    options: tuple[tuple[str, Any], ...] = field(default=())

    def __post_init__(self) -> None:
        known = method_names()
        if self.method not in known:
            raise KVCompressConfigError(
                f"unknown KV-compression method {self.method!r}"
                f"{did_you_mean(self.method, known)}; known: {', '.join(known)}"
            )
        _recipe(self.method)
        if self.budget is not None and self.ratio is not None:
            raise KVCompressConfigError(
                f"KV-compression budget ({self.budget}) and ratio ({self.ratio}) "
                "exclude each other; give one"
            )
        if self.budget is None and self.ratio is None:
            object.__setattr__(self, "budget", DEFAULT_BUDGET)
        if self.budget is not None:
            object.__setattr__(self, "budget", _as_int("budget", self.budget, minimum=1))
        if self.ratio is not None:
            object.__setattr__(self, "ratio", _as_ratio(self.ratio))
        window = self.recipe.window if self.window is None else self.window
        object.__setattr__(self, "window", _as_int("window", window, minimum=1))
        object.__setattr__(self, "options", _fill_options(self.recipe, dict(self.options)))

    @property
    def recipe(self) -> Recipe:
        """The scorer and budgets that `method` names.

        With the paper's defaults if the option `published` is set.
        """
        recipe = _recipe(self.method)
        return recipe.as_published() if dict(self.options).get("published") is True else recipe

    @property
    def granularity(self) -> str:
        """'page' (whole pages are kept or evicted) or 'token' (kept tokens are gathered)."""
        return self.option("granularity")

    @property
    def layers_compete(self) -> bool:
        """Whether the heads of all layers compete for pages; else each layer has its own."""
        return budgets_class(self.option("budgets")).scope == "model"

    @property
    def num_scores(self) -> int:
        """Scores by either of which a token may be kept: 1, or 2 as in `LayerScores`."""
        return 2 if "first_stage" in dict(self.options) else 1

    @property
    def recent_tokens(self) -> int:
        """Tokens before the compaction point that are kept in any case."""
        return min(self.window, dict(self.options).get("recent_tokens", self.window))

    @functools.cached_property
    def retention(self) -> Retention:
        """How many tokens are kept."""
        return Retention(self.window, self.recent_tokens, self.budget, self.ratio)

    @functools.cached_property
    def schedule(self) -> Schedule:
        """When a request is compacted."""
        return Schedule(self.option("suffix_tokens"))

    @functools.cached_property
    def one_shot(self) -> OneShot:
        """Which prompts may be computed without blocks for what they evict."""
        return OneShot(
            when=self.option("one_shot"),
            layers_compete=self.layers_compete,
            num_scores=self.num_scores,
            keeps_tokens=self.granularity == "token",
            ratio=self.ratio,
        )

    def geometry(self, block_size: int) -> Geometry:
        """Geometry of requests under this setting.

        Args:
            block_size: tokens per vLLM block (= per page).

        Raises:
            KVCompressConfigError: as `check_block_size`.
        """
        self.check_block_size(block_size)
        return shared_geometry(self.retention, self.schedule, block_size)

    def option(self, name: str) -> Any:
        """The value of one option of this method; KeyError if it has no such option."""
        return dict(self.options)[name]

    def check_block_size(self, block_size: int) -> None:
        """Raise KVCompressConfigError if the budget cannot hold what is always kept and one page.

        Args:
            block_size: tokens per vLLM block (= per page).
        """
        problem = self.retention.problem(block_size)
        if problem is not None:
            raise KVCompressConfigError(problem)

    def few_pages_advice(self, block_size: int) -> str | None:
        """What to set where heads keep so few whole pages that answers are lost; None if not.

        Args:
            block_size: tokens per vLLM block (= per page).
        """
        if self.granularity == "token" or self.ratio == 0:
            return None
        kept = self.budget
        if self.ratio is not None:
            kept = round((1 - self.ratio) * _LONG_PROMPT)
        assert kept is not None
        beside = kept - self.recent_tokens
        if beside >= _FEW_PAGES * block_size:
            return None
        of = "" if self.ratio is None else f" of {_LONG_PROMPT} tokens"
        ways = ["keep more"]
        if block_size > 16:
            ways.append("make pages smaller (--block-size 16)")
        if self.recipe.defaults.get("granularity") == "token":
            ways.append("keep single tokens (option granularity 'token')")
        return (
            f"of a prompt{of} each head keeps {beside} tokens beside the window, less than "
            f"{_FEW_PAGES} whole pages of {block_size}; so few pages lose facts: "
            f"{' or '.join(ways)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The plain mapping that `from_dict` reads back to an equal object."""
        out: dict[str, Any] = {"method": self.method, "window": self.window}
        if self.ratio is not None:
            out["ratio"] = self.ratio
        else:
            out["budget"] = self.budget
        out["options"] = dict(self.options)
        return out

    @classmethod
    def from_dict(cls, raw: Any) -> KVCompressConfig:
        """Parse what stands under `additional_config["kv_compress"]`.

        Args:
            raw: a mapping with the keys method, budget, ratio, window, options, all of them
                optional; any other key is taken as an option of the method (so options may be
                flat or nested). True stands for an empty mapping, a string for a method.

        Raises:
            KVCompressConfigError: on a wrong type or an unknown key.
        """
        settings = as_settings(raw)
        if settings is None:
            raise KVCompressConfigError(_not_a_setting(raw))
        method = DEFAULT_METHOD if settings.get("method") is None else settings["method"]
        if not isinstance(method, str):
            raise KVCompressConfigError(f"kv_compress method must be a name, got {method!r}")
        options = {} if settings.get("options") is None else settings["options"]
        if not isinstance(options, Mapping):
            raise KVCompressConfigError(f"kv_compress options must be a mapping, got {options!r}")
        flat = {key: value for key, value in settings.items() if key not in SETTINGS}
        _check_keys(method, (*flat, *options))
        for key in flat.keys() & options.keys():
            if flat[key] != options[key]:
                raise KVCompressConfigError(
                    f"kv_compress option {key!r} is given twice: {flat[key]!r} and "
                    f"{options[key]!r}; give one"
                )
        window: Any = settings.get("window")
        return cls(
            method=method,
            budget=settings.get("budget"),
            ratio=settings.get("ratio"),
            window=window,
            options=tuple(sorted({**options, **flat}.items())),
        )


def as_settings(raw: Any) -> dict[str, Any] | None:
    """A setting as a mapping of its own: True is an empty one, a string names the method.

    Returns:
        The mapping; None for None and False, which ask for no compression.

    Raises:
        KVCompressConfigError: if it is anything else.
    """
    if raw is None or raw is False:
        return None
    if raw is True:
        return {}
    if isinstance(raw, str):
        return {"method": raw}
    _check_mapping(raw)
    return dict(raw)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest of the known words as a question in brackets; empty if none is near."""
    near = nearest(word, known)
    return "" if near is None else f" (did you mean {near!r}?)"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like this one; case, '-' and '_' do not count. None if none is near."""
    plain = {_plain(name): name for name in known}
    found = difflib.get_close_matches(_plain(word), plain, n=1, cutoff=0.65)
    return plain[found[0]] if found else None


def is_misspelt_setting(key: Any) -> bool:
    """Whether a key or keyword can only be meant for us, although it is not `kv_compress`."""
    if not isinstance(key, str) or key == "kv_compress":
        return False
    plain = _plain(key)
    # A key "compress" may be another plugin's.
    is_near = plain.startswith("k") and nearest(key, ("kv_compress",)) is not None
    return is_near or plain.startswith("kvcompres")


def _plain(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")


def _check_keys(method: str, keys: Iterable[Any]) -> None:
    """Refuse keys that are no names, and misspelt ones of `SETTINGS`.

    Without this the latter would be unknown options, of a method that nobody named.
    """
    recipes = [*RECIPES.values()]
    if method in method_names() and method not in RECIPES:
        recipes.append(_recipe(method))
    options = {name for recipe in recipes for name in option_specs(recipe)}
    options.update(name for budgets in BUDGETS for name in options_of(budgets_class(budgets)))
    for key in keys:
        if not isinstance(key, str):
            raise KVCompressConfigError(f"kv_compress keys must be names, got {key!r}")
        near = nearest(key, (*SETTINGS, *sorted(options)))
        if key not in options and near in SETTINGS:
            raise KVCompressConfigError(
                f"unknown key {key!r} in kv_compress; did you mean {near!r}?"
            )


def _recipe(method: str) -> Recipe:
    """The recipe of a known method.

    Raises:
        KVCompressConfigError: if another package brings it, and its scorer cannot be used.
    """
    try:
        return find_recipe(method)
    except BrokenScorerError as error:
        raise KVCompressConfigError(f"KV-compression {error}") from error


def join_settings(configured: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Join what stands in additional_config with flags or keyword arguments given beside it.

    Raises:
        KVCompressConfigError: if the two contradict, or one is no setting.
    """
    if configured is False:
        raise KVCompressConfigError(
            "kv_compress is false in additional_config, but a setting is given beside it; drop one "
            "of them"
        )
    return merge_settings(as_settings(configured) or {}, given)


def merge_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Join two partial kv_compress mappings (flags and --additional-config).

    Raises:
        KVCompressConfigError: if one is no mapping, or both name a key with different values.
    """
    _check_mapping(first)
    _check_mapping(second)
    merged = dict(first)
    for key, value in second.items():
        both_map = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        if key == "options" and both_map:
            merged[key] = merge_settings(merged[key], value)
        elif key in merged and merged[key] != value:
            raise KVCompressConfigError(
                f"KV-compression {key} is given twice: {merged[key]!r} and {value!r}; give one"
            )
        else:
            merged[key] = value
    return merged


def _check_mapping(raw: Any) -> None:
    if not isinstance(raw, Mapping):
        raise KVCompressConfigError(_not_a_setting(raw))


def _not_a_setting(raw: Any) -> str:
    return (
        f"kv_compress must be a mapping, a method's name or true, got {type(raw).__name__} {raw!r}"
    )


def parse_options_json(text: str) -> dict[str, Any]:
    """The mapping in a --kv-compress-options argument.

    Raises:
        KVCompressConfigError: if `text` is not a JSON object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise KVCompressConfigError(
            f"KV-compression options are not valid JSON ({error.msg} at character "
            f"{error.pos}): {text!r}"
        ) from None
    if not isinstance(value, dict):
        raise KVCompressConfigError(f"KV-compression options must be a JSON object, got {text!r}")
    return value


def _as_int(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise KVCompressConfigError(
            f"KV-compression {name} must be a whole number >= {minimum}, got {value!r}"
        )
    return value


def _as_ratio(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise KVCompressConfigError(
            f"KV-compression ratio must be in [0, 1) (fraction removed), got {value!r}"
        )
    return float(value)


def _fill_options(recipe: Recipe, given: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """All options of a method, in the order of their names."""
    budgets = given.get("budgets", recipe.budgets)
    specs = option_specs(recipe)
    problem = specs["budgets"].problem(budgets)
    if problem:
        raise KVCompressConfigError(f"KV-compression option 'budgets' {problem}, got {budgets!r}")
    problem = pair_problem(recipe.scorer, budgets)
    if problem:
        raise KVCompressConfigError(f"KV-compression method {recipe.name!r}: {problem}")
    specs = option_specs(recipe, budgets)
    _check_names(recipe, budgets, given, specs)
    values = {name: spec.default for name, spec in specs.items()}
    for name, value in given.items():
        spec = specs[name]
        problem = spec.problem(value)
        if problem:
            raise KVCompressConfigError(f"KV-compression option {name!r} {problem}, got {value!r}")
        values[name] = spec.parse(value) if spec.parse else value
    for name, value in values.items():
        if value is None:
            raise KVCompressConfigError(
                f"KV-compression budgets {budgets!r} need the option {name!r}"
            )
    return tuple(sorted(values.items()))


def _check_names(
    recipe: Recipe, budgets: str, given: Iterable[str], specs: Mapping[str, OptionSpec]
) -> None:
    """Refuse options that a method does not take."""
    unknown = sorted(set(given) - set(specs))
    if not unknown:
        return
    own = find_recipe(recipe.name)
    is_published = recipe is not own
    others = option_specs(own if is_published else own.as_published(), budgets)
    hints = {name: _OTHER_FORM[is_published] for name in others}
    known = (*specs, *SETTINGS, *others)
    named = ", ".join(f"{name!r}{hints.get(name) or did_you_mean(name, known)}" for name in unknown)
    raise KVCompressConfigError(
        f"unknown option {named} for KV-compression method "
        f"{recipe.name!r} with budgets {budgets!r}; it takes: {', '.join(sorted(specs))}"
    )
