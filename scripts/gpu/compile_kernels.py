"""Compile every Triton kernel for a GPU that need not be there, and check what came of it.

    python scripts/gpu/compile_kernels.py --arch 90 --out compiled.json

Launches are recorded from the package's own launchers, called with the shapes of real models on
CPU tensors that nobody computes with; each kernel is then compiled as those arguments would have
it. Shows registers, stack (spills), shared memory, blocks per multiprocessor, and for every load in
a loop its buffers and how many tiles are under way while the loop waits; see `kernel_check.py` for
what is wanted of shapes of models on compute capability 9.0.

Exit status 1 if a kernel does not compile, needs more shared memory than there is, or fails the
check. Another Triton, installed with `pip install --target DIR --no-deps`, is taken with
PYTHONPATH=DIR. `--set` tries other options and constants without editing a launcher:

    python scripts/gpu/compile_kernels.py --kernels window_sums_kernel --set num_warps=8
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from gpu import kernel_check
from gpu.launches import launches_of
from gpu.occupancy import MULTIPROCESSORS
from gpu.pipelining import LoopLoad, loop_loads
from gpu.recording import ALIGNMENT, Launch, record
from gpu.sass import loop_stack_accesses
from gpu.shapes import ModelShape, read_shapes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_kvcompress import triton_kernels

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
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")
# What the check's numbers are for.
CHECKED_ARCH = 90


@dataclass(frozen=True)
class Compiled:
    """One kernel as one launch would run it.

    Attributes:
        registers: per thread.
        stack_bytes: per thread.
        loop_stack_accesses: instructions in innermost loops that use it.
        narrow_loads: instructions that read one or two bytes where 16 could be read: a sign that
            the compiler could not see that rows are whole.
        blocks: that one multiprocessor holds at once.
        loads: of tensors, in the innermost loops.
        faults: what the check found.
    """

    kernel: str
    shape: str
    launch: str
    registers: int
    stack_bytes: int
    loop_stack_accesses: int
    narrow_loads: int
    shared_bytes: int
    num_warps: int
    num_stages: int
    blocks: int
    loads: tuple[LoopLoad, ...]
    faults: tuple[str, ...] = ()


def compile_launch(launch: Launch, arch: int, shape: str, label: str) -> Compiled:
    """What a launch would run on compute capability `arch` / 10; not checked yet."""
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
    registers, stack, in_loops = resource_usage(compiled.asm["cubin"])
    narrow = re.findall(r"ld\.global[.\w]*\.[bus](?:8|16)\b", compiled.asm["ptx"])
    used = compiled.metadata
    return Compiled(
        launch.name,
        shape,
        label,
        registers,
        stack,
        in_loops,
        len(narrow),
        used.shared,
        used.num_warps,
        used.num_stages,
        MULTIPROCESSORS[arch].blocks(registers, used.shared, used.num_warps),
        tuple(loop_loads(compiled.asm["ttgir"])),
    )


def resource_usage(cubin: bytes) -> tuple[int, int, int]:
    """(registers per thread, bytes of its stack, accesses to that in innermost loops) of a kernel.

    Args:
        cubin: with that one kernel.
    """
    text = dumped(cubin, "--dump-resource-usage")
    registers = re.search(r"REG:(\d+)", text)
    stack = re.search(r"STACK:(\d+)", text)
    assert registers and stack, text
    stack_bytes = int(stack[1])
    in_loops = loop_stack_accesses(dumped(cubin, "--dump-sass")) if stack_bytes else 0
    return int(registers[1]), stack_bytes, in_loops


def dumped(cubin: bytes, what: str) -> str:
    """What cuobjdump says of a kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # It looks for nvdisasm there.
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), what, file.name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def checked(row: Compiled, arch: int, shape: ModelShape) -> Compiled:
    """With its faults: of shared memory anywhere, else of models' shapes on `CHECKED_ARCH`."""
    found = []
    most = MULTIPROCESSORS[arch].max_block_shared_bytes
    if row.shared_bytes > most:
        found.append(f"{row.shared_bytes} bytes of shared memory, there are {most}")
    if arch == CHECKED_ARCH and shape.is_model:
        found += kernel_check.faults(
            row.kernel,
            row.launch,
            row.num_warps,
            row.loads,
            row.blocks,
            row.stack_bytes,
            row.loop_stack_accesses,
            row.narrow_loads,
        )
    return replace(row, faults=tuple(found))


def described(row: Compiled) -> str:
    """One line of text."""
    text = (
        f"{row.kernel:22} {row.shape:38} {row.launch:26} {row.registers:4} registers, "
        f"{row.shared_bytes:6} B shared, {row.blocks:2} blocks, {row.stack_bytes} B of stack, "
        f"{row.narrow_loads} narrow loads"
    )
    for load in row.loads:
        text += f"; {load.name} {load.tile}: "
        if load.num_buffers:
            text += (
                f"{load.num_buffers} buffers, {load.num_ahead} ahead, {load.copy_bytes} B a copy"
            )
        else:
            text += "to registers"
    return text


def with_settings(launch: Launch, settings: Mapping[str, int]) -> Launch:
    """A launch with other options, and with other constants where it has them."""
    known = {k: v for k, v in settings.items() if k in LAUNCH_OPTIONS or k in launch.options}
    return replace(launch, options={**launch.options, **known})


def compiled_rows(arguments: argparse.Namespace) -> Iterator[Compiled]:
    """Every launch that was asked for; one that does not compile has that as its fault."""
    shapes, settings = read_shapes(), dict(arguments.set)
    for name in arguments.shapes:
        for label, run in launches_of(shapes[name]):
            for recorded in record(run):
                if arguments.kernels and recorded.name not in arguments.kernels:
                    continue
                launch = with_settings(recorded, settings)
                try:
                    row = compile_launch(launch, arguments.arch, name, label)
                except Exception as error:
                    failed = f"does not compile: {type(error).__name__}: {error}"
                    yield Compiled(launch.name, name, label, *[0] * 8, (), (failed,))
                else:
                    yield checked(row, arguments.arch, shapes[name])


def setting(text: str) -> tuple[str, int]:
    """NAME=NUMBER."""
    name, _, number = text.partition("=")
    return name, int(number)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", type=int, choices=MULTIPROCESSORS, default=90, help="compute capability x 10"
    )
    shapes = list(read_shapes())
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes)
    parser.add_argument("--kernels", nargs="+", help="only these")
    parser.add_argument(
        "--set", nargs="+", type=setting, default=[], metavar="NAME=NUMBER", help="try this"
    )
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    arguments = parser.parse_args()
    if triton_kernels.is_interpreted():
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    return arguments


def main() -> int:
    """Compile all shapes; see the module."""
    arguments = parsed_arguments()
    print(f"Triton {triton.__version__}, sm_{arguments.arch}", flush=True)
    rows: list[Compiled] = []
    for row in compiled_rows(arguments):
        rows.append(row)
        print(described(row), flush=True)
    for row in rows:
        for fault in row.faults:
            print(f"FAILED {row.kernel} ({row.shape}, {row.launch or 'only launch'}): {fault}")
    num_failed = sum(bool(row.faults) for row in rows)
    num_spilling = sum(row.stack_bytes > 0 for row in rows)
    num_narrow = sum(row.narrow_loads > 0 for row in rows)
    print(
        f"{len(rows)} compiled for sm_{arguments.arch}, {num_failed} failed, "
        f"{num_spilling} use the stack, {num_narrow} have narrow loads"
    )
    if arguments.out:
        settings = {"arch": arguments.arch, "triton": triton.__version__}
        head = json.dumps(settings | {"settings": dict(arguments.set)})[:-1]
        # A line per launch, to be read and compared as such.
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        text = f'{head}, "kernels": [\n{lines}\n]}}\n'
        arguments.out.write_text(text, encoding="utf-8")
    return 1 if num_failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
