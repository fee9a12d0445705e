"""The `vllm-kvcompress` command: what methods there are, and what a setting costs and saves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm_kvcompress.cli import methods, plan
from vllm_kvcompress.config import KVCompressConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (2 for a setting that cannot work)."""
    parser = argparse.ArgumentParser(
        prog="vllm-kvcompress", description="KV-cache compression for stock vLLM."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (methods, plan):
        command.add_parser(commands)
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except KVCompressConfigError as error:
        print(f"vllm-kvcompress: {error}", file=sys.stderr)
        return 2
    return 0
