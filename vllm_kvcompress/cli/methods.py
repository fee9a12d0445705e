"""`vllm-kvcompress methods`: every method with its paper, needs and options."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from typing import Any

from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies.builtin import budgets_class
from vllm_kvcompress.policies.method_options import option_specs, pair_problem
from vllm_kvcompress.policies.options import OptionSpec, options_of
from vllm_kvcompress.policies.recipes import BUDGETS, RECIPES, Recipe
from vllm_kvcompress.policies.registry import (
    BrokenScorerError,
    clashes,
    find_recipe,
    outside_packages,
    scorer_class,
)

# In words, the members of `policies.base.NEEDS`.
NEEDS = {
    "window_query": "the queries of the prompt's last tokens",
    "value": "the values",
    "output_weight": "the output projection of every layer",
    "output_root": "the output projection of every layer, squared and small",
    "all_queries": "all queries of the prompt: compressed prompts get no prefix-cache hits",
    "rotary": "the rotary position encoding",
}


def add_parser(commands: Any) -> None:
    """Add the subcommand to an argparse subparsers object."""
    parser = commands.add_parser("methods", help="list all methods, or one in detail")
    parser.add_argument("name", nargs="?", help="one method, with every option explained")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the list.

    Raises:
        KVCompressConfigError: if the named method does not exist.
    """
    if arguments.name is None:
        recipes, problems = _all_recipes()
    else:
        # Refuses an unknown name with the known ones.
        KVCompressConfig(method=arguments.name)
        recipes = [find_recipe(arguments.name)]
        problems = [clash for name, clash in clashes().items() if name == arguments.name]
    if arguments.json:
        print(json.dumps([_as_dict(recipe) for recipe in recipes], indent=1))
    elif arguments.name is not None:
        print(_details(recipes[0]))
    else:
        print("\n".join(map(_entry, recipes)))
        print("\nWhat the option 'budgets' can be, and the options that come with it:")
        for name in BUDGETS:
            options = options_of(budgets_class(name))
            added = f" ({_values(options)})" if options else ""
            print(f"  {name:<12} {budgets_class(name).summary}{added}")
        print(
            "\n`vllm-kvcompress methods NAME` explains one method: its options, what it needs, "
            "\nand why it refuses some budgets."
        )
    for problem in problems:
        # JSON is for a program, which takes nothing else from there.
        print(f"\nwarning: {problem}", file=sys.stderr if arguments.json else sys.stdout)


def _all_recipes() -> tuple[list[Recipe], list[str]]:
    """Every method that can be used, and what is wrong with the others, one line each."""
    recipes, problems = list(RECIPES.values()), list(clashes().values())
    for name in outside_packages():
        try:
            recipes.append(find_recipe(name))
        except BrokenScorerError as error:
            problems.append(str(error))
    return recipes, problems


def _as_dict(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "paper": recipe.paper,
        "package": recipe.package,
        "weakness": recipe.weakness,
        "scorer": recipe.scorer,
        "window": recipe.window,
        "needs": sorted(scorer_class(recipe.scorer).needs),
        "budgets": {
            name: {
                "summary": budgets_class(name).summary,
                "refused": pair_problem(recipe.scorer, name),
                "options": _specs_as_dict(options_of(budgets_class(name))),
            }
            for name in BUDGETS
        },
        "options": _specs_as_dict(option_specs(recipe)),
    }


def _specs_as_dict(specs: dict[str, OptionSpec]) -> dict[str, Any]:
    return {
        name: {
            "default": spec.default,
            "type": spec.kind.__name__,
            "choices": spec.choices,
            "minimum": spec.minimum,
            "maximum": spec.maximum,
            "help": spec.help,
        }
        for name, spec in specs.items()
    }


def _entry(recipe: Recipe) -> str:
    lines = [f"{recipe.name}: {recipe.summary}", f"    {_source(recipe)}"]
    lines.append(
        _wrapped(f"window: {recipe.window}; options: {_values(option_specs(recipe))}", "    ")
    )
    if recipe.weakness:
        lines.append(_wrapped(f"it {recipe.weakness}", "    "))
    refused = [name for name in BUDGETS if pair_problem(recipe.scorer, name)]
    if refused:
        lines.append(f"    refuses budgets {', '.join(refused)}")
    return "\n".join(lines)


def _source(recipe: Recipe) -> str:
    """Where a method comes from, and which package brings it if it is another."""
    if recipe.package in ("", recipe.paper):
        return recipe.paper
    return f"{recipe.paper}; from {recipe.package}"


def _details(recipe: Recipe) -> str:
    lines = [f"{recipe.name}: {recipe.summary}", f"source: {_source(recipe)}"]
    needs = [NEEDS[need] for need in sorted(scorer_class(recipe.scorer).needs)]
    lines.append(f"needs beside the keys: {'; '.join(needs) or 'nothing'}")
    lines.append(f"scores: {recipe.scorer}")
    lines.append(f"window: {recipe.window} tokens, unless --kv-compress-window says otherwise")
    if recipe.published is not None:
        form, own = recipe.published, option_specs(recipe)
        specs = option_specs(recipe.as_published())
        values = _values(
            {
                name: spec
                for name, spec in specs.items()
                if name != "published" and (name not in own or own[name].default != spec.default)
            }
        )
        scores = f"scores: {form.scorer}; window: {form.window}"
        lines.append(f"option 'published' set to true: {scores}{values and '; ' + values}")
    if recipe.weakness:
        lines.append(f"it {recipe.weakness}")
    lines += ["", "options (name, type, default):"]
    for name, spec in option_specs(recipe).items():
        lines += _option(name, spec, "  ")
    lines += ["", "budgets:"]
    for name in BUDGETS:
        budgets = budgets_class(name)
        problem = pair_problem(recipe.scorer, name)
        is_own = name == recipe.budgets
        text = f"refused: {problem}" if problem else budgets.summary + " (default)" * is_own
        lines.append(f"  {name:<12} {text}")
        if not problem and not is_own:
            for option, spec in options_of(budgets).items():
                lines += _option(option, spec, " " * 15)
    return "\n".join(lines)


def _option(name: str, spec: OptionSpec, indent: str) -> list[str]:
    # What an option with its own parser takes is said in its help.
    kind = "JSON" if spec.parse is not None else spec.kind.__name__
    default = "must be given" if spec.default is None else _value(spec)
    head = f"{indent}{name:<14} {kind:<5} {default}{_range(spec)}"
    return [head, _wrapped(spec.help, indent + "    ")]


def _values(specs: dict[str, OptionSpec]) -> str:
    return ", ".join(f"{name}={_value(spec)}" for name, spec in specs.items())


def _value(spec: OptionSpec) -> str:
    return json.dumps(spec.default).strip('"')


def _range(spec: OptionSpec) -> str:
    if spec.kind is str and spec.choices is not None:
        return f"  ({', '.join(map(str, spec.choices))})"
    if spec.kind is bool:
        return "  (true, false)"
    if spec.choices is not None:
        return f"  ({spec.choices[0]} to {spec.choices[-1]})"
    if spec.minimum is not None and spec.maximum is not None:
        return f"  ({spec.minimum} to {spec.maximum})"
    if spec.minimum is not None:
        return f"  (at least {spec.minimum})"
    return ""


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(
        text,
        width=100,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_on_hyphens=False,
    )
