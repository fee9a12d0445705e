"""What setup.py builds, from a copy of the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from vllm_kvcompress import ops
from vllm_kvcompress.ops import native

ROOT = Path(__file__).parents[2]
PARTS = ("csrc", "triton_kernels", "vllm_kvcompress")


@pytest.fixture
def sources(tmp_path):
    for part in PARTS:
        skip = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=skip)
    for file in ("MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def build(
    sources: Path, wish: str, *targets: str, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *(targets or ("bdist_wheel",))],
        cwd=sources,
        env={**os.environ, "VLLM_KVCOMPRESS_BUILD": wish, **environment},
        capture_output=True,
        text=True,
    )


def wheel_of(sources: Path) -> tuple[str, list[str]]:
    (wheel,) = (sources / "dist").glob("*.whl")
    return wheel.name, zipfile.ZipFile(wheel).namelist()


def test_without_compiled_ops_the_wheel_is_plain(sources):
    result = build(sources, "0", "bdist_wheel", "sdist")
    assert result.returncode == 0, result.stderr
    assert "without the compiled CUDA ops: VLLM_KVCOMPRESS_BUILD=0" in result.stderr
    name, files = wheel_of(sources)
    assert name.endswith("-py3-none-any.whl")
    assert not [file for file in files if file.endswith(".so")]
    assert "vllm_kvcompress/triton_kernels/select.py" in files
    assert not [file for file in files if file.startswith("triton_kernels")]
    (archive,) = (sources / "dist").glob("*.tar.gz")
    listed = subprocess.run(["tar", "-tf", archive], capture_output=True, text=True).stdout
    assert "csrc/build_cuda.py" in listed and "csrc/cuda/select.cu" in listed


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.slow
def test_with_nvcc_the_wheel_has_the_library_for_any_python(sources):
    result = build(sources, "1")
    assert result.returncode == 0, result.stderr
    name, files = wheel_of(sources)
    assert "-py3-none-linux_" in name
    assert "vllm_kvcompress/_native_cuda.so" in files


def test_a_wished_build_that_cannot_be_is_an_error(sources):
    (sources / "csrc" / "cuda" / "select.cu").write_text("this is no C++")
    result = build(sources, "1")
    assert result.returncode != 0
    assert "this is no C++" in result.stderr or "no nvcc" in result.stderr


def test_the_compiled_ops_say_why_they_do_not_run(tmp_path):
    numbers = torch.zeros(1, 2, dtype=torch.int32)
    arguments = (torch.zeros(1, 2, 4), numbers[:, 0], numbers, 2)
    with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu"):
        ops.select_entries(*arguments, backend="native")
    with pytest.raises(RuntimeError, match="has no compiled CUDA ops"):
        native.load(tmp_path / "missing.so")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    with pytest.raises(RuntimeError, match="do not load here"):
        native.load(broken)
    if not torch.cuda.is_available():
        assert ops.native_problem() == "no CUDA device"
