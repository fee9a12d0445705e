"""Compile every Triton kernel for a GPU that need not be there, and print what each one uses.

    python scripts/gpu/compile_kernels.py --arch 90 --out compiled.json

Launches are recorded from the package's own launchers, called with the shapes of real models on
CPU tensors that nobody computes with; each kernel is then compiled as those arguments would have
it. Shows type errors, registers, shared memory and spills (bytes of stack). Exit status 1 if a
kernel does not compile.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from gpu.recording import ALIGNMENT, Launch, record
from gpu.shapes import ModelShape, read_shapes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_kvcompress import ops, triton_kernels

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Options of a launch that are no arguments of the kernel.
LAUNCH_OPTIONS = ("num_warps", "num_stages")
# KiB of shared memory that one program may have, by compute capability x 10.
MAX_SHARED_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}


@dataclass(frozen=True)
class Compiled:
    """One kernel as one launch would run it.

    narrow_loads counts instructions that read one or two bytes where 16 could be read: a sign
    that the compiler could not see that rows are whole.
    """

    kernel: str
    shape: str
    launch: str
    registers: int
    stack_bytes: int
    narrow_loads: int
    shared_bytes: int
    num_warps: int


def compile_launch(launch: Launch, arch: int) -> tuple[int, int, int, int, int]:
    """(registers, bytes of stack, narrow loads, bytes of shared memory, warps) of a launch."""
    signature, constants, attrs = {}, {}, {}
    for index, argument in enumerate(launch.arguments()):
        if argument.kind == "constant":
            signature[argument.name] = "constexpr"
            constants[argument.name] = argument.constant
            continue
        scalar = {"float": "fp32", "int": "i32"}.get(argument.kind)
        signature[argument.name] = scalar or "*" + TYPES[argument.kind]
        if argument.is_aligned:
            attrs[(index,)] = [["tt.divisibility", ALIGNMENT]]
    source = ASTSource(launch.kernel, signature, constants, attrs)
    target = GPUTarget("cuda", arch, 32)
    launch_options = {k: v for k, v in launch.options.items() if k in LAUNCH_OPTIONS}
    compiled = triton.compile(source, target=target, options=launch_options)
    registers, stack = resource_usage(compiled.asm["cubin"])
    narrow = re.findall(r"ld\.global[.\w]*\.[bus](?:8|16)\b", compiled.asm["ptx"])
    shared, num_warps = compiled.metadata.shared, compiled.metadata.num_warps
    return registers, stack, len(narrow), shared, num_warps


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of its stack) of the one kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", text)
    stack = re.search(r"STACK:(\d+)", text)
    assert registers and stack, text
    return int(registers[1]), int(stack[1])


def launches_of(shape: ModelShape) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every launcher of the package at one shape, by what it is asked for."""
    num_requests, num_blocks, window = 4, 64, 16
    num_streams = shape.num_streams
    num_heads = shape.num_heads
    b, d = shape.block_size, shape.head_size
    # Nobody reads or writes these; pages of a real pool would not fit.
    pool = torch.empty(num_streams, b, 2 * d, dtype=shape.pool_dtype)
    ints = {"dtype": torch.int32}
    rows = torch.zeros(num_requests, 4, **ints)
    table = torch.zeros(num_requests, num_blocks, **ints)
    offsets = torch.zeros(num_requests, num_streams + 1, **ints)
    lens = torch.zeros(num_requests, **ints)
    scales = torch.ones(num_streams)
    model = {"layer": 3, "num_layers": shape.num_layers}

    def decode(query_len: int, **options: Any) -> Callable[[], None]:
        num_tokens = num_requests * query_len
        query = torch.empty(num_tokens, num_heads, d, dtype=shape.dtype)
        starts = torch.arange(num_requests + 1, **ints)
        return lambda: triton_kernels.ragged_decode(
            query,
            pool,
            rows,
            offsets,
            table,
            starts,
            scales,
            scales,
            torch.empty_like(query),
            **model,
            num_kv_heads=shape.num_kv_heads,
            max_query_len=query_len,
            scale=d**-0.5,
            **options,
        )

    yield "one query", decode(1)
    yield "as many queries as it takes", decode(ops.MAX_QUERY_LEN)
    all_options = {"logits_soft_cap": 50.0, "sliding_window": 1024}
    yield "all options", decode(1, **all_options, sinks=torch.zeros(num_heads))

    key = torch.empty(num_requests, shape.num_kv_heads, d, dtype=shape.dtype)
    slots = torch.zeros(num_requests, dtype=torch.int64)
    yield "", lambda: triton_kernels.token_slots(rows, table, lens, b, slots)
    yield (
        "",
        lambda: triton_kernels.store_tokens(
            key, key, pool, slots, scales, scales, model["layer"], shape.num_layers
        ),
    )

    def score(reduce: str, window: int, **options: Any) -> Callable[[], None]:
        query = torch.empty(num_requests, 1, window, num_heads, d, dtype=shape.dtype)
        num_groups = triton_kernels.num_score_groups(shape.group, reduce)
        scores = torch.empty(num_requests, shape.num_kv_heads, num_groups, 2048)
        part_sums = None
        if reduce == "defensive":
            num_parts = triton_kernels.num_score_parts(2048, 5)
            part_sums = torch.empty(num_requests, shape.num_kv_heads, num_parts)
        return lambda: triton_kernels.window_scores(
            query,
            pool,
            rows,
            table,
            lens,
            scales,
            scores,
            **model,
            num_kv_heads=shape.num_kv_heads,
            scale=torch.ones(1),
            reduce=reduce,
            part_sums=part_sums,
            **{
                "logits_soft_cap": None,
                "power": 1,
                "near_tokens": 0,
                "pool_kernel": 5,
                "lse": None,
                "sinks": None,
                **options,
            },
        )

    lse = torch.zeros(num_requests, 1, window, num_heads)
    yield "defensive", score("defensive", window, near_tokens=8)
    yield "defensive, lse given", score("defensive", window, near_tokens=8, lse=lse)
    sinks = torch.zeros(num_heads)
    yield "defensive, sinks, lse given", score("defensive", window, lse=lse, sinks=sinks)
    yield "mean, sinks", score("mean", window, sinks=sinks)
    yield "mean, window 32", score("mean", 32)
    yield "sum of squares, window 64", score("sum", 64, power=2)
    root = torch.empty(1, shape.num_kv_heads, d, d, dtype=shape.dtype)
    token_scores = torch.empty(num_requests, shape.num_kv_heads, 2048)
    yield (
        "",
        lambda: triton_kernels.value_effect(
            pool, root, rows, table, lens, scales, token_scores, **model
        ),
    )

    def join(num_groups: int, **options: Any) -> Callable[[], None]:
        scores = torch.empty(num_requests, shape.num_kv_heads, num_groups, 2048)
        return lambda: triton_kernels.join_scores(
            scores,
            lens,
            lens,
            token_scores if options.pop("with_effect") else None,
            token_scores,
            max_candidates=2048,
            num_kv_heads=shape.num_kv_heads,
            part_sums=token_scores if options["floor_at_mean"] else None,
            page_size=b,
            **options,
        )

    snapkv = {"pool_kernel": 7, "pool_kind": "max", "pool_first": True, "floor_at_mean": False}
    span = {"pool_kernel": 1, "pool_kind": "max", "pool_first": True, "floor_at_mean": True}
    yield (
        "SnapKV",
        join(
            shape.group,
            **snapkv,
            group_reduce="mean",
            span_kernel=1,
            page_reduce="max",
            with_effect=False,
        ),
    )
    yield (
        "span",
        join(1, **span, group_reduce="max", span_kernel=11, page_reduce="rms", with_effect=True),
    )
    page_scores = torch.empty(num_requests, num_streams, 2048)
    num_pages = torch.zeros(num_requests, num_streams, **ints)
    for label, page_size, num_groups in (
        ("pages, all streams", 1, 1),
        ("tokens, a layer's heads", b, shape.num_layers),
    ):
        totals = torch.zeros(num_requests, num_groups, **ints)
        yield (
            label,
            lambda page_size=page_size, totals=totals: triton_kernels.joint_page_counts(
                page_scores, lens, totals, totals, num_pages, page_size=page_size
            ),
        )
    indices = torch.zeros(num_requests, 64 * num_streams * b, **ints)
    yield (
        "",
        lambda: triton_kernels.select_entries(
            page_scores, lens, num_pages, offsets, indices, page_size=1
        ),
    )
    for label, entries_per_page in (("pages", 1), ("tokens", b)):
        yield (
            label,
            lambda entries_per_page=entries_per_page: triton_kernels.compact(
                pool,
                rows,
                table,
                offsets,
                indices,
                max_region_blocks=64,
                entries_per_page=entries_per_page,
            ),
        )
    index = pool.new_zeros(64, dtype=torch.int64)
    for label, num_entries in (("pages", pool.shape[0]), ("tokens", pool.shape[0] * b)):
        entries = pool.view(num_entries, -1)
        yield (
            label,
            lambda entries=entries: triton_kernels.move_entries(entries, index, entries, index),
        )


def main() -> int:
    """Compile all shapes; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", type=int, choices=MAX_SHARED_KIB, default=90, help="compute capability x 10"
    )
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    shapes = read_shapes()
    parser.add_argument("--shapes", nargs="+", choices=list(shapes), default=list(shapes))
    arguments = parser.parse_args()
    if triton_kernels.is_interpreted():
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    rows: list[Compiled] = []
    num_failed = 0
    for name in arguments.shapes:
        for label, run in launches_of(shapes[name]):
            for launch in record(run):
                try:
                    usage = compile_launch(launch, arguments.arch)
                except Exception as error:
                    num_failed += 1
                    print(f"FAILED {launch.name} ({name}, {label}): {error}", flush=True)
                    continue
                row = Compiled(launch.name, name, label, *usage)
                rows.append(row)
                print(
                    f"{row.kernel:22} {name:38} {label:26} {row.registers:4} registers, "
                    f"{row.shared_bytes:6} B shared, {row.stack_bytes} B of stack, "
                    f"{row.narrow_loads} narrow loads",
                    flush=True,
                )
    max_shared_bytes = MAX_SHARED_KIB[arguments.arch] * 1024
    num_too_large = sum(row.shared_bytes > max_shared_bytes for row in rows)
    num_spilling = sum(row.stack_bytes > 0 for row in rows)
    num_narrow = sum(row.narrow_loads > 0 for row in rows)
    print(
        f"{len(rows)} compiled for sm_{arguments.arch}, {num_failed} failed, {num_too_large} need "
        f"too much shared memory, {num_spilling} use the stack, {num_narrow} have narrow loads"
    )
    if arguments.out:
        result = {
            "arch": arguments.arch,
            "triton": triton.__version__,
            "kernels": [asdict(row) for row in rows],
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if num_failed or num_too_large else 0


if __name__ == "__main__":
    sys.exit(main())
