"""Finds methods, scorers and budgets by name: those of this package and of others.

Another package brings a scorer by an entry point of the group `vllm_kvcompress.scorers`, whose
name is the scorer's and its method's. Names are known without an import; a class is imported when
its method is asked for. So a scorer that cannot be imported harms nobody who does not name it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from vllm_kvcompress.policies.builtin import budgets_class, load_class
from vllm_kvcompress.policies.options import make_part
from vllm_kvcompress.policies.recipes import RECIPES, SCORERS, Recipe
from vllm_kvcompress.policies.setting import Setting

if TYPE_CHECKING:
    from vllm_kvcompress.policies.base import Scorer
    from vllm_kvcompress.policies.budgets.base import Budgets

ENTRY_POINT_GROUP = "vllm_kvcompress.scorers"


class BrokenScorerError(ValueError):
    """A scorer of another package that cannot be used; the message is one line for the user."""


@functools.cache
def _entry_points() -> dict[str, tuple[EntryPoint, ...]]:
    """The group's entry points by name; one name may have several."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=package_of):
        found[entry_point.name] = (*found.get(entry_point.name, ()), entry_point)
    return found


def package_of(entry_point: EntryPoint) -> str:
    """Name and version of the package that brings an entry point."""
    dist = entry_point.dist
    return "an unknown package" if dist is None else f"{dist.name} {dist.version}"


def outside_packages() -> dict[str, str]:
    """Names of methods that other packages bring, and who brings them. Imports none of them."""
    return {
        name: _packages(found)
        for name, found in sorted(_entry_points().items())
        if not _is_ours(name)
    }


def clashes() -> dict[str, str]:
    """Names of entry points that go unused because this package has them; a line on each."""
    return {
        name: f"scorer {name!r} of {_packages(found)} is not used: vllm-kvcompress has that name"
        for name, found in sorted(_entry_points().items())
        if _is_ours(name)
    }


def _packages(found: Sequence[EntryPoint]) -> str:
    return " and ".join(map(package_of, found))


def _is_ours(name: str) -> bool:
    return name in RECIPES or name in SCORERS


def method_names() -> tuple[str, ...]:
    """Every method that the user can name, this package's first. Imports no scorer."""
    return (*RECIPES, *outside_packages())


@functools.cache
def find_recipe(name: str) -> Recipe:
    """The recipe of a method.

    Raises:
        KeyError: if there is no such method.
        BrokenScorerError: if another package brings it, and its scorer cannot be used.
    """
    if name in RECIPES:
        return RECIPES[name]
    scorer = scorer_class(name)
    package = outside_packages()[name]
    return Recipe(
        name,
        scorer=name,
        budgets=scorer.budgets,
        summary=" ".join((scorer.summary or _first_line(scorer)).split()),
        paper=scorer.source or package,
        defaults={"granularity": scorer.granularity},
        window=scorer.window,
        weakness=scorer.weakness,
        package=package,
    )


def _first_line(scorer: type[Scorer]) -> str:
    return (scorer.__doc__ or "").strip().partition("\n")[0].strip().rstrip(".")


def scorer_class(name: str) -> type[Scorer]:
    """The class of a scorer, by a key of `recipes.SCORERS` or the name of an entry point.

    Raises:
        KeyError: if there is no such scorer.
        BrokenScorerError: if another package brings it, and it cannot be used.
    """
    if name in SCORERS:
        return load_class("scorers", SCORERS[name])
    if name in RECIPES:
        raise KeyError(name)
    return _outside_scorer(name)


@functools.cache
def _outside_scorer(name: str) -> type[Scorer]:
    # First, because it fails without torch, which is no fault of the other package.
    from vllm_kvcompress.policies.scorer_checks import scorer_problem

    entry_point, *others = _entry_points()[name]
    package = package_of(entry_point)
    if others:
        raise BrokenScorerError(
            f"scorer {name!r} is brought by {outside_packages()[name]}; uninstall all but one"
        )
    try:
        scorer = entry_point.load()
    # Whatever another package does at its import, the user is told whose fault it is.
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BrokenScorerError(
            f"scorer {name!r} of {package} cannot be imported from {entry_point.value!r} ({reason})"
        ) from error
    problem = scorer_problem(scorer)
    if problem:
        raise BrokenScorerError(
            f"scorer {name!r} of {package} cannot be used: {entry_point.value!r} {problem}"
        )
    return scorer


def make_scorer(setting: Setting) -> Scorer:
    """The scorer that a setting's method names, with its options set."""
    return make_part(scorer_class(setting.recipe.scorer), dict(setting.options))


def make_budgets(setting: Setting) -> Budgets:
    """The budgets of a setting, with their options set."""
    return make_part(budgets_class(setting.option("budgets")), dict(setting.options))
