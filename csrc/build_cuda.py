"""Compiles csrc/cuda into one shared library of torch ops, for any torch from 2.10 on.

The library uses torch's stable ABI only, so it need not be rebuilt for another torch, and a torch
without CUDA is enough to build it. Standard library only: setup.py runs this in an environment of
its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
LIBRARY_NAME = "_native_cuda.so"
# Compute capability x 10: A100, H100 and H200, B200. The last one's PTX serves later GPUs.
DEFAULT_ARCHS = (80, 90, 100)
# 2.10, as torch/csrc/stable/version.h writes it.
TORCH_TARGET_VERSION = "0x020a000000000000"

_COMPILE_FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden")
_BINDING_FLAGS = (
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    # Without it torch hides what concerns streams.
    "-DUSE_CUDA",
)
# What the library may leave for others to define: torch's stable ABI, glibc and libstdc++.
_ALLOWED = re.compile(r"(aoti_torch_|torch_)\w+$|[\w.]+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\w.]+$")


class BuildError(RuntimeError):
    """A compiler failed; the message has its command and what it said."""


@dataclass(frozen=True)
class KernelUse:
    """What one kernel takes on one architecture, as ptxas says."""

    kernel: str
    arch: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared_bytes: int


def find_nvcc() -> Path | None:
    """nvcc of $CUDA_HOME, of $PATH or of /usr/local/cuda, in this order; None if there is none."""
    homes = [os.environ["CUDA_HOME"]] if os.environ.get("CUDA_HOME") else []
    for home in [*homes, None, "/usr/local/cuda"]:
        found = shutil.which("nvcc", path=None if home is None else str(Path(home) / "bin"))
        if found:
            return Path(found)
    return None


def nvcc_version(nvcc: Path) -> str:
    """Such as '13.0'."""
    found = re.search(r"release ([\d.]+)", _run([str(nvcc), "--version"]))
    if found is None:
        raise BuildError(f"{nvcc} does not tell its version")
    return found[1]


def supported_archs(nvcc: Path) -> set[int]:
    """Architectures that this nvcc can compile for, 90 meaning sm_90."""
    listed = _run([str(nvcc), "--list-gpu-arch"])
    return {int(number) for number in re.findall(r"compute_(\d+)$", listed, re.MULTILINE)}


def compile_objects(
    nvcc: Path, folder: Path, torch_root: Path, archs: Sequence[int]
) -> tuple[list[Path], list[KernelUse]]:
    """Object files of all sources, and what every kernel takes on every architecture.

    Args:
        nvcc: the compiler.
        folder: where the object files go.
        torch_root: the installed `torch` folder, for its headers.
        archs: see `DEFAULT_ARCHS`; PTX is added for the last.

    Raises:
        BuildError: if a source does not compile.
    """
    common = [str(nvcc), *_COMPILE_FLAGS, "-c"]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    includes = [f"-I{torch_root / 'include'}"]
    commands, objects = [], []
    for source in sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")]):
        out = folder / f"{source.name}.o"
        extra = (
            [*targets, "--ptxas-options=-v"]
            if source.suffix == ".cu"
            else [*_BINDING_FLAGS, *includes]
        )
        # Relative, so that messages and debug information name no folder of this machine.
        relative = str(source.relative_to(ROOT))
        commands.append([*common, *extra, relative, "-o", str(out)])
        objects.append(out)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = list(pool.map(_run, commands))
    return objects, [use for text in said for use in kernel_uses(text)]


def link(nvcc: Path, objects: Sequence[Path], out: Path, torch_root: Path) -> None:
    """Link the objects into a shared library that needs libtorch.so, with the CUDA runtime inside.

    A torch for the CPU does not define what concerns streams. So the linker may leave symbols
    open, and those that it left are checked here by name.

    Raises:
        BuildError: if the linker fails, or if any other symbol is undefined.
    """
    linker_flags = (
        "--no-as-needed,-l:libtorch.so,--as-needed",
        # Symbols of the runtime must not mix with those of the one that torch brings.
        "--exclude-libs,ALL",
        "--unresolved-symbols=ignore-all",
        "--build-id",
    )
    command = [
        str(nvcc),
        "-shared",
        "-nodlink",
        "-cudart",
        "static",
        *map(str, objects),
        "-o",
        str(out),
    ]
    command += [f"-L{torch_root / 'lib'}", *(f"-Xlinker={flag}" for flag in linker_flags)]
    _run(command)
    unknown = [symbol for symbol in undefined_symbols(out) if not _ALLOWED.match(symbol)]
    if unknown:
        raise BuildError(f"{out.name} has undefined symbols: {', '.join(unknown)}")


def undefined_symbols(library: Path) -> list[str]:
    """Names that a library leaves for others to define, with their versions; not the weak ones."""
    listed = _run(["nm", "-D", "--undefined-only", str(library)])
    return sorted(line.split()[-1] for line in listed.splitlines() if line.split()[-2] == "U")


def exported_functions(library: Path) -> list[str]:
    """Names of the library's own functions for ctypes."""
    listed = _run(["nm", "-D", "--defined-only", str(library)])
    names = (line.split()[-1] for line in listed.splitlines())
    return sorted(name for name in names if name.startswith("kvc_"))


def build(out_dir: Path, torch_root: Path, archs: Sequence[int] | None = None) -> Path | None:
    """Compile and link the library.

    Args:
        out_dir: where it goes, as `LIBRARY_NAME`.
        torch_root: the installed `torch` folder.
        archs: architectures to compile for; None takes those of `DEFAULT_ARCHS` that nvcc knows.

    Returns:
        The library, or None where nvcc is missing.

    Raises:
        BuildError: if a compiler fails, or if nvcc does not know an architecture.
    """
    nvcc = find_nvcc()
    return None if nvcc is None else build_and_measure(nvcc, out_dir, torch_root, archs)[0]


def build_and_measure(
    nvcc: Path, out_dir: Path, torch_root: Path, archs: Sequence[int] | None = None
) -> tuple[Path, list[KernelUse]]:
    """`build` with a given nvcc, which also tells what the kernels take."""
    known = supported_archs(nvcc)
    chosen = [arch for arch in DEFAULT_ARCHS if arch in known] if archs is None else list(archs)
    if not chosen or not known.issuperset(chosen):
        raise BuildError(f"{nvcc} compiles for {sorted(known)}, not for {chosen}")
    out_dir, torch_root = out_dir.resolve(), torch_root.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    out = out_dir / LIBRARY_NAME
    with TemporaryDirectory() as folder:
        objects, uses = compile_objects(nvcc, Path(folder), torch_root, chosen)
        link(nvcc, objects, out, torch_root)
    return out, uses


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = result.stdout + result.stderr
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\n{said}")
    return said


def kernel_uses(said: str) -> Iterator[KernelUse]:
    """Kernels in what nvcc says with --ptxas-options=-v."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    for name, arch, stack, stores, loads, registers, rest in pattern.findall(said):
        shared = re.search(r"(\d+) bytes smem", rest)
        yield KernelUse(
            _readable(name),
            int(arch),
            int(registers),
            int(stores) + int(loads),
            int(stack),
            int(shared[1]) if shared else 0,
        )


def _readable(mangled: str) -> str:
    """`select_kernel<void>` of a mangled name, without namespaces and parameters."""
    plain = _run(["c++filt", mangled]).strip()
    plain = re.sub(r"\(\w+\)", "", plain.removeprefix("void ")).split("(")[0]
    return plain.replace("kvcompress::", "")
