"""Compiles csrc/cpu into one shared library of torch ops, for any torch from 2.10 on.

What scores prompts is compiled once per instruction set, the best of which the library finds when
it is loaded. Standard library only: setup.py runs this in an environment of its own.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from build_cuda import ROOT, TORCH_TARGET_VERSION, BuildError

SOURCES = ROOT / "csrc" / "cpu"
LIBRARY_NAME = "_native_cpu.so"
# Compiled once per instruction set, without any header of the C++ library.
SCORING = ("window_score.cpp", "value_effect.cpp", "join_scores.cpp")
COMMON = (
    "bind_scores.cpp",
    "bind_selection.cpp",
    "compact.cpp",
    "instruction_sets.cpp",
    "select.cpp",
)

_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
# Floats per vector, and the compiler's options.
_PORTABLE = {"portable": (4, ())}
_X86 = {
    "avx2": (8, _AVX2),
    "avx512": (16, _AVX512),
    "avx512_bf16": (16, (*_AVX512, "-mavx512bf16", "-DKVC_BFLOAT16_DOT")),
}
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, or the first of g++, clang++ and c++ in $PATH."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    return None if found is None else [found]


def instruction_sets() -> dict[str, tuple[int, tuple[str, ...]]]:
    """Those to compile for on this kind of machine."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return {**_PORTABLE, **_X86} if is_x86 else _PORTABLE


def build(out_dir: Path, torch_root: Path) -> Path | None:
    """Compile and link the library.

    Args:
        out_dir: where it goes, as `LIBRARY_NAME`.
        torch_root: the installed `torch` folder, for its headers and libraries.

    Returns:
        The library, or None where there is no C++ compiler.

    Raises:
        BuildError: if it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        return None
    out_dir, torch_root = out_dir.resolve(), torch_root.resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    out = out_dir / LIBRARY_NAME
    with TemporaryDirectory() as folder:
        objects = _compile(compiler, Path(folder), torch_root)
        _link(compiler, objects, out, torch_root)
    return out


def _compile(compiler: Sequence[str], folder: Path, torch_root: Path) -> list[Path]:
    commands: list[list[str]] = []
    objects: list[Path] = []

    def add(source: str, name: str, *options: str) -> None:
        objects.append(folder / f"{name}.o")
        # Relative, so that messages and assertions name no folder of this machine.
        path = str((SOURCES / source).relative_to(ROOT))
        commands.append([*compiler, *_FLAGS, *options, "-c", path, "-o", str(objects[-1])])

    torch_options = (f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem")
    for source in COMMON:
        add(source, source, *torch_options, str(torch_root / "include"))
    for name, (width, options) in instruction_sets().items():
        for source in SCORING:
            chosen = (f"-DKVC_ISA={name}", f"-DKVC_WIDTH={width}", *options)
            add(source, f"{source}.{name}", *chosen)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    for path in objects[len(COMMON) :]:
        shared = weak_symbols(path)
        if shared:
            # The linker would keep one of them, perhaps for instructions that a CPU has not.
            raise BuildError(f"{path.name} shares functions: {', '.join(shared)}")
    return objects


def weak_symbols(path: Path) -> list[str]:
    """Names that an object file defines and that others may define, too."""
    listed = _run(["nm", "--defined-only", str(path)])
    kinds = ("V", "W", "v", "w", "u")
    return sorted(line.split()[-1] for line in listed.splitlines() if line.split()[-2] in kinds)


def _link(compiler: Sequence[str], objects: Sequence[Path], out: Path, torch_root: Path) -> None:
    libraries = torch_root / "lib"
    command = [*compiler, "-shared", *map(str, objects), "-o", str(out), f"-L{libraries}"]
    command += ["-l:libtorch_cpu.so", f"-Wl,-rpath-link,{libraries}", "-Wl,-z,defs"]
    _run(command)


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = result.stdout + result.stderr
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\n{said}")
    return said
