"""The state of a request's row: what may follow what, and that it survives being written."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import CompressedRow, RowState
from vllm_kvcompress.memory.row_layout import CompactionPoint, RowLayout

GEOMETRY = KVCompressConfig("snapkv", budget=64, window=16).geometry(16)
POINTS = (CompactionPoint(6, 2, 5), CompactionPoint(9, 3, 8))


@st.composite
def rows(draw):
    prompt_len, block_size = draw(st.integers(1, 10**6)), draw(st.sampled_from([1, 16, 128]))
    num_points = draw(st.integers(0, 3))
    if not num_points:
        states = [state for state in RowState if state is not RowState.COMPACTED]
        return CompressedRow(prompt_len, block_size, draw(st.sampled_from(states)))
    points, boundary = [], 0
    for _ in range(num_points):
        first_kept = boundary + draw(st.integers(0, 50))
        boundary = first_kept + draw(st.integers(0, 50))
        points.append(CompactionPoint(boundary, draw(st.integers(1, 9)), first_kept))
    layout = RowLayout(tuple(points))
    row = CompressedRow(prompt_len, block_size, RowState.COMPACTED, layout)
    if draw(st.booleans()):
        return row
    # Any shares of the region.
    num_streams = draw(st.integers(1, 12))
    num_pages = points[-1].region_blocks * num_streams
    cuts = sorted(draw(st.lists(st.integers(0, num_pages), min_size=num_streams - 1, max_size=12)))
    ends = [0, *cuts[: num_streams - 1], num_pages]
    return row.with_page_counts([b - a for a, b in itertools.pairwise(ends)])


@given(rows())
def test_what_is_written_is_read_back(row):
    written = row.to_dict()
    text = json.dumps(written)
    assert json.loads(text) == written
    assert CompressedRow.from_dict(json.loads(text)) == row


def test_a_row_begins_whole_dense_or_in_one_shot():
    short, long = GEOMETRY.of(64), GEOMETRY.of(100)
    assert CompressedRow.begin(short) == CompressedRow(64, 16, RowState.WHOLE)
    assert CompressedRow.begin(long) == CompressedRow(100, 16, RowState.DENSE)
    one_shot = CompressedRow.begin(long, is_one_shot=True)
    assert one_shot.is_one_shot and not one_shot.is_compacted
    with pytest.raises(ValueError, match="64 tokens evicts nothing"):
        CompressedRow.begin(short, is_one_shot=True)


@pytest.mark.parametrize("is_one_shot", [False, True])
def test_a_row_is_compacted_again_and_again(is_one_shot):
    before = CompressedRow.begin(GEOMETRY.of(100), is_one_shot)
    once = before.compacted(GEOMETRY.of(100).point)
    assert once.is_compacted and not once.is_one_shot and len(once.layout.points) == 1
    assert once.layout == GEOMETRY.of(100).layout == RowLayout(POINTS[:1])
    counted = once.with_page_counts([2, 2, 3, 1])
    assert counted.page_counts == (2, 2, 3, 1)
    # The newest region's pages are not those of the one before.
    twice = counted.compacted(POINTS[1])
    assert twice.layout.points == POINTS and twice.page_counts is None
    assert before == CompressedRow.begin(GEOMETRY.of(100), is_one_shot)


def test_what_cannot_be_is_refused():
    dense = CompressedRow.begin(GEOMETRY.of(100))
    once = dense.compacted(POINTS[0])
    with pytest.raises(ValueError, match="stays whole"):
        CompressedRow.begin(GEOMETRY.of(64)).compacted(POINTS[0])
    with pytest.raises(ValueError, match="dense blocks must start between block 6"):
        once.compacted(POINTS[0])
    with pytest.raises(ValueError, match="'dense' has no pages"):
        dense.with_page_counts([1])
    for counts in ([], [3, 3], [5, -1], [2, 1]):
        with pytest.raises(ValueError, match="region of 2 blocks"):
            once.with_page_counts(counts)
    for prompt_len, block_size in ((0, 16), (100, 0)):
        with pytest.raises(ValueError, match="at least one token"):
            CompressedRow(prompt_len, block_size, RowState.DENSE)
    for state, layout in ((RowState.COMPACTED, RowLayout()), (RowState.DENSE, once.layout)):
        with pytest.raises(ValueError, match="compactions cannot be"):
            CompressedRow(100, 16, state, layout)


ROW = CompressedRow.begin(GEOMETRY.of(100)).compacted(POINTS[0]).with_page_counts([2, 2])


@pytest.mark.parametrize("name", sorted(ROW.to_dict()))
def test_a_state_with_a_part_missing_or_of_another_type_is_refused(name):
    written = ROW.to_dict()
    missing = {key: value for key, value in written.items() if key != name}
    with pytest.raises(ValueError, match="version"):
        CompressedRow.from_dict(missing)
    for wrong in ("?", 1.5, True, {}, [None], [1.5], -1):
        with pytest.raises(ValueError, match=r"row|points|compact"):
            CompressedRow.from_dict({**written, name: wrong})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"version": 2, "more": 1}, "version 2; only 1", id="version"),
        pytest.param({"version": None}, "version None", id="no_version"),
        pytest.param({"state": "frozen"}, "not 'frozen'", id="state"),
        pytest.param({"state": "dense"}, "1 compactions cannot be 'dense'", id="contradiction"),
        pytest.param({"points": []}, "0 compactions cannot be 'compacted'", id="no_points"),
        pytest.param({"slot": 3}, "slot", id="unknown_key"),
        pytest.param({"prompt_len": 100.0}, "whole, not 100.0", id="fraction"),
        pytest.param({"block_size": True}, "whole, not True", id="truth"),
        pytest.param({"page_counts": [2, 3]}, "with 4 pages, not with 5", id="pages"),
        pytest.param({"points": [{"boundary_block": 6}]}, "a compaction point has", id="point"),
        pytest.param({"points": [7]}, "a compaction point is a mapping", id="number_for_a_point"),
    ],
)
def test_a_written_state_that_is_none_is_refused(change, words):
    written = ROW.to_dict()
    before = copy.deepcopy(written)
    with pytest.raises(ValueError, match=words):
        CompressedRow.from_dict({**written, **change})
    assert written == before
    with pytest.raises(ValueError, match="a row is a mapping"):
        CompressedRow.from_dict([written])
