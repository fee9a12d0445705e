"""Check the kernels' numbers on a GPU at the size that they are for.

    python scripts/gpu/check_real_size.py --out real_size.json
    python scripts/gpu/check_real_size.py --dry-run --out tiny.json     (anywhere)
    python scripts/gpu/check_real_size.py --count                       (anywhere)

The pool has the shape of Llama-3.1-8B and tens of GiB, so that offsets of elements pass 2^31, and
is NaN wherever nobody may read. Decode: batches of 1, 32 and 256 ragged rows, all layers; sampled
streams against attention in float64, and in every stream of every row queries that look for its
first and last tokens; the same captured in a graph, whose rows are changed in place. A prompt of
32,768 tokens: scored, selected and compacted, against float64 and, where numbers are not rounded,
to the bit. The same of the compiled ops, if the installation has them. Nothing may wait for the
device.

The JSON is written anew after every case; `ok` is null for cases that were not started in time.
`--dry-run` runs all of it in Triton's interpreter, tiny, with plain calls for captured graphs.
`--count` launches nothing: it lists the kernels that all of this would launch.

Exit status: 0 if all is as it should be, plus 1 if a number is wrong, plus 4 if a case could not
run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

# Before triton is imported: its kernels then load without a GPU.
if {"--count", "--dry-run"} & set(sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"

# First: a limit counts from here.
import machine
import torch
import triton
from gpu import recording
from gpu.real_size.decode import DecodeCases
from gpu.real_size.judge import Verdict
from gpu.real_size.prompt import PromptCases
from gpu.real_size.slots import SlotCases
from gpu.shapes import ModelShape, read_shapes

SHAPE = "Llama-3.1-8B"
WRONG, COULD_NOT_RUN = 1, 4
# Elements of a pool that has to be told apart from what 32 bits can address.
MANY_ELEMENTS = 2**31
Cases = Iterator[tuple[str, Callable[[], Verdict]]]


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        shape: of the model.
        pool_blocks: most blocks of the pool, and of the one of fp8.
        batches: rows of a step.
        fp8_batch: rows of a step in fp8, and of the rows whose tokens get slots.
        row_blocks: most blocks that a row owns.
        prompt_len: tokens.
    """

    shape: ModelShape
    pool_blocks: int
    fp8_blocks: int
    batches: tuple[int, ...]
    fp8_batch: int
    row_blocks: int
    prompt_len: int


def real_sizes(pool_gib: float) -> Sizes:
    """For a GPU."""
    shape = read_shapes()[SHAPE]
    block_bytes = shape.num_streams * shape.block_size * shape.token_bytes
    num_blocks = int(pool_gib * 2**30) // block_bytes
    # 5 GiB of bfloat16 are 2.7e9 elements; as many of fp8.
    return Sizes(shape, num_blocks, min(num_blocks, 5120), (32, 1, 256), 64, 640, 32757)


def tiny_sizes() -> Sizes:
    """For the interpreter; of the same kinds."""
    shape = replace(read_shapes()[SHAPE], num_layers=2, num_kv_heads=2, head_size=64)
    return Sizes(shape, 80, 40, (5, 1), 2, 6, 293)


def few_sizes() -> Sizes:
    """For the launches alone: as many layers and heads as on a GPU, and few tokens."""
    return replace(tiny_sizes(), shape=read_shapes()[SHAPE])


def new_pool(shape: ModelShape, num_blocks: int, dtype: torch.dtype, device: torch.device):
    """[pages, b, 2 d], uninitialised."""
    size = (num_blocks * shape.num_streams, shape.block_size, 2 * shape.head_size)
    return torch.empty(size, dtype=dtype, device=device)


def cases(sizes: Sizes, device: torch.device) -> Cases:
    """All cases, the pool of bfloat16 first; a pool is freed before the next."""
    shape = sizes.shape
    pool = new_pool(shape, sizes.pool_blocks, shape.pool_dtype, device)
    for batch in sizes.batches:
        yield from DecodeCases(shape, pool, batch, sizes.row_blocks).run()
    yield from PromptCases(shape, pool, sizes.prompt_len).run()
    yield from SlotCases(shape, pool, sizes.fp8_batch, sizes.row_blocks).run()
    del pool
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    pool = new_pool(shape, sizes.fp8_blocks, torch.float8_e4m3fn, device)
    yield from DecodeCases(shape, pool, sizes.fp8_batch, sizes.row_blocks).run()
    yield from SlotCases(shape, pool, sizes.fp8_batch, sizes.row_blocks).run()


def row_of(name: str, run: Callable[[], Verdict], device: torch.device) -> dict[str, Any]:
    """The JSON row of a case that is run now."""
    start = time.monotonic()
    try:
        verdict = run()
        synchronize(device)
    except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}"
        return {"case": name, "ok": False, "error": said, "seconds": time.monotonic() - start}
    return {
        "case": name,
        "ok": verdict.ok,
        "max_error": verdict.max_error,
        "bound": verdict.bound,
        "worst": verdict.worst,
        "num_compared": verdict.num_compared,
        "faults": verdict.faults[:20],
        "num_faults": len(verdict.faults),
        **verdict.facts,
        "seconds": time.monotonic() - start,
    }


def synchronize(device: torch.device) -> None:
    """Wait for the device; raises what went wrong on it."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def is_lost(device: torch.device) -> bool:
    """Whether the device runs nothing any more, as after a stray access."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and command of this run."""
    return {
        "command": machine.command(),
        "commit": machine.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        **machine.device(),
        "interpreted": device.type != "cuda",
    }


def exit_status(rows: list[dict[str, Any]]) -> int:
    """See the module."""
    failed = [row for row in rows if row["ok"] is False]
    could_not_run = any("error" in row for row in failed)
    is_wrong = any("error" not in row for row in failed)
    return WRONG * is_wrong + COULD_NOT_RUN * could_not_run


def printed(row: dict[str, Any]) -> str:
    """One line per case, and its first faults below."""
    if row["ok"] is None:
        return f"not started  {row['case']}"
    state = "ok" if row["ok"] else "FAILED"
    if "error" in row:
        return f"{state:12} {row['case']}: {row['error']}"
    line = (
        f"{state:12} {row['case']:62} error {row['max_error']:.2e} of {row['bound']:.2e}, "
        f"{row['num_compared']} compared, {row['seconds']:.1f} s"
    )
    return "\n".join([line, *(f"{'':12} {fault}" for fault in row["faults"][:5])])


def check_all(arguments: argparse.Namespace, sizes: Sizes, device: torch.device) -> int:
    """Run the cases, write their rows, and return the exit status."""
    start = time.monotonic()
    run = environment(device)
    rows: list[dict[str, Any]] = []
    stopped = ""
    for name, check in cases(sizes, device):
        if not stopped and arguments.limit and machine.seconds_running() > arguments.limit:
            stopped = f"{arguments.limit} s were over"
        if stopped:
            rows.append({"case": name, "ok": None, "not_started": stopped})
        else:
            rows.append(row_of(name, check, device))
            if "error" in rows[-1] and is_lost(device):
                stopped = "the device is lost"
        # It holds the pool, which is to be freed before another is made.
        del check
        print(printed(rows[-1]), flush=True)
        run["seconds"] = time.monotonic() - start
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"run": run, "rows": rows}, indent=1)
            arguments.out.write_text(text + "\n", encoding="utf-8")
    return exit_status(rows)


def count() -> int:
    """List what is launched, by kernel; nothing is, so that no result means anything."""
    launches = []
    for _, check in cases(few_sizes(), torch.device("cpu")):
        # What a kernel would have written may be no index.
        with contextlib.redirect_stderr(io.StringIO()):
            launches += recording.record(lambda check=check: row_of("", check, torch.device("cpu")))
        del check
    for kernel in sorted({launch.name for launch in launches}):
        variants = {launch.variant for launch in launches if launch.name == kernel}
        print(f"{kernel}: {len(variants)} compiled variants")
    return 0


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    parser.add_argument("--dry-run", action="store_true", help="tiny, in the interpreter, on a CPU")
    parser.add_argument("--count", action="store_true", help="list launches, and launch nothing")
    parser.add_argument("--limit", type=float, help="seconds of the process; no later case")
    parser.add_argument("--pool-gib", type=float, default=40.0, help="size of the pool")
    arguments = parser.parse_args()
    if arguments.count:
        return count()
    if arguments.dry_run:
        return check_all(arguments, tiny_sizes(), torch.device("cpu"))
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device (or --dry-run)")
    sizes = real_sizes(arguments.pool_gib)
    elements = sizes.pool_blocks * sizes.shape.num_streams * 2 * sizes.shape.head_size * 16
    if elements <= MANY_ELEMENTS:
        parser.error(f"a pool of {elements} elements has no offset past 2^31; give it 5 GiB")
    return check_all(arguments, sizes, torch.device("cuda"))


if __name__ == "__main__":
    sys.exit(main())
