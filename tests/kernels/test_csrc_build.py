"""The CUDA library compiles and links where there is nvcc, with or without a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import native

build_cuda = native.build_cuda()
NVCC = build_cuda.find_nvcc()
TORCH_ROOT = Path(torch.__file__).parent
SCRIPT = native.CSRC.parent / "scripts" / "gpu" / "compile_csrc.py"
KERNELS = {
    *(f"joint_digit_kernel<{digit}>" for digit in range(3)),
    *(f"select_kernel<{unit}>" for unit in ("void", "Vector", "unsigned int", "unsigned char")),
    *(f"compact_kernel<{unit}>" for unit in ("Vector", "unsigned int", "unsigned char")),
}

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc in $CUDA_HOME, $PATH, /usr/local")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@needs_nvcc
@pytest.mark.slow
def test_compiles_and_links_for_all_architectures(tmp_path):
    out = tmp_path / "csrc.json"
    command = [sys.executable, "-P", str(SCRIPT), "--json", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(out.read_text())
    rows = found["kernels"]
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (kernel, arch) for kernel in KERNELS for arch in (80, 90, 100)
    }
    assert len(rows) == 3 * len(KERNELS)
    assert all(row["spill_bytes"] == row["stack_bytes"] == 0 for row in rows)
    # Two blocks of 512 threads fit the registers of an SM.
    assert all(0 < row["registers"] <= 64 for row in rows)
    assert "aoti_torch_get_current_cuda_stream" in found["torch_symbols"]
    assert found["exported"] == ["kvc_device_problem"]


@needs_nvcc
def test_an_architecture_that_nvcc_does_not_know_is_refused(tmp_path):
    with pytest.raises(build_cuda.BuildError, match=r"not for \[80, 31\]"):
        build_cuda.build(tmp_path, TORCH_ROOT, [80, 31])


def test_nothing_is_built_without_nvcc(tmp_path, monkeypatch):
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: None)
    assert build_cuda.build(tmp_path, TORCH_ROOT) is None
    assert list(tmp_path.iterdir()) == []


def test_nvcc_is_looked_for_in_order(tmp_path, monkeypatch):
    homes = [tmp_path / name for name in ("home", "path")]
    for home in homes:
        (home / "bin").mkdir(parents=True)
        (home / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(homes[1] / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(homes[0]))
    assert build_cuda.find_nvcc() == homes[0] / "bin" / "nvcc"
    monkeypatch.delenv("CUDA_HOME")
    assert build_cuda.find_nvcc() == homes[1] / "bin" / "nvcc"


@needs_nvcc
@needs_compiler
@pytest.mark.parametrize(
    ("symbol", "is_allowed"),
    [
        ("aoti_torch_get_current_cuda_stream", True),
        ("torch_call_dispatcher", True),
        ("_ZN2at4_ops5addmm4callEv", False),
        ("cudaMallocHost_nobody_has", False),
    ],
)
def test_open_symbols_must_be_of_the_stable_abi(tmp_path, symbol, is_allowed):
    source, compiled = tmp_path / "caller.c", tmp_path / "caller.o"
    source.write_text(f"void {symbol}(void); void caller(void) {{ {symbol}(); }}\n")
    subprocess.run(["gcc", "-fPIC", "-c", str(source), "-o", str(compiled)], check=True)
    out = tmp_path / "library.so"
    if is_allowed:
        build_cuda.link(NVCC, [compiled], out, TORCH_ROOT)
        assert symbol in build_cuda.undefined_symbols(out)
    else:
        with pytest.raises(build_cuda.BuildError, match=f"undefined symbols: {symbol}"):
            build_cuda.link(NVCC, [compiled], out, TORCH_ROOT)


@needs_compiler
def test_what_ptxas_says_is_read():
    said = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN10kvcompress3twoIiEEvT_' for 'sm_90'
ptxas info    : Function properties for _ZN10kvcompress3twoIiEEvT_
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 160 bytes smem
ptxas info    : Compile time = 10.959 ms
ptxas info    : Compiling entry function '_Z3onei' for 'sm_80'
ptxas info    : Function properties for _Z3onei
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 29 registers, used 1 barriers, 440 bytes cmem[0]
"""
    assert list(build_cuda.kernel_uses(said)) == [
        build_cuda.KernelUse("two<int>", 90, 40, 32, 16, 160),
        build_cuda.KernelUse("one", 80, 29, 0, 0, 0),
    ]
