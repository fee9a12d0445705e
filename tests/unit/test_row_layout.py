"""Columns of rows that were compacted any number of times, and the fields that kernels read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.memory.row_layout import CompactionPoint, RowLayout
from vllm_kvcompress.row_descriptor import ROW_FIELDS, RowDescriptor

REPOSITORY = Path(__file__).parents[2]
# Prompt blocks 0 to 4 and the half of block 5; three blocks of region behind block 4. Then up to
# block 11; two blocks of region behind it.
TWICE = (CompactionPoint(5, 3, 4), CompactionPoint(12, 2, 10))


def row_as_it_grows(points, num_blocks):
    """Whose block each column is: a token block's number, or a region's name."""
    row = []
    for block in range(num_blocks):
        for i, point in enumerate(points):
            if point.boundary_block == block:
                row += [f"region {i}"] * point.region_blocks
        row.append(block)
    return row


@st.composite
def points(draw):
    found, first = [], 0
    for _ in range(draw(st.integers(0, 4))):
        kept = first + draw(st.integers(0, 5))
        first = kept + draw(st.integers(0 if found else 1, 3))
        found.append(CompactionPoint(first, draw(st.integers(1, 4)), kept))
    return tuple(found)


def test_a_row_compacted_twice():
    layout = RowLayout(TWICE)
    assert layout.descriptor(200) == RowDescriptor(200, 2, 15, 12, 10)
    assert [layout.column_of(j) for j in (0, 4, 5, 11, 12, 13)] == [0, 4, 8, 14, 17, 18]
    assert layout.num_region_blocks == 5


def test_a_row_compacted_once():
    layout = RowLayout(TWICE[:1])
    assert layout.descriptor(90) == RowDescriptor(90, 3, 5, 5, 4)
    assert [layout.column_of(j) for j in (0, 4, 5)] == [0, 4, 8]


def test_a_dense_row():
    assert RowLayout().descriptor(7) == (7, 0, 0, 0, 0)
    assert RowLayout().column_of(3) == RowLayout().descriptor(7).column_of(3) == 3
    assert RowLayout().region_column == RowLayout().num_region_blocks == 0


@given(points(), st.integers(1, 6))
def test_columns_are_those_of_a_row_that_grows(points, more):
    num_blocks = (points[-1].boundary_block if points else 0) + more
    row = row_as_it_grows(points, num_blocks)
    layout = RowLayout(points)
    assert [row[layout.column_of(j)] for j in range(num_blocks)] == list(range(num_blocks))
    descriptor = layout.descriptor(16 * num_blocks)
    for block in range(descriptor.first_kept_block, num_blocks):
        assert row[descriptor.column_of(block)] == block
    region = slice(layout.region_column, layout.region_column + descriptor.num_region_blocks)
    newest = f"region {len(points) - 1}"
    assert row[region] == [newest] * row.count(newest)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(5, 0, 4)], "one block at least"),
        ([(5, 2, 6)], "between block 0 and the boundary"),
        # A dense block before the first region and one behind it, both before the second.
        ([(5, 3, 4), (12, 2, 4)], "between block 5 and the boundary"),
        ([(12, 2, 10), (5, 3, 4)], "between block 12"),
    ],
)
def test_points_that_no_descriptor_tells(points, message):
    with pytest.raises(ValueError, match=message):
        RowLayout(tuple(CompactionPoint(*point) for point in points))


def names(prefix):
    return [prefix + name.upper() for name in ROW_FIELDS]


def test_triton_reads_the_same_fields():
    source = (REPOSITORY / "triton_kernels" / "paging.py").read_text()
    found = re.findall(r"^(ROW_\w+) = tl\.constexpr\((\d+)\)$", source, re.MULTILINE)
    assert found == [(n, str(i)) for i, n in enumerate([*names("ROW_"), "ROW_WIDTH"])]


def test_csrc_reads_the_same_fields():
    source = (REPOSITORY / "csrc" / "row_fields.h").read_text()
    (body,) = re.findall(r"enum RowField \{(.*?)\}", source, re.DOTALL)
    assert re.findall(r"^ *(\w+)", body, re.MULTILINE) == [*names("ROW_"), "ROW_WIDTH"]
    assert "=" not in body


def test_no_kernel_counts_fields_itself():
    counted = re.compile(r"\brows?\w*\[\d|(\b\d \* request\b)|(\brequest \* \d)|\brow_ptr \+ \d")
    for root, pattern in (("csrc", "*.*"), ("triton_kernels", "*.py")):
        for path in (REPOSITORY / root).rglob(pattern):
            source = "" if path.suffix == ".pyc" else path.read_text()
            is_about_rows = "ROW_" in source or "block_table" in source
            assert not (is_about_rows and counted.search(source)), f"{path} counts fields"


def test_layouts_need_no_torch():
    script = "import sys, vllm_kvcompress.memory.row_layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", script]).returncode == 0
