"""The `--kv-compress*` flags and how they join `--additional-config`."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm_kvcompress.config import (
    DEFAULT_BUDGET,
    DEFAULT_METHOD,
    KVCompressConfig,
    KVCompressConfigError,
    did_you_mean,
    is_misspelt_setting,
    join_settings,
    nearest,
    parse_options_json,
)
from vllm_kvcompress.policies.common_options import SETTINGS
from vllm_kvcompress.policies.recipes import RECIPES
from vllm_kvcompress.policies.registry import method_names, outside_packages

_FLAGS = (
    "--kv-compress",
    "--kv-compress-budget",
    "--kv-compress-ratio",
    "--kv-compress-window",
    "--kv-compress-options",
)


def add_flags(parser: Any) -> Any:
    """Add our flags to a vLLM engine parser, once; returns the parser."""
    if any(group.title == "KVCompress" for group in parser._action_groups):
        return parser
    group = parser.add_argument_group(
        title="KVCompress",
        description="Per-head paged KV-cache compression (vllm-kvcompress).",
    )
    argument = functools.partial(_argument, parser)
    group.add_argument(
        "--kv-compress",
        dest="kv_compress_method",
        metavar="METHOD",
        nargs="?",
        const=DEFAULT_METHOD,
        default=None,
        type=argument("--kv-compress", _method),
        help="Compress each prompt's KV cache after prefill; without a name by "
        f"{DEFAULT_METHOD}, the best of them in docs/quality.md. " + " ".join(_summaries()),
    )
    # That these exclude each other is said with both values by KVCompressConfig.
    group.add_argument(
        "--kv-compress-budget",
        metavar="TOKENS",
        default=None,
        type=argument("--kv-compress-budget", _checked(int, "budget")),
        help="Tokens kept per KV head and layer on average, the window included "
        f"(default {DEFAULT_BUDGET}). Without --kv-compress the method is {DEFAULT_METHOD}.",
    )
    group.add_argument(
        "--kv-compress-ratio",
        metavar="FRACTION",
        default=None,
        type=argument("--kv-compress-ratio", _checked(float, "ratio")),
        help="Fraction of each prompt's tokens to remove, in [0, 1); instead of a budget.",
    )
    group.add_argument(
        "--kv-compress-window",
        metavar="TOKENS",
        default=None,
        type=argument("--kv-compress-window", _checked(int, "window")),
        help="Last prompt tokens, whose queries score the others; always kept by most methods "
        "(default: the method's own, see `vllm-kvcompress methods`).",
    )
    group.add_argument(
        "--kv-compress-options",
        metavar="JSON",
        default=None,
        type=argument("--kv-compress-options", parse_options_json),
        help="Options of the method as a JSON object, e.g. "
        '\'{"granularity": "token", "pool_kernel": 5}\'.',
    )
    _suggest_flags(parser)
    return parser


def merge_flags(args: argparse.Namespace) -> None:
    """Write the flags into `args.additional_config["kv_compress"]`; idempotent.

    Flags without a method mean the default one.

    Raises:
        KVCompressConfigError: if a flag contradicts `--additional-config`, or they make no
            setting together.
    """
    flags = {key: getattr(args, f"kv_compress_{key}", None) for key in SETTINGS}
    flags = {key: value for key, value in flags.items() if value is not None}
    if not flags:
        return
    additional = dict(getattr(args, "additional_config", None) or {})
    merged = join_settings(additional.get("kv_compress"), flags)
    # Checked as a whole here, so that a bad setting is refused before a model is looked at.
    config = KVCompressConfig.from_dict(merged)
    additional["kv_compress"] = {**merged, "method": config.method}
    args.additional_config = additional


def _argument(parser: Any, flag: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of a flag's value, which ends the program with one line if that cannot work.

    argparse would print the usage before it, which vLLM's commands have up to 100 lines of.
    """

    def parse_argument(text: str) -> Any:
        try:
            value = parse(text)
            _check_given_once(flag, text, parse)
            return value
        except KVCompressConfigError as error:
            parser.exit(2, f"{parser.prog}: error: argument {flag}: {error}\n")

    return parse_argument


def _check_given_once(flag: str, text: str, parse: Callable[[str], Any]) -> None:
    """Refuse a command line that gives a flag two values, of which argparse would take the last.

    The command line itself is looked at, because vLLM puts what a --config file says in front of
    the arguments, where a flag of the command line may well overrule it. A parser that is given
    other arguments than the command line's is none of its business.
    """
    values = _values_given(flag, sys.argv[1:])
    if text in values and any(parse(value) != parse(text) for value in values):
        raise KVCompressConfigError(f"given twice: {' and '.join(map(repr, values))}; give one")


def _values_given(flag: str, arguments: Sequence[str]) -> list[str]:
    values = []
    for i, argument in enumerate(arguments):
        name, is_joined, value = argument.partition("=")
        if _flag_of(name) != flag:
            continue
        if not is_joined:
            following = arguments[i + 1 : i + 2]
            value = following[0] if following and not following[0].startswith("-") else ""
        values.append(value or DEFAULT_METHOD)
    return list(dict.fromkeys(values))


def _flag_of(name: str) -> str | None:
    """Our flag that an argument is; like argparse, takes a beginning that only one has."""
    name = name.replace("_", "-")
    if name in _FLAGS:
        return name
    meant = [flag for flag in _FLAGS if name.startswith("--kv-") and flag.startswith(name)]
    return meant[0] if len(meant) == 1 else None


def _suggest_flags(parser: Any) -> None:
    """Have a parser end the program with one line at an unknown flag that resembles ours.

    vLLM's top-level parser refuses it without a hint, and is out of reach. What it refuses are the
    leftovers of this one.
    """
    parse_known_args = parser.parse_known_args

    def parse_known_flags(*args: Any, **kwargs: Any) -> Any:
        namespace, others = parse_known_args(*args, **kwargs)
        for name in (other.partition("=")[0] for other in others):
            if name.startswith("--") and is_misspelt_setting(name):
                hint = did_you_mean(name, _FLAGS) or f"; there are {', '.join(_FLAGS)}"
                parser.exit(2, f"{parser.prog}: error: unrecognized argument {name}{hint}\n")
        return namespace, others

    parser.parse_known_args = parse_known_flags


def _summaries() -> Iterator[str]:
    """One sentence on each method. Reads none from other packages: that would import them."""
    for recipe in RECIPES.values():
        yield f"{recipe.name}: {recipe.summary} ({recipe.paper})."
    for name, package in outside_packages().items():
        # argparse expands percent signs.
        yield f"{name}: from {package}, see `vllm-kvcompress methods {name}`.".replace("%", "%%")


def _method(text: str) -> str:
    known = method_names()
    if text not in known and (os.sep in text or os.path.exists(text)):
        raise KVCompressConfigError(
            f"{text!r} looks like a model, not a KV-compression method; put MODEL before "
            f"--kv-compress (methods: {', '.join(known)})"
        )
    try:
        return KVCompressConfig(method=text).method
    except KVCompressConfigError as error:
        if nearest(text, known) is not None:
            raise
        raise KVCompressConfigError(
            f"{error}; if it is the model, put MODEL before --kv-compress"
        ) from None


def _checked(kind: Callable[[str], Any], key: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            message = f"KV-compression {key} must be a number, got {text!r}"
            raise KVCompressConfigError(message) from None
        KVCompressConfig(method=next(iter(RECIPES)), **{key: value})
        return value

    return parse
