"""Builds the compiled ops where they can be built; everything else is in pyproject.toml.

`_native_cpu.so` needs a C++ compiler and a torch in the environment to install into,
`_native_cuda.so` nvcc and a torch with CUDA. What cannot be built is left out: the package works
without, by torch and Triton. VLLM_KVCOMPRESS_BUILD=0 builds nothing; =1 fails where the CPU ops
cannot be built, or where nvcc is there and the CUDA ops cannot, and builds those also beside a
torch without CUDA.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import build_cpu  # noqa: E402
import build_cuda  # noqa: E402

CPU = "vllm_kvcompress._native_cpu"
CUDA = "vllm_kvcompress._native_cuda"
WISH = os.environ.get("VLLM_KVCOMPRESS_BUILD", "")


def find_torch() -> Path | None:
    """The installed torch folder; pip hides it from this process, but not where it lies."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    folders += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((folder for folder in folders if (folder / "version.py").is_file()), None)


def reasons_not_to_build() -> dict[str, str]:
    """Why libraries are left out, by their names."""
    if WISH == "0":
        return dict.fromkeys((CPU, CUDA), "VLLM_KVCOMPRESS_BUILD=0")
    torch = find_torch()
    if torch is None:
        return dict.fromkeys((CPU, CUDA), "no torch in this environment")
    reasons = {}
    if build_cpu.find_compiler() is None:
        reasons[CPU] = "no C++ compiler in $CXX or $PATH"
    has_cuda = re.search(r"^cuda\b[^=]*=\s*['\"]", (torch / "version.py").read_text(), re.MULTILINE)
    if build_cuda.find_nvcc() is None:
        reasons[CUDA] = "no nvcc in $CUDA_HOME, $PATH or /usr/local/cuda"
    elif not has_cuda and WISH != "1":
        reasons[CUDA] = "this environment's torch has no CUDA"
    return reasons


class BuildNative(build_ext):
    """Hands the sources to csrc/build_cpu.py and build_cuda.py, which need no Python headers."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: the library does not know Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link into the place that setuptools wants."""
        torch = find_torch()
        assert torch is not None
        build = build_cpu.build if ext.name == CPU else build_cuda.build
        try:
            build(Path(self.get_ext_fullpath(ext.name)).parent, torch)
        except build_cuda.BuildError as error:
            raise CompileError(str(error)) from None


class PlainWheel(bdist_wheel):
    """A wheel for any Python of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """As setuptools has it, but for the Python and its ABI."""
        *_, platform = super().get_tag()
        return "py3", "none", platform


reasons = reasons_not_to_build()
for name, reason in reasons.items():
    if WISH == "1" and name == CPU:
        raise SystemExit(f"vllm-kvcompress: VLLM_KVCOMPRESS_BUILD=1, but {reason}")
    kind = "CPU" if name == CPU else "CUDA"
    print(f"vllm-kvcompress: without the compiled {kind} ops: {reason}", file=sys.stderr)
# A build that fails is an error only where it was asked for.
native = [
    Extension(name, sources=[], optional=WISH != "1") for name in (CPU, CUDA) if name not in reasons
]
setup(ext_modules=native, cmdclass={"build_ext": BuildNative, "bdist_wheel": PlainWheel})
