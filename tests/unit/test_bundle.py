"""vLLM for a machine without network: what is fetched, and what of it is laid out."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from gpu import bundle

PACK = Path(bundle.__file__).with_name("pack.py")


def wheel(folder, name, version, files, asks=()):
    path = folder / f"{name}-{version}-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in asks]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n\nText")
        for file, content in files.items():
            archive.writestr(file, content)
    return path


@pytest.fixture
def index(tmp_path):
    """Wheels by name, and `fetch` that remembers what was asked for."""
    asks = {
        "top": ["torch==2.13.0", "Left_Pad>=1", "web[fast]<3", 'old; python_version < "3.10"'],
        "left_pad": ['windows-only; sys_platform == "win32"'],
        "web": ["left-pad", 'quick; extra == "fast"', 'slow; extra == "lazy"'],
        "quick": ["web"],
    }
    wheels = {
        name.replace("_", "-"): wheel(tmp_path, name, "1.5", {f"{name}.py": ""}, asked)
        for name, asked in asks.items()
    }
    asked = []

    def fetch(requirement):
        asked.append(str(requirement))
        return wheels[bundle.canonicalize_name(requirement.name)]

    return wheels, fetch, asked


def test_what_is_needed_is_fetched_once(index):
    wheels, fetch, asked = index
    needed = {"left-pad", "web", "quick", "old", "windows-only", "slow"}
    found = bundle.closure(wheels["top"], "3.12", needed, fetch)
    assert found == [wheels["left-pad"], wheels["web"], wheels["quick"]]
    assert asked == ["Left_Pad>=1", "web[fast]<3", "quick"]


def test_nothing_else_is_fetched(index):
    wheels, fetch, _ = index
    assert bundle.closure(wheels["top"], "3.12", {"left-pad"}, fetch) == [wheels["left-pad"]]


def test_requirements_that_contradict_each_other_are_refused(index, tmp_path):
    _, fetch, _ = index
    top = wheel(tmp_path, "other", "1", {}, ["web", "left-pad>=2"])
    with pytest.raises(ValueError, match=r"left_pad-1\.5-py3-none-any\.whl does not meet left-pad"):
        bundle.closure(top, "3.12", {"web", "left-pad"}, fetch)


def test_a_folder_is_an_installation_less_what_is_left_out(tmp_path):
    contents = {f"vllm/file_{i}.py": bytes([i]) * (300 * i) for i in range(9)}
    left_out = {
        "vllm/_flashmla_C.abi3.so": b"x",
        "vllm/third_party/deep_gemm/a/b.h": b"x",
        "vllm-1.data/scripts/vllm": b"x",
    }
    moved = {"vllm-1.data/purelib/vllm/moved.py": b"m"}
    path = wheel(tmp_path, "vllm", "1", {**contents, **left_out, **moved})
    site = tmp_path / "site"
    bundle.install(path, site)
    found = {str(f.relative_to(site)): f.read_bytes() for f in site.rglob("*") if f.is_file()}
    del found["vllm-1.dist-info/METADATA"]
    assert found == {**contents, "vllm/moved.py": b"m"}


def test_libraries_with_gpu_code_are_stripped(tmp_path, monkeypatch):
    is_such = lambda content: content == b"GPU code"  # noqa: E731
    monkeypatch.setattr(bundle.strip_fatbin, "has_gpu_code", is_such)
    monkeypatch.setattr(bundle.strip_fatbin, "strip", lambda content, arch: f"sm_{arch}".encode())
    path = wheel(tmp_path, "vllm", "1", {"a.so": b"GPU code", "b.so": b"plain", "c": b"GPU code"})
    bundle.install(path, tmp_path / "site", 90)
    read = {name: (tmp_path / "site" / name).read_bytes() for name in ("a.so", "b.so", "c")}
    assert read == {"a.so": b"sm_90", "b.so": b"plain", "c": b"GPU code"}


def pack(out, limit, *arguments):
    command = [sys.executable, "-P", str(PACK), str(out), "--limit-mib", limit, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_packed_folder_says_what_is_in_it(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "file").write_text("content")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.sh").write_text("#")
    done = pack(tmp_path / "out", "1", "--part", f"name={tmp_path / 'folder'}")
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "out" / "name.tar.xz") as archive:
        assert archive.extractfile("inner/file").read() == b"content"
    files = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert set(files) == {"name.tar.xz", "run.sh"}
    first = files["name.tar.xz"]["sha256"]
    # The same contents are the same bytes, later too.
    (tmp_path / "folder" / "inner" / "file").touch()
    pack(tmp_path / "out", "1", "--part", f"name={tmp_path / 'folder'}")
    files = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert files["name.tar.xz"]["sha256"] == first


def test_a_folder_over_its_limit_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 3000)
    done = pack(tmp_path, "0.002")
    assert done.returncode == 1
    assert "larger than 0.002 MiB" in done.stderr
