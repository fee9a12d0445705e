"""GPU code of other architectures leaves a library, and nothing else changes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import build_cuda
import pytest
import triton
from gpu import strip_fatbin

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
KERNEL = """
__global__ void scale(float* x, float by) { x[threadIdx.x] *= by; }
extern "C" int launch(float* x) { scale<<<1, 32>>>(x, 2.0f); return (int)cudaGetLastError(); }
"""
ONLY_FOR_OTHERS = "__global__ void shift(float* x) { x[threadIdx.x] += 1; }"


def compiled(folder, name, source, *targets):
    path = folder / f"{name}.cu"
    path.write_text(source)
    out = path.with_suffix(".o")
    command = [str(build_cuda.find_nvcc()), "-c", "-Xcompiler", "-fPIC", str(path), "-o", str(out)]
    subprocess.run([*command, *(f"-gencode={target}" for target in targets)], check=True)
    return out


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A library with a source file for three architectures, and one for another GPU only."""
    if build_cuda.find_nvcc() is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("library")
    code = [f"arch=compute_{arch},code=sm_{arch}" for arch in (80, 90, 100)]
    several = compiled(folder, "several", KERNEL, *code, "arch=compute_80,code=compute_80")
    other = compiled(folder, "other", ONLY_FOR_OTHERS, code[2])
    out = folder / "library.so"
    command = [str(build_cuda.find_nvcc()), "-shared", "-nodlink", str(several), str(other), "-o"]
    subprocess.run([*command, str(out)], check=True)
    return out


def listed(path: Path, what: str) -> list[str]:
    said = subprocess.run([str(CUOBJDUMP), what, str(path)], capture_output=True, text=True)
    return sorted(re.findall(r"\.(sm_\d+)\.(?:cubin|ptx)", said.stdout))


def stripped(library, folder, arch=90):
    out = folder / "stripped.so"
    out.write_bytes(strip_fatbin.strip(library.read_bytes(), arch))
    return out


def test_only_code_for_the_gpu_is_left(library, tmp_path):
    assert set(listed(library, "--list-elf")) == {"sm_80", "sm_90", "sm_100"}
    assert listed(library, "--list-ptx") == ["sm_80"]
    out = stripped(library, tmp_path)
    # The file for another GPU holds such code still, as small as there is.
    found = listed(out, "--list-elf")
    assert found.count("sm_90") == listed(library, "--list-elf").count("sm_90")
    assert len(found) - found.count("sm_90") == 1
    assert listed(out, "--list-ptx") == []


def test_the_code_is_the_same(library, tmp_path):
    for path in (library, stripped(library, tmp_path)):
        shutil.copy(path, tmp_path / "any.so")
        command = [str(CUOBJDUMP), "--dump-sass", "--gpu-architecture", "sm_90"]
        said = subprocess.run([*command, str(tmp_path / "any.so")], capture_output=True, text=True)
        assert "scale" in said.stdout
        (tmp_path / path.name).with_suffix(".sass").write_text(said.stdout)
    sass = [(tmp_path / name).read_text() for name in ("library.sass", "stripped.sass")]
    # Which number a file has among all of them is not the code's.
    one, other = (re.sub(r"any\.\d+\.", "", text) for text in sass)
    assert one == other


def test_nothing_moves_and_nothing_outside_changes(library):
    before = library.read_bytes()
    after = strip_fatbin.strip(before, 90)
    start, end = strip_fatbin.section_bounds(before)
    assert len(after) == len(before)
    assert after[:start] == before[:start] and after[end:] == before[end:]
    assert [c.start for c in strip_fatbin.containers(after)] == [
        c.start for c in strip_fatbin.containers(before)
    ]
    assert after.count(0) > before.count(0)


def test_small_ptx_stays_where_there_is_no_code(library, monkeypatch):
    before = library.read_bytes()
    (several,) = [c for c in strip_fatbin.containers(before) if len(c.entries) == 4]
    assert [(e.kind, e.arch) for e in strip_fatbin.kept(several, 75)] == []
    # 8.6 runs 8.0's code; of 12.0 only PTX is of use.
    assert [e.arch for e in strip_fatbin.kept(several, 86)] == [80]
    (ptx,) = strip_fatbin.kept(several, 120)
    assert (ptx.kind, ptx.arch) == (strip_fatbin.PTX, 80)
    monkeypatch.setattr(strip_fatbin, "MAX_PTX_BYTES", 8)
    assert strip_fatbin.kept(several, 120) == []


def test_what_is_no_such_library_is_refused():
    with pytest.raises(ValueError, match="not a 64-bit little-endian ELF"):
        strip_fatbin.strip(b"text", 90)
    assert not strip_fatbin.has_gpu_code(b"text")
    python = Path(shutil.which("true") or "/bin/true").read_bytes()
    with pytest.raises(ValueError, match=r"no section \.nv_fatbin"):
        strip_fatbin.strip(python, 90)
    assert not strip_fatbin.has_gpu_code(python)
