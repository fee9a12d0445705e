"""What setup.py builds, from a copy of the sources."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import build_cpu
import build_cuda
import pytest
import torch
import yaml

from vllm_kvcompress import ops
from vllm_kvcompress.ops import native

ROOT = Path(__file__).parents[2]
PARTS = ("csrc", "triton_kernels", "vllm_kvcompress")

needs_compiler = pytest.mark.skipif(build_cpu.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def sources(tmp_path):
    for part in PARTS:
        skip = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=skip)
    for file in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
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
    for kind in ("CPU", "CUDA"):
        assert f"without the compiled {kind} ops: VLLM_KVCOMPRESS_BUILD=0" in result.stderr
    name, files = wheel_of(sources)
    assert name.endswith("-py3-none-any.whl")
    assert not [file for file in files if file.endswith(".so")]
    assert "vllm_kvcompress/triton_kernels/select.py" in files
    assert "vllm_kvcompress/py.typed" in files
    assert not [file for file in files if file.startswith("triton_kernels")]
    assert [file for file in files if file.endswith(".dist-info/licenses/LICENSE")]
    (archive,) = (sources / "dist").glob("*.tar.gz")
    listed = subprocess.run(["tar", "-tf", archive], capture_output=True, text=True).stdout
    for part in ("build_cuda.py", "cuda/select.cu", "build_cpu.py", "cpu/select.cpp", "cpu/vec.h"):
        assert f"csrc/{part}" in listed
    assert "/LICENSE\n" in listed


@needs_compiler
@pytest.mark.slow
def test_the_wheel_has_what_can_be_built_for_any_python(sources):
    result = build(sources, "1")
    assert result.returncode == 0, result.stderr
    name, files = wheel_of(sources)
    assert "-py3-none-linux_" in name
    assert "vllm_kvcompress/_native_cpu.so" in files
    assert ("vllm_kvcompress/_native_cuda.so" in files) == (build_cuda.find_nvcc() is not None)
    library = sources / "_native_cpu.so"
    (wheel,) = (sources / "dist").glob("*.whl")
    library.write_bytes(zipfile.ZipFile(wheel).read("vllm_kvcompress/_native_cpu.so"))
    script = (
        "from pathlib import Path; from vllm_kvcompress.ops import native; "
        f"native.load('cpu', Path({str(library)!r})); print(*native.instruction_sets())"
    )
    loaded = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert loaded.stdout.split()[-1] == "portable", loaded.stderr


@needs_compiler
@pytest.mark.parametrize("wish", ["", "1"])
def test_a_build_that_fails_is_an_error_where_it_was_wished(sources, wish):
    for pattern in ("*.cpp", "*.cu"):
        for source in (sources / "csrc").rglob(pattern):
            source.write_text("this is no C++")
    result = build(sources, wish)
    assert (result.returncode != 0) == (wish == "1")
    assert "this is no C++" in result.stderr
    if wish == "":
        _, files = wheel_of(sources)
        assert not [file for file in files if file.endswith(".so")]


def test_without_a_compiler_the_reason_is_said(sources):
    empty = sources / "empty"
    empty.mkdir()
    environment = {"PATH": str(empty), "CUDA_HOME": str(empty), "CXX": ""}
    assert "CPU ops: no C++ compiler in $CXX or $PATH" in build(sources, "", **environment).stderr
    result = build(sources, "1", **environment)
    assert result.returncode != 0
    assert "VLLM_KVCOMPRESS_BUILD=1, but no C++ compiler" in result.stderr


@needs_compiler
@pytest.mark.parametrize(("kind", "is_shared"), [("inline", True), ("static inline", False)])
def test_functions_that_object_files_share_are_found(tmp_path, kind, is_shared):
    source, compiled = tmp_path / "one.cpp", tmp_path / "one.o"
    source.write_text(
        f"{kind} int one() {{ return 1; }}\nint (*const user())() {{ return one; }}\n"
    )
    subprocess.run([*build_cpu.find_compiler(), "-c", source, "-o", compiled], check=True)
    assert (build_cpu.weak_symbols(compiled) == ["_Z3onev"]) == is_shared


@needs_compiler
def test_where_a_compiler_is_the_cpu_ops_are_built_and_load():
    assert ops.native_problem("cpu") is None


def test_the_compiled_ops_say_why_they_do_not_run(tmp_path):
    numbers = torch.zeros(1, 2, dtype=torch.int32, device="meta")
    arguments = (torch.zeros(1, 2, 4, device="meta"), numbers[:, 0], numbers, 2)
    with pytest.raises(RuntimeError, match="needs tensors on one of cpu, cuda, got meta"):
        ops.select_entries(*arguments, backend="native")
    with pytest.raises(RuntimeError, match="has no compiled CUDA ops"):
        native.load("cuda", tmp_path / "missing.so")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    with pytest.raises(RuntimeError, match="do not load here"):
        native.load("cuda", broken)
    if not torch.cuda.is_available():
        assert ops.native_problem("cuda") == "no CUDA device"


@needs_compiler
@pytest.mark.parametrize("said", [None, "no kernel image is available for this device"])
def test_a_library_that_has_nothing_for_the_gpu_is_not_used(monkeypatch, tmp_path, said):
    source, library = tmp_path / "says.c", tmp_path / "says.so"
    literal = "0" if said is None else f'"{said}"'
    source.write_text(f"const char* kvc_device_problem(void) {{ return {literal}; }}\n")
    subprocess.run(["gcc", "-fPIC", "-shared", source, "-o", library], check=True)
    monkeypatch.setitem(native._LOADED, "cuda", ctypes.CDLL(str(library)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    problem = ops.native_problem("cuda")
    assert problem == (said and f"the compiled CUDA ops do not run here: {said}")


@needs_compiler
def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"set 'sse9' here; known: .*portable"):
        native.use_instruction_set("sse9")
    script = "from vllm_kvcompress import ops; print(ops.native_problem('cpu'))"
    environment = {**os.environ, "VLLM_KVCOMPRESS_CPU_ISA": "sse9"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True
    )
    assert "$VLLM_KVCOMPRESS_CPU_ISA: no ops for instruction set 'sse9'" in result.stdout


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.name)
def test_issue_forms_can_be_read(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    assert all(field["attributes"]["label"] for field in form["body"])
