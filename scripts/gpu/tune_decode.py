"""Try how programs of the decode kernel work, and how many there are, on a GPU; write the times.

    python scripts/gpu/tune_decode.py --out decode_tuning.json
    python scripts/gpu/tune_decode.py --dry-run --out decode_tuning.json     (anywhere)
    python scripts/gpu/tune_decode.py --count                                (anywhere)

What is timed is a whole step, as in benchmarks/timing/gpu_kernels.py. For every batch and kept
length each of `SETTINGS` is tried, then other numbers of programs and of least tiles with the best
of them. A setting that needs more than the GPU has is left out, and one whose result is another
than the default's is an error. The JSON is written anew after every row; past `--limit` nothing is
started. `--dry-run` tries some on a CPU, in Triton's interpreter; its times say nothing. `--count`
launches nothing: it says how many kernels would be compiled, as far as that is known before.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if {"--count", "--dry-run"} & set(sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"

# First: a limit counts from here.
import machine  # noqa: F401
import torch
from gpu import recording
from gpu.shapes import DRY_SHAPE, ModelShape, read_shapes
from timing.report import Report, Timer
from timing.step_cases import DecodeStep, decode_step
from vllm_kvcompress.triton_kernels import DecodeTiles

from vllm_kvcompress import ops

# (tokens of a tile, warps, stages, programs per multiprocessor, registers), of a model with 16 bit.
SETTINGS = [
    DecodeTiles(32, 4, 7, 4, 128),
    DecodeTiles(32, 4, 5, 4, 128),
    DecodeTiles(64, 4, 5, 3, 168),
    DecodeTiles(32, 4, 7, 3, 168),
    DecodeTiles(64, 8, 5, 2, 128),
    DecodeTiles(32, 2, 7, 6, 168),
    DecodeTiles(16, 4, 7, 5, 96),
    DecodeTiles(128, 8, 5, 1, None),
]
PROGRAMS_PER_SM, LEAST_TILES = (1, 2, 3, 6, 8), (1, 2, 8, 16)
# Of results in half precision.
TOLERANCE = 2e-2

Times = dict[str, Any]


def work_of(step: DecodeStep, tiles: DecodeTiles | None) -> ops.DecodeWork:
    """A step's work under a setting; None is the kernel's own choice."""
    if tiles is None:
        return step.new_work()
    num_sms = ops.num_multiprocessors(step.pool.device)
    return replace(step.new_work(tiles.programs_per_sm * num_sms), tiles=tiles)


def tune(
    step: DecodeStep,
    measure: Callable[[Callable[[], Any]], Times],
    settings: list[DecodeTiles],
    is_over: Callable[[], bool] = lambda: False,
) -> Iterator[Times]:
    """One row per setting that runs; the kernel's own choice first.

    Args:
        step: to be timed.
        measure: a call's times, 'p50_us' among them.
        settings: to try.
        is_over: asked before every try; no other is made once it says so.

    Raises:
        AssertionError: if a setting changes the result.
    """
    out = torch.empty_like(step.query)
    want = step.run(work_of(step, None), out).clone()
    found: dict[DecodeTiles, float] = {}

    def measured(tiles: DecodeTiles | None) -> Iterator[Times]:
        if is_over():
            return
        work = work_of(step, tiles)
        # A launch that fails leaves what an earlier one has written.
        out.fill_(torch.nan)
        try:
            step.run(work, out)
        except Exception as error:
            print(f"left out: {tiles}: {type(error).__name__}: {error}")
            return
        torch.testing.assert_close(out, want, rtol=TOLERANCE, atol=TOLERANCE)
        times = measure(lambda: step.run(work, out))
        if tiles is not None:
            found[tiles] = times["p50_us"]
        yield {"tiles": asdict(tiles or work.tiles), "is_default": tiles is None, **times}

    yield from measured(None)
    for tiles in settings:
        yield from measured(tiles)
    if not found:
        return
    best = min(found, key=lambda tiles: found[tiles])
    others = [replace(best, programs_per_sm=n) for n in PROGRAMS_PER_SM]
    others += [replace(best, least_tiles=n) for n in LEAST_TILES]
    for tiles in others:
        if tiles not in found:
            yield from measured(tiles)


def count(shape: ModelShape) -> None:
    """Launch nothing; the settings, and the least tiles of the first, which may be the best."""
    step = decode_step(shape, 2, 64, torch.device("meta"))
    out = torch.empty_like(step.query)
    settings = [None, *SETTINGS, *(replace(SETTINGS[0], least_tiles=n) for n in LEAST_TILES)]
    launches = []
    for tiles in settings:
        launches += recording.record(lambda tiles=tiles: step.run(work_of(step, tiles), out))
    print(f"{len({launch.variant for launch in launches})} compiled variants")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = read_shapes()
    parser.add_argument("--shape", choices=list(shapes), default="Llama-3.1-8B")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--kept", type=int, nargs="+", default=[1024])
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of them")
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="of the process; no later try"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, not a measurement")
    parser.add_argument("--count", action="store_true", help="launch nothing")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.count:
        count(shapes[arguments.shape])
        return
    if not (arguments.dry_run or torch.cuda.is_available()):
        parser.error("needs a CUDA device (or --dry-run)")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    shape, batches, kept = shapes[arguments.shape], arguments.batches, arguments.kept
    if arguments.dry_run:
        shape, batches, kept = DRY_SHAPE, [2], [64]
    timer = Timer(device, arguments.limit)
    report = Report(arguments.out, {"copy_gb_per_s": timer.copy_gbs, **timer.where})
    for batch, num_kept in itertools.product(batches, kept):
        step = decode_step(shape, batch, num_kept, device)
        num_bytes = step.num_tokens * shape.token_bytes
        case = {"shape": shape.name, "batch": batch, "kept_tokens": num_kept}
        best: Times | None = None
        for times in tune(
            step, timer.measure, SETTINGS[: arguments.settings], lambda: timer.is_late
        ):
            gbs = num_bytes / times["p50_us"] / 1000
            of_copy = gbs / timer.copy_gbs
            row = {**case, **times, "gb_per_s": gbs, "of_copy": of_copy}
            report.add(row)
            if best is None or row["p50_us"] < best["p50_us"]:
                best = row
            name = "the default" if row["is_default"] else row["tiles"]
            print(
                f"{case}: {row['p50_us']:.1f} us a step, {of_copy:.0%} of copy, {name}", flush=True
            )
        if best is not None:
            print(f"{case}: best {best['p50_us']:.1f} us with {best['tiles']}", flush=True)
        # The next one's pool may need the memory.
        del step
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
