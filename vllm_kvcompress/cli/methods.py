"""`vllm-kvcompress methods`: every method with its paper and options."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies import scorer_class
from vllm_kvcompress.policies.recipes import (
    BUDGETS,
    RECIPES,
    OptionSpec,
    Recipe,
    option_specs,
    pair_problem,
)

_NEEDS = {
    "window_query": "the queries of the last tokens",
    "value": "the values",
    "output_weight": "the output projection",
    "all_queries": "all queries of the prompt, so compressed prompts get no prefix-cache hits",
    "rotary": "the rotary position encoding",
}


def add_parser(commands: Any) -> None:
    """Add the subcommand to an argparse subparsers object."""
    parser = commands.add_parser("methods", help="list all methods, or one in detail")
    parser.add_argument("name", nargs="?", help="one method, with every option")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the list.

    Raises:
        KVCompressConfigError: if the named method does not exist.
    """
    if arguments.name is not None:
        # Refuses an unknown name with the known ones.
        KVCompressConfig(method=arguments.name)
    recipes = [RECIPES[arguments.name]] if arguments.name else list(RECIPES.values())
    if arguments.json:
        print(json.dumps([_as_dict(recipe) for recipe in recipes], indent=1))
    elif arguments.name:
        print(_details(recipes[0]))
    else:
        print("\n".join(map(_entry, recipes)))
        print("\nBudgets, the option of every method that shares pages among layers and heads:")
        for name, budget in BUDGETS.items():
            print(f"  {name:<12} {budget.summary}{_listed(budget.options)}")
        print("\nvllm-kvcompress methods NAME explains one method's options.")


def _as_dict(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "paper": recipe.paper,
        "scorer": recipe.scorer,
        "budgets": recipe.budgets,
        "needs": sorted(scorer_class(recipe.scorer).needs),
        "refused_budgets": {
            name: problem for name in BUDGETS if (problem := pair_problem(recipe.scorer, name))
        },
        "options": {
            name: {
                "default": spec.default,
                "type": spec.kind.__name__,
                "choices": spec.choices,
                "minimum": spec.minimum,
                "maximum": spec.maximum,
                "help": spec.help,
            }
            for name, spec in option_specs(recipe).items()
        },
    }


def _entry(recipe: Recipe) -> str:
    options = textwrap.fill(
        "options: " + ", ".join(f"{k}={_value(s)}" for k, s in option_specs(recipe).items()),
        width=100,
        initial_indent="    ",
        subsequent_indent="      ",
        break_on_hyphens=False,
    )
    return f"{recipe.name}: {recipe.summary}\n    {recipe.paper}\n{options}"


def _details(recipe: Recipe) -> str:
    lines = [f"{recipe.name}: {recipe.summary}", f"source: {recipe.paper}"]
    needs = [_NEEDS[need] for need in sorted(scorer_class(recipe.scorer).needs)]
    lines.append(f"needs beside keys: {'; '.join(needs) or 'nothing'}")
    for name in BUDGETS:
        problem = pair_problem(recipe.scorer, name)
        if problem:
            lines.append(f"refused: {problem}")
    lines.append("options:")
    for name, spec in option_specs(recipe).items():
        lines.append(f"  {name} = {_value(spec)}: {spec.help}{_range(spec)}")
    return "\n".join(lines)


def _listed(options: dict[str, OptionSpec]) -> str:
    if not options:
        return ""
    return " (" + ", ".join(f"{name}={_value(spec)}" for name, spec in options.items()) + ")"


def _value(spec: OptionSpec) -> str:
    return json.dumps(spec.default).strip('"')


def _range(spec: OptionSpec) -> str:
    if spec.choices is not None and spec.kind is str:
        return f" ({', '.join(map(str, spec.choices))})"
    if spec.choices is not None and spec.kind is int:
        return f" ({spec.choices[0]} to {spec.choices[-1]})"
    if spec.minimum is not None and spec.maximum is not None:
        return f" ({spec.minimum:g} to {spec.maximum:g})"
    if spec.minimum is not None:
        return f" (at least {spec.minimum:g})"
    return ""
