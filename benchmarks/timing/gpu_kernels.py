"""Time the Triton kernels on a GPU against the memory floor, torch and other libraries.

    python benchmarks/timing/gpu_kernels.py --out kernels.json                 (on a GPU)
    python benchmarks/timing/gpu_kernels.py --count --out counts.json          (anywhere)
    python benchmarks/timing/gpu_kernels.py --dry-run                          (anywhere)

What is timed is what an engine does: a decode step attends in all layers, each with its own pages,
so that the L2 cache is as cold as in a step. It is the replay of one captured graph; `timed` says
'eager' where a call could not be captured. Per-layer times are the step's divided by its layers.

Every row has p20, p50 and p80 in microseconds, the bytes that the work must move, the GB/s reached,
and its share of the bandwidth of a plain copy in the same run, measured before and after. Peers do
the same step on as many kept tokens: torch's SDPA and FlexAttention, and FlashAttention through
vLLM, FlashInfer and xformers on pages; one that is missing, or has no room, is a row that says why.
They come after all cases, when the cases' own pools are gone. `--native` times csrc/cuda beside the
Triton kernels, built for this GPU if it is not installed. What happens to a prompt comes first, the
whole of it before its parts. The JSON is written anew after every row; past `--limit`, counted from
the start of the process, nothing is started. A case that fails has its error as a row, and the exit
status is 1.

`--count` runs nothing: it lists launches and bytes. `--dry-run` runs every line but CUDA's on a
CPU, in Triton's interpreter, with a tiny model; its times say nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
# This folder's names are too plain for others to find them at the top.
sys.path[:] = [path for path in sys.path if path != str(HERE)]
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "scripts")]

# Needs no GPU, and so kernels that load without one.
if {"--count", "--dry-run"} & set(sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"

# First: a limit counts from here.
import torch
from gpu import native
from gpu.peers import PEERS
from gpu.shapes import DRY_SHAPE, ModelShape, read_shapes

from timing.case import Case
from timing.clock import copy_bandwidth
from timing.prompt_cases import prompt_cases
from timing.report import Report, Timer, counted_row
from timing.step_cases import TAIL_TOKENS, decode_case

MODELS = ("Llama-3.1-8B", "Qwen3-8B", "Llama-3.1-70B TP8")
# FlexAttention would be compiled for the CPU.
DRY = {
    "batches": [2],
    "kept": [32],
    "prompts": [128],
    "peers": [name for name in PEERS if name != "torch FlexAttention"],
}


def cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[ModelShape, Case]]:
    """Everything that was asked for, one pool at a time."""
    for shape in arguments.models:
        for prompt_len in arguments.prompts:
            if fits(arguments, shape, 2 * prompt_len, f"a prompt of {prompt_len} tokens"):
                options = (arguments.kept_fraction, device, arguments.native)
                yield from ((shape, case) for case in prompt_cases(shape, prompt_len, *options))
        for batch in arguments.batches:
            for kept in arguments.kept:
                num_tokens = batch * (kept + TAIL_TOKENS)
                if fits(arguments, shape, num_tokens, f"batch {batch} x {kept} tokens"):
                    yield shape, decode_case(shape, batch, kept, device, arguments.peers)


def fits(arguments: argparse.Namespace, shape: ModelShape, num_tokens: int, what: str) -> bool:
    """Whether the pool may be as large as that; says so if not."""
    num_bytes = num_tokens * shape.num_streams * shape.token_bytes
    is_small = num_bytes <= arguments.pool_gib * 2**30
    if not is_small:
        print(f"{shape.name}: {what} is more than the pool, left out")
    return is_small


def of_layers(shape: ModelShape, num_layers: int | None) -> ModelShape:
    """A model of at most so many of its layers, with their share of its parameters."""
    if num_layers is None or num_layers >= shape.num_layers:
        return shape
    num_parameters = shape.num_parameters * num_layers // shape.num_layers
    return replace(shape, num_layers=num_layers, num_parameters=num_parameters)


def parsed_arguments() -> argparse.Namespace:
    """The command line, with `models` as asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = read_shapes()
    parser.add_argument("--shapes", nargs="+", choices=list(shapes), default=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--kept", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--prompts", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--kept-fraction", type=float, default=0.125, help="of a prompt")
    parser.add_argument("--layers", type=int, help="most layers of a model (default: all)")
    parser.add_argument(
        "--pool-gib", type=float, default=32.0, help="largest pool to try; peers take as much again"
    )
    parser.add_argument("--native", action="store_true", help="csrc/cuda too")
    parser.add_argument(
        "--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="of decode attention"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--count", action="store_true", help="bytes and launches only")
    how.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="start nothing after that")
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    arguments = parser.parse_args()
    if arguments.native and (arguments.count or arguments.dry_run):
        parser.error("--native needs a CUDA device: the compiled ops are no Triton kernels")
    if not (arguments.count or arguments.dry_run or torch.cuda.is_available()):
        parser.error("needs a CUDA device (or --count, or --dry-run)")
    arguments.models = [of_layers(shapes[name], arguments.layers) for name in arguments.shapes]
    if arguments.dry_run:
        vars(arguments).update(DRY, models=[DRY_SHAPE])
    return arguments


def count(arguments: argparse.Namespace) -> None:
    """Nothing runs, so nothing is allocated either."""
    report = Report(arguments.out, {})
    for shape, case in cases(arguments, torch.device("meta")):
        report.add(counted_row(shape, case))


def time_all(arguments: argparse.Namespace, device: torch.device) -> int:
    """A copy, all cases and peers until the time is up, and the copy again; 1 if a case failed."""
    timer = Timer(device, arguments.limit)
    measured = {"copy_gb_per_s": timer.copy_gbs, "matmul_tflops": timer.tflops}
    report = Report(arguments.out, {**measured, "limit_s": arguments.limit, **timer.where})
    # Of the peers: the cases' pools do not live on in what is kept here.
    waiting: list[tuple[ModelShape, Case]] = []
    for shape, case in cases(arguments, device):
        if stopped(timer, report, shape, case):
            break
        for row in timer.rows(shape, case):
            report.add(row)
        if case.later:
            waiting.append((shape, case.of_peers()))
        # Its pool goes before the next one comes.
        del case
    for shape, case in waiting:
        if stopped(timer, report, shape, case):
            break
        for row in timer.peer_rows(shape, case):
            report.add(row)
    report.run["copy_gb_per_s_after"] = copy_bandwidth(device)
    print(f"copy {report.run['copy_gb_per_s_after']:.0f} GB/s after all cases")
    report.write()
    return int(any("error" in row for row in report.rows))


def stopped(timer: Timer, report: Report, shape: ModelShape, case: Case) -> bool:
    """Whether the time is up before this case, which the report's run then says."""
    if "stopped_before" in report.run:
        return True
    if timer.is_late:
        print(f"{timer.limit_s:.0f} s are up: what is left is not timed")
        report.run["stopped_before"] = f"{shape.name}, {case.name}, {case.label}"
    return timer.is_late


def main() -> int:
    """See the module."""
    arguments = parsed_arguments()
    if arguments.count:
        count(arguments)
        return 0
    if arguments.native:
        with TemporaryDirectory() as folder:
            native.load_here(Path(folder))
    return time_all(arguments, torch.device("cpu" if arguments.dry_run else "cuda"))


if __name__ == "__main__":
    sys.exit(main())
