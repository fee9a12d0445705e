"""`vllm-kvcompress plan`: the command line of `planning`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from typing import Any

from vllm_kvcompress.cli import report
from vllm_kvcompress.cli.planning import make_plan
from vllm_kvcompress.cli.sizes import parse_size
from vllm_kvcompress.config import DEFAULT_BLOCK_SIZE, KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.flags import add_flags, merge_flags
from vllm_kvcompress.memory.page_format import ELEMENT_BYTES


def add_parser(commands: Any) -> None:
    """Add the subcommand to an argparse subparsers object."""
    parser = commands.add_parser(
        "plan",
        help="what a setting keeps, its memory per request, and how many fit a pool",
        description="What a setting keeps and costs. Reads the model's config only; starts no "
        "engine.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder with config.json, or hub name")
    add_flags(parser)
    parser.add_argument(
        "--prompt-len",
        type=_whole("prompt length", 1),
        nargs="+",
        required=True,
        metavar="TOKENS",
        help="length of each prompt to plan for",
    )
    parser.add_argument(
        "--output-len",
        type=_whole("output length", 0),
        default=256,
        metavar="TOKENS",
        help="tokens generated after each prompt (default 256)",
    )
    parser.add_argument(
        "--block-size",
        type=_whole("block size", 1),
        metavar="TOKENS",
        help="tokens per block and page (default: what an engine of the vLLM installed here takes, "
        + ", ".join(f"{size} on {name}" for name, size in DEFAULT_BLOCK_SIZE.items())
        + ")",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=("auto", *ELEMENT_BYTES),
        help="auto (default): the model's",
    )
    parser.add_argument(
        "--tensor-parallel-size",
        type=_whole("tensor parallel size", 1),
        default=1,
        metavar="RANKS",
        help="all numbers are then those of one rank (default 1)",
    )
    parser.add_argument(
        "--pool",
        type=_size,
        metavar="SIZE",
        help="KV-cache memory of one rank, e.g. 20GiB (= 20G) or 20GB",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--plot", metavar="FILE", help="draw budgets and memory to a PNG file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print (and draw) the plan.

    Raises:
        KVCompressConfigError: if the model or the setting cannot work.
    """
    merge_flags(arguments)
    raw = (getattr(arguments, "additional_config", None) or {}).get("kv_compress")
    if raw is None:
        raise KVCompressConfigError(
            "plan needs --kv-compress or --kv-compress-budget or --kv-compress-ratio"
        )
    plan = make_plan(
        KVCompressConfig.from_dict(raw),
        arguments.model,
        arguments.prompt_len,
        output_len=arguments.output_len,
        block_size=arguments.block_size,
        cache_dtype=arguments.kv_cache_dtype,
        tensor_parallel_size=arguments.tensor_parallel_size,
        pool_bytes=arguments.pool,
    )
    if arguments.plot is not None:
        # Imported here, because it loads matplotlib; before printing, because it can fail.
        from vllm_kvcompress.cli.plot import draw

        draw(plan, arguments.plot)
    print(json.dumps(plan.to_dict(), indent=1) if arguments.json else report.as_text(plan))


def _whole(name: str, minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,18}", text) is None or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"{name} must be a whole number >= {minimum}, got {text!r}"
            )
        return int(text)

    return parse


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
