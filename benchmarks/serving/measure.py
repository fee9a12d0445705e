"""Serving throughput and latency of stock vLLM and of this plugin on the same workload.

    python benchmarks/serving/measure.py --model MODEL --out OUT \\
      --variants stock span@0 span@0.875 --inputs 500 2000 --pools 2.5 8

For every cell (prompt length x pool) a server is started for each variant in turn, `--rounds`
times over, in reverse every other time, and vLLM's own load generator sends random prompts to it,
all at once. The pool is given in dense requests (prompt and output) that it can hold, or `auto` for
vLLM's own choice. Variants are `stock`, `stock@BLOCK_SIZE`, or `METHOD[:option=value,...]@REMOVED`;
`span@0` removes nothing.
Ratios are of median output tokens per second, against the first variant of the same cell;
decode_ratio leaves prompts out (see `serving.report.summarise`). Written
to OUT: serving.csv, serving.json, serving.png, and every run's own result in runs.jsonl, from which
an interrupted benchmark goes on.

Random prompts say nothing about quality (docs/quality.md does). Outputs have exactly `--output`
tokens. `--dummy` fills the model with random weights, so that its config and a tokenizer are
enough; the JSON says so.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# This folder's names are too plain for others to find them at the top.
sys.path[:] = [path for path in sys.path if path != str(HERE)]
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "scripts")]

import machine

from serving.report import summarise, write
from serving.server import run_workload, serve
from serving.variants import Variant

# Prompts may come out a few tokens longer than asked for.
SLACK_TOKENS = 32


def pool_tokens(pool: str, request_tokens: int) -> int | None:
    """Tokens in a pool of so many dense requests; None for vLLM's own size."""
    return None if pool == "auto" else math.ceil(float(pool) * request_tokens)


def server_flags(
    arguments: argparse.Namespace, variant: Variant, block_size: int, tokens: int | None
) -> list[str]:
    """Arguments of `vllm serve` for one variant and pool."""
    flags = ["--block-size", str(block_size), "--max-num-seqs", str(arguments.concurrency)]
    flags += ["--seed", "0"]
    if tokens is not None:
        # One block more: vLLM keeps the first as its null block.
        num_blocks = math.ceil(tokens / block_size) + 1
        flags += ["--num-gpu-blocks-override", str(num_blocks)]
    if arguments.dummy:
        flags += ["--load-format", "dummy"]
    if arguments.tokenizer:
        flags += ["--tokenizer", arguments.tokenizer]
    return [*flags, *shlex.split(arguments.serve_args), *variant.flags()]


def cells(arguments: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """(prompt tokens, pool) of everything asked for."""
    for input_len in arguments.inputs:
        for pool in arguments.pools:
            yield input_len, pool


def bench(
    arguments: argparse.Namespace, input_len: int, pool: str, variant: Variant, seed: int
) -> dict[str, Any]:
    """One server, one workload."""
    request_tokens = input_len + arguments.output
    tokens = pool_tokens(pool, request_tokens)
    block_size = variant.block_size or arguments.block_size
    flags = server_flags(arguments, variant, block_size, tokens)
    flags += ["--max-model-len", str(request_tokens + SLACK_TOKENS)]
    work = (input_len, arguments.output, arguments.prompts, seed)
    tokenizer = arguments.tokenizer or arguments.model
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.monotonic()
        with serve(arguments.model, flags, folder / "server.log", arguments.timeout) as server:
            up_s = time.monotonic() - start
            # Kernels are compiled and memory is touched by requests that do not count.
            run_workload(server, arguments.model, tokenizer, input_len, 8, 2, 999, folder)
            result = run_workload(server, arguments.model, tokenizer, *work, folder)
    print(
        f"  {variant.label}: {result['output_throughput']:.1f} output tok/s, "
        f"TPOT {result['median_tpot_ms']:.1f} ms, {result['peak_running']:.0f} running, "
        f"{result['preemptions']:.0f} preemptions; up in {up_s:.0f} s",
        flush=True,
    )
    return {
        "command": machine.command(),
        "input_len": input_len,
        "output_len": arguments.output,
        "pool": pool,
        "pool_tokens": tokens,
        "variant": variant.label,
        "removed": variant.ratio,
        "block_size": block_size,
        "round": seed,
        "result": {
            key: value
            for key, value in result.items()
            if isinstance(value, int | float) or key == "date"
        },
    }


def environment(arguments: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What a reader needs to place the numbers."""
    import torch
    import vllm

    return {
        # Those that OUT's runs are from.
        "commands": list(dict.fromkeys(run["command"] for run in runs)),
        "commit": machine.commit(),
        "weights": "dummy (random)" if arguments.dummy else "real",
        "prompts": arguments.prompts,
        "concurrency": arguments.concurrency,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        **machine.device(),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or name")
    parser.add_argument("--tokenizer", help="folder or name, where it is not the model's")
    parser.add_argument("--dummy", action="store_true", help="random weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", type=Variant.parse, required=True)
    parser.add_argument("--inputs", nargs="+", type=int, default=[500, 2000, 6000, 16000, 32000])
    parser.add_argument("--output", type=int, default=500, help="tokens per answer")
    parser.add_argument("--pools", nargs="+", default=["auto"], help="dense requests, or auto")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=64, help="max_num_seqs")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve-args", default="", help="further arguments of vllm serve")
    parser.add_argument(
        "--timeout", type=float, default=900.0, help="seconds for a server to start"
    )
    return parser.parse_args()


def main() -> None:
    """See the module."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    store = arguments.out / "runs.jsonl"
    lines = store.read_text().splitlines() if store.exists() else []
    runs = [json.loads(line) for line in lines]
    keys = ("input_len", "pool", "variant", "round")
    done = {tuple(run[key] for key in keys) for run in runs}
    for number in range(arguments.rounds):
        for input_len, pool in cells(arguments):
            print(
                f"round {number}: {input_len} in, {arguments.output} out, pool {pool}", flush=True
            )
            # The place in a round may be worth something, so every other one goes backwards.
            for variant in arguments.variants[:: 1 if number % 2 == 0 else -1]:
                if (input_len, pool, variant.label, number) in done:
                    continue
                runs.append(bench(arguments, input_len, pool, variant, number))
                with store.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
    rows = summarise(runs, arguments.variants[0].label)
    write(rows, environment(arguments, runs), arguments.out, "serving")
    for row in rows:
        print(
            f"{row['input_len']:6} in, pool {row['pool']:>5}  {row['variant']:24} "
            f"{row['output_tok_s']:9.1f} output tok/s = {row['ratio']:.2f} "
            f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f}), "
            f"decoding {row['decode_ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
