"""Builds the compiled ops where they can be built; everything else is in pyproject.toml.

`_native_cuda.so` needs nvcc and a torch with CUDA in the environment to install into. Without
them the package is pure Python, and Triton does the same work. VLLM_KVCOMPRESS_BUILD=0 builds
nothing; =1 also builds beside a torch without CUDA, and fails where nothing can be built.
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

import build_cuda  # noqa: E402

CUDA = "vllm_kvcompress._native_cuda"
WISH = os.environ.get("VLLM_KVCOMPRESS_BUILD", "")


def find_torch() -> Path | None:
    """The installed torch folder; pip hides it from this process, but not where it lies."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    folders += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((folder for folder in folders if (folder / "version.py").is_file()), None)


def reason_not_to_build() -> str | None:
    """Why the CUDA ops are left out, or None."""
    if WISH == "0":
        return "VLLM_KVCOMPRESS_BUILD=0"
    if build_cuda.find_nvcc() is None:
        return "no nvcc in $CUDA_HOME, $PATH or /usr/local/cuda"
    torch = find_torch()
    if torch is None:
        return "no torch in this environment"
    has_cuda = re.search(r"^cuda\b[^=]*=\s*['\"]", (torch / "version.py").read_text(), re.MULTILINE)
    if not has_cuda and WISH != "1":
        return "this environment's torch has no CUDA"
    return None


class BuildNative(build_ext):
    """Hands the sources to csrc/build_cuda.py, which needs no Python headers."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python version in the name: the library does not know Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link into the place that setuptools wants."""
        torch = find_torch()
        assert torch is not None
        try:
            build_cuda.build(Path(self.get_ext_fullpath(ext.name)).parent, torch)
        except build_cuda.BuildError as error:
            raise CompileError(str(error)) from None


class PlainWheel(bdist_wheel):
    """A wheel for any Python of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """As setuptools has it, but for the Python and its ABI."""
        *_, platform = super().get_tag()
        return "py3", "none", platform


reason = reason_not_to_build()
if reason is None:
    # A build that fails is an error only where it was asked for.
    native = [Extension(CUDA, sources=[], optional=WISH != "1")]
elif WISH == "1":
    raise SystemExit(f"vllm-kvcompress: VLLM_KVCOMPRESS_BUILD=1, but {reason}")
else:
    print(f"vllm-kvcompress: without the compiled CUDA ops: {reason}", file=sys.stderr)
    native = []
setup(ext_modules=native, cmdclass={"build_ext": BuildNative, "bdist_wheel": PlainWheel})
