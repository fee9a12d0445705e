"""The `vllm-kvcompress` command: what methods there are, and what a setting costs and saves."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vllm_kvcompress.cli import methods, plan
from vllm_kvcompress.config import KVCompressConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print the whole usage first.
        self.exit(2, f"{self.prog}: {message} (--help lists all arguments)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (2, after one line, for what cannot work)."""
    parser = _Parser(prog="vllm-kvcompress", description="KV-cache compression for stock vLLM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (methods, plan):
        command.add_parser(commands)
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
        sys.stdout.flush()
    except KVCompressConfigError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        # vLLM brings both; this package does not ask for them itself.
        if error.name not in ("torch", "transformers"):
            raise
        return _refuse(f"this needs {error.name}, which comes with vLLM")
    except BrokenPipeError:
        # The reader has gone (`| head`); keep Python from flushing into the pipe once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _refuse(problem: str) -> int:
    print(f"vllm-kvcompress: {' '.join(problem.split())}", file=sys.stderr)
    return 2
