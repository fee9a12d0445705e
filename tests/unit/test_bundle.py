"""Parts of vLLM for a machine without network: what goes in, and that nothing is lost."""

from __future__ import annotations

import zipfile

import pytest
from gpu import bundle

LIMIT = 4000


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


def test_everything_that_is_needed_is_fetched_once(index):
    wheels, fetch, asked = index
    found = bundle.closure(wheels["top"], "3.12", {"torch"}, fetch)
    assert found == [wheels["left-pad"], wheels["web"], wheels["quick"]]
    assert asked == ["Left_Pad>=1", "web[fast]<3", "quick"]


def test_what_is_there_is_not_fetched(index):
    wheels, fetch, _ = index
    assert bundle.closure(wheels["top"], "3.12", {"torch", "web"}, fetch) == [wheels["left-pad"]]


def test_requirements_that_contradict_each_other_are_refused(index, tmp_path):
    _, fetch, _ = index
    top = wheel(tmp_path, "other", "1", {}, ["web", "left-pad>=2"])
    with pytest.raises(ValueError, match=r"left_pad-1\.5-py3-none-any\.whl does not meet left-pad"):
        bundle.closure(top, "3.12", set(), fetch)


def test_parts_are_an_installation_again(tmp_path):
    contents = {f"vllm/file_{i}.py": bytes([i]) * (300 * i) for i in range(9)}
    left_out = {"vllm/_flashmla_C.abi3.so": b"x", "vllm/third_party/deep_gemm/a/b.h": b"x"}
    moved = {"vllm-1.data/purelib/vllm/moved.py": b"m"}
    path = wheel(tmp_path, "vllm", "1", {**contents, **left_out, **moved})
    parts = bundle.make_parts(bundle.members([path]), LIMIT)
    assert len(parts) == 4
    for number, part in enumerate(parts):
        assert sum(file.num_bytes for file in part) <= LIMIT
        bundle.write_part(part, tmp_path / f"part-{number}.zip")
        with zipfile.ZipFile(tmp_path / f"part-{number}.zip") as archive:
            archive.extractall(tmp_path / "site")
    site = tmp_path / "site"
    found = {
        str(file.relative_to(site)): file.read_bytes() for file in site.rglob("*") if file.is_file()
    }
    del found["vllm-1.dist-info/METADATA"]
    assert found == {**contents, "vllm/moved.py": b"m"}


def test_a_file_that_no_part_takes_is_refused(tmp_path):
    path = wheel(tmp_path, "big", "1", {"big.so": b"x" * 5000})
    with pytest.raises(ValueError, match=r"big\.so has \d+ bytes; a part takes 4000"):
        bundle.make_parts(bundle.members([path]), LIMIT)
