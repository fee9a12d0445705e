"""Whether a scorer's class can be used; asked of each that another package brings."""

from __future__ import annotations

import inspect
from typing import Any

from vllm_kvcompress.policies.base import NEEDS, Scorer
from vllm_kvcompress.policies.builtin import budgets_class
from vllm_kvcompress.policies.common_options import (
    GRANULARITIES,
    SETTINGS,
    CommonOptions,
    PublishedOption,
    RecentOption,
    can_compare,
)
from vllm_kvcompress.policies.options import options_of
from vllm_kvcompress.policies.recipes import BUDGETS, SCOPES
from vllm_kvcompress.policies.scorer_trial import trial_problem


def scorer_problem(scorer: Any) -> str | None:
    """What is wrong with a scorer's class, as words to follow its name; None if nothing."""
    if not (isinstance(scorer, type) and issubclass(scorer, Scorer)):
        return "is no subclass of vllm_kvcompress.policies.base.Scorer"
    if inspect.isabstract(scorer):
        return f"does not define {', '.join(sorted(scorer.__abstractmethods__))}"
    problem = _declaration_problem(scorer) or _options_problem(scorer)
    return problem or trial_problem(scorer())


def _declaration_problem(scorer: type[Scorer]) -> str | None:
    """What is wrong with the attributes of a class."""
    names = (
        ("scope", SCOPES),
        ("budgets", tuple(BUDGETS)),
        ("granularity", GRANULARITIES),
    )
    for name, known in names:
        if getattr(scorer, name) not in known:
            return f"has {name} {getattr(scorer, name)!r}, which is none of {', '.join(known)}"
    if not isinstance(scorer.needs, set | frozenset):
        return f"has needs {scorer.needs!r}, which is no frozenset"
    unknown = sorted(scorer.needs - set(NEEDS))
    if unknown:
        return f"needs {', '.join(map(repr, unknown))}, but there is {', '.join(NEEDS)}"
    if ("all_queries" in scorer.needs) != (scorer.observe is not Scorer.observe):
        return "must define observe if it needs 'all_queries', and only then"
    if scorer.scope != SCOPES[-1] and not scorer.scope_reason:
        return f"has scope {scorer.scope!r} and no scope_reason"
    if not can_compare(scorer, scorer.budgets):
        return f"has budgets {scorer.budgets!r}, which compare further than scope {scorer.scope!r}"
    if type(scorer.window) is not int or scorer.window < 1:
        return f"has window {scorer.window!r}, which is no whole number >= 1"
    return None


def _options_problem(scorer: type[Scorer]) -> str | None:
    """What is wrong with the options of a class."""
    try:
        specs = options_of(scorer)
        made = scorer()
    except Exception as error:
        return " ".join(f"cannot be made ({type(error).__name__}: {error})".split())
    taken = {*SETTINGS, *options_of(CommonOptions), *options_of(RecentOption)}
    taken.update(options_of(PublishedOption))
    taken.update(name for budgets in BUDGETS for name in options_of(budgets_class(budgets)))
    for name, spec in specs.items():
        if name in taken:
            return f"has an option {name!r}, which is another setting's name"
        problem = spec.problem(spec.default)
        if problem:
            return f"has an option {name!r} whose default {problem}, got {spec.default!r}"
        if getattr(made, name) != spec.default:
            return f"has an option {name!r} that differs once it is made"
    return None
