"""Try tile sizes, warps, stages and splits of the decode kernel on a GPU, and write the times.

    python scripts/gpu/tune_decode.py --out decode_tuning.json

For every batch and kept length the tiles are varied first, with the splits that the kernel chooses
by itself, then the splits of the best. A setting that needs more than the GPU has is left out, and
one whose result is another than the default's is an error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bench_kernels import decode_case, environment, time_us
from gpu.shapes import ModelShape, read_shapes
from vllm_kvcompress.triton_kernels.ragged_decode import DecodeTiles

# The package has a function of this name.
KERNEL_MODULE = sys.modules[DecodeTiles.__module__]

NUM_KEYS, NUM_WARPS, NUM_STAGES = (32, 64, 128), (2, 4, 8), (2, 3, 4)
SPLITS = (1, 2, 4, 8, 16, 32, 64)
# Of results in half precision.
TOLERANCE = 2e-2


def run_with(
    run: Callable[[], torch.Tensor], tiles: DecodeTiles | None, splits: int | None
) -> Callable[[], torch.Tensor]:
    """The call under a setting; None is the kernel's own choice."""
    wanted = {"decode_tiles": tiles, "num_decode_splits": splits}

    def call() -> torch.Tensor:
        with ExitStack() as stack:
            for name, value in wanted.items():
                if value is not None:
                    choice = mock.patch.object(KERNEL_MODULE, name, return_value=value)
                    stack.enter_context(choice)
            return run()

    return call


def tune(
    run: Callable[[], torch.Tensor], measure: Callable[[Callable[[], Any]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One row per setting that runs.

    Args:
        run: one call, which returns its result.
        measure: its times, 'p50_us' among them.

    Raises:
        AssertionError: if a setting changes the result.
    """
    out = run()
    want = out.clone()
    found: dict[tuple[DecodeTiles | None, int | None], float] = {}

    def measured(tiles: DecodeTiles | None, splits: int | None) -> Iterator[dict[str, Any]]:
        call = run_with(run, tiles, splits)
        # A call may write into what the last one returned.
        out.fill_(torch.nan)
        try:
            got = call()
        except Exception as error:
            print(f"left out: {tiles}, {splits} splits: {type(error).__name__}: {error}")
            return
        torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)
        times = measure(call)
        found[tiles, splits] = times["p50_us"]
        yield {"tiles": tiles and asdict(tiles), "splits": splits, **times}

    yield from measured(None, None)
    for numbers in itertools.product(NUM_KEYS, NUM_WARPS, NUM_STAGES):
        yield from measured(DecodeTiles(*numbers), None)
    best, _ = min(found, key=lambda setting: found[setting])
    for splits in SPLITS:
        yield from measured(best, splits)


def cases(
    shape: ModelShape, batches: list[int], kept: list[int], device: torch.device
) -> Iterator[tuple[dict[str, int], Callable[[], torch.Tensor]]]:
    """(what it is, one call) of every batch and kept length."""
    for batch, num_kept in itertools.product(batches, kept):
        case = decode_case(shape, batch, num_kept, device, min(8, shape.num_layers), ())
        yield {"batch": batch, "kept_tokens": num_kept, "num_bytes": case.num_bytes}, case.run


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = read_shapes()
    parser.add_argument("--shape", choices=list(shapes), default="Llama-3.1-8B")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--kept", type=int, nargs="+", default=[1024])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    run, rows = {**environment(), "shape": arguments.shape}, []
    shape, device = shapes[arguments.shape], torch.device("cuda")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for case, call in cases(shape, arguments.batches, arguments.kept, device):
        own = [{**case, **row} for row in tune(call, time_us)]
        rows += own
        arguments.out.write_text(json.dumps({"run": run, "rows": rows}, indent=1) + "\n")
        best = min(own, key=lambda row: row["p50_us"])
        print(
            f"batch {case['batch']}, {case['kept_tokens']} kept: {own[0]['p50_us']:.1f} us; "
            f"best {best['p50_us']:.1f} us with {best['tiles']}, {best['splits']} splits",
            flush=True,
        )


if __name__ == "__main__":
    main()
