"""docs/architecture.md draws what is there."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_kvcompress import ops

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_kvcompress"
TEXT = (ROOT / "docs" / "architecture.md").read_text()
# Words of the pictures: their boxes, notes and arrows.
PICTURES = re.findall(r"^```mermaid\n(.*?)^```", TEXT, re.M | re.S)


def test_every_part_of_the_package_is_in_the_first_picture():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    parts = {part for part in parts if not part.startswith("_")}
    words = set(re.findall(r"\w+", PICTURES[0]))
    assert sorted(parts - words) == []


def test_what_the_pictures_name_is_there():
    text = "\n".join(PICTURES)
    modules = {path.stem for path in PACKAGE.rglob("*.py")} | {"triton_kernels"}
    named = set(re.findall(r"\b([a-z]+_[a-z_]+)\b(?!\()", text))
    named -= {name for name in named if hasattr(ops, name)}
    methods = {"get_num_blocks_to_allocate", "remove_skipped_blocks"}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert sorted(named - modules - methods - folders) == []
    for name in re.findall(r"\bops\.(\w+)", text):
        assert hasattr(ops, name), name
    sources = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    for name in re.findall(r": ([A-Z]\w+)<|: ([A-Z]\w+)\n|: ([A-Z]\w+)\"", text):
        (name,) = filter(None, name)
        assert f"class {name}" in sources, name
