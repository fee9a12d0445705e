"""Compile what a script launches into Triton's cache, for a GPU that need not be there.

    TRITON_CACHE_DIR=DIR python scripts/gpu/fill_triton_cache.py SCRIPT --count

SCRIPT: benchmarks/timing/gpu_kernels.py, or one of plan.sh's others.

The script records launches instead of making them (`recording.record`). Each one goes through
Triton's own launch as far as the compiled kernel, so that its entry in the cache is found under the
same name by a launch on a GPU of that architecture. What a name depends on: Triton's version and
files, ptxas' version, the kernel's source, types, alignments, constants and options. No path and
nothing of the machine is part of it. The C launcher of every signature is compiled too; it is found
again by the same version of Python on the same processor.
"""

from __future__ import annotations

import contextlib
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton

# Before the script may ask for the interpreter: kernels that it imports are to be compiled.
from gpu import recording
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from vllm_kvcompress import triton_kernels

ARCH = 90


class NoGPU:
    """Triton's driver for a GPU that is not there: it compiles, and cannot load."""

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where a kernel's own allocations would go."""
        return torch.device("cpu")


def compile_launch(launch: recording.Launch) -> Any:
    """The compiled kernel of a launch, and its launcher, both from now on in the cache."""
    compiled = launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.options)
    # It is compiled and kept; loading it needs the driver's library.
    with contextlib.suppress(ImportError):
        nvidia.CudaLauncher(compiled.src, compiled.metadata)
    return compiled


def compiling(
    record: Callable[..., list[recording.Launch]], done: dict[Any, str]
) -> Callable[..., list[recording.Launch]]:
    """`record`, whose launches are also compiled: variant -> hash of its entry goes to `done`."""

    def record_and_compile(run: Callable[[], Any], is_run: bool = False) -> list[recording.Launch]:
        launches = record(run, is_run)
        for launch in launches:
            if launch.variant not in done:
                done[launch.variant] = compile_launch(launch).hash
        return launches

    return record_and_compile


def make_library(folder: Path) -> None:
    """An empty libcuda.so.1 to link launchers against."""
    source = folder / "empty.c"
    source.write_text("")
    out = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(out)]
    subprocess.run(command, check=True)


def main() -> None:
    """See the module."""
    if triton_kernels.is_interpreted():
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    script, *arguments = sys.argv[1:]
    triton.runtime.driver.set_active(NoGPU())
    # Ops take tensors without a GPU only from those who do not mean to compute with them.
    triton_kernels.is_interpreted = lambda: True
    done: dict[Any, str] = {}
    recording.record = compiling(recording.record, done)
    sys.argv = [script, *arguments]
    with tempfile.TemporaryDirectory() as name:
        make_library(Path(name))
        nvidia.libcuda_dirs = lambda: [name]
        # What every process compiles first.
        with contextlib.suppress(ImportError):
            nvidia.CudaUtils()
        runpy.run_path(script, run_name="__main__")
    print(f"{len(done)} kernels are in the cache")


if __name__ == "__main__":
    main()
