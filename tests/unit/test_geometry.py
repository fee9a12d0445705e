"""Where a request's blocks lie in its row, by named cases and by random ones."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.memory import Geometry, Retention, Schedule, cdiv, shared_geometry

BLOCK_SIZES = (16, 32, 64, 128)


def config_of(suffix=0, recent=None, **setting):
    options = {"suffix_tokens": suffix}
    if recent is None:
        return KVCompressConfig("snapkv", options=tuple(options.items()), **setting)
    options["recent_tokens"] = recent
    return KVCompressConfig("span", options=tuple(options.items()), **setting)


def geometry_of(prompt_len, block_size=16, **setting):
    return config_of(**setting).geometry(block_size).of(prompt_len)


@st.composite
def geometries(draw):
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    window = draw(st.integers(1, 100))
    recent = draw(st.one_of(st.none(), st.integers(1, 120)))
    always_kept = window if recent is None else min(window, recent)
    suffix = draw(st.one_of(st.just(0), st.integers(1, 400)))
    if draw(st.booleans()):
        size = {"budget": draw(st.integers(always_kept + block_size, 2000))}
    else:
        size = {"ratio": draw(st.floats(0, 1, exclude_max=True))}
    return config_of(suffix, recent, window=window, **size).geometry(block_size)


requests = st.tuples(geometries(), st.integers(1, 5000))


def row_index(geometry, position):
    """Column of the block that holds a token."""
    return geometry.layout.column_of(position // geometry.block_size)


def suffix_of(geometry):
    return geometry.schedule.suffix_tokens


@pytest.mark.parametrize(
    ("prompt_len", "first_kept_block", "num_region_blocks", "boundary_block"),
    [
        pytest.param(1000, 60, 13, 62, id="partial_last_block"),
        pytest.param(1024, 62, 14, 64, id="prompt_of_whole_blocks"),
        pytest.param(1025, 62, 13, 64, id="one_token_past_whole_blocks"),
        pytest.param(1023, 61, 13, 63, id="one_token_short_of_whole_blocks"),
        pytest.param(257, 14, 13, 16, id="one_token_over_the_budget"),
    ],
)
def test_named_geometries(prompt_len, first_kept_block, num_region_blocks, boundary_block):
    geometry = geometry_of(prompt_len, budget=256, window=32)
    assert geometry.first_kept_block == first_kept_block
    assert geometry.num_region_blocks == num_region_blocks
    assert geometry.boundary_block == boundary_block
    assert geometry.num_candidate_tokens == first_kept_block * 16
    assert geometry.num_dense_prompt_tokens == prompt_len - first_kept_block * 16
    assert geometry.num_tail_tokens == geometry.num_dense_prompt_tokens
    assert geometry.compact_len == prompt_len
    num_evicted_blocks = first_kept_block - num_region_blocks
    assert geometry.num_kept_tokens == prompt_len - num_evicted_blocks * 16
    assert geometry.first_kept_block - geometry.num_region_blocks == num_evicted_blocks


def test_row_of_a_prompt_with_a_partial_last_block():
    geometry = geometry_of(1000, budget=256, window=32)
    assert [geometry.num_row_blocks(n) for n in (1, 16, 17, 992)] == [1, 1, 2, 62]
    # Token 992 is the first behind the region, and is computed before the prompt ends.
    assert [geometry.num_row_blocks(n) for n in (993, 1000, 1008, 1009)] == [76, 76, 76, 77]
    assert [row_index(geometry, p) for p in (0, 991, 992, 999, 1008)] == [0, 61, 75, 75, 76]
    assert geometry.num_row_blocks(geometry.prompt_len) == 76


def test_row_of_a_prompt_of_whole_blocks():
    geometry = geometry_of(1024, budget=256, window=32)
    assert [geometry.num_row_blocks(n) for n in (1008, 1023, 1024, 1025)] == [63, 64, 78, 79]
    assert [row_index(geometry, p) for p in (1023, 1024)] == [63, 78]
    assert geometry.num_row_blocks(geometry.prompt_len) == 78


@pytest.mark.parametrize(
    ("prompt_len", "block_size", "setting"),
    [
        pytest.param(32, 16, {"budget": 64}, id="prompt_is_the_window"),
        pytest.param(7, 16, {"ratio": 0.9}, id="prompt_shorter_than_the_window"),
        pytest.param(1000, 16, {"budget": 1000}, id="budget_equals_the_prompt"),
        pytest.param(1000, 16, {"budget": 5000}, id="budget_above_the_prompt"),
        pytest.param(1000, 16, {"ratio": 0}, id="ratio_0"),
        pytest.param(500, 16, {"ratio": 0.001}, id="ratio_of_less_than_a_token"),
        pytest.param(200, 128, {"ratio": 0.9}, id="one_candidate_page"),
        pytest.param(300, 16, {"ratio": 0.5, "suffix": 300}, id="prompt_is_the_suffix"),
        pytest.param(200, 16, {"ratio": 0.5, "suffix": 500}, id="prompt_shorter_than_the_suffix"),
        pytest.param(532, 16, {"ratio": 0.5, "suffix": 500}, id="suffix_and_window"),
        pytest.param(800, 16, {"budget": 300, "suffix": 500}, id="budget_equals_the_context"),
        pytest.param(800, 16, {"ratio": 0.003, "suffix": 500}, id="ratio_of_less_than_a_token"),
    ],
)
def test_stays_dense(prompt_len, block_size, setting):
    geometry = geometry_of(prompt_len, block_size, **setting)
    assert not geometry.is_compressed
    assert geometry.num_region_blocks == geometry.first_kept_block == 0
    assert geometry.num_kept_tokens == geometry.num_dense_prompt_tokens == prompt_len
    # There is no compaction point before the prompt's end where nothing is compacted.
    assert geometry.compact_len == geometry.num_tail_tokens == prompt_len
    for num_tokens in range(1, prompt_len + 2 * block_size):
        assert geometry.num_row_blocks(num_tokens) == cdiv(num_tokens, block_size)
        assert row_index(geometry, num_tokens) == num_tokens // block_size


def test_one_token_above_a_dense_prompt_is_compressed():
    assert not geometry_of(256, budget=256).is_compressed
    assert geometry_of(257, budget=256).is_compressed
    assert not geometry_of(256 + 99, budget=256, suffix=99).is_compressed
    assert geometry_of(257 + 99, budget=256, suffix=99).is_compressed


# The compaction point in the middle of a block, at a block's end, and one token past it; the
# prompt's end likewise.
@pytest.mark.parametrize("compact_len", [1000, 1023, 1024, 1025])
@pytest.mark.parametrize("suffix", [1, 15, 16, 17, 24, 40, 600])
@pytest.mark.parametrize("size", [{"budget": 256}, {"ratio": 0.7}], ids=["budget", "ratio"])
def test_a_suffix_changes_nothing_before_the_compaction_point(compact_len, suffix, size):
    without = geometry_of(compact_len, window=32, **size)
    geometry = geometry_of(compact_len + suffix, window=32, suffix=suffix, **size)
    assert geometry.compact_len == compact_len
    for name in (
        "first_kept_block",
        "num_region_blocks",
        "boundary_block",
        "num_candidate_tokens",
        "num_tail_tokens",
    ):
        assert getattr(geometry, name) == getattr(without, name)
    # The suffix itself is never evicted and comes on top of what was asked.
    assert geometry.num_dense_prompt_tokens == without.num_dense_prompt_tokens + suffix
    assert geometry.num_kept_tokens == without.num_kept_tokens + suffix
    for num_tokens in range(1, compact_len + suffix + 50):
        assert geometry.num_row_blocks(num_tokens) == without.num_row_blocks(num_tokens)
        assert row_index(geometry, num_tokens) == row_index(without, num_tokens)


def test_row_of_a_prompt_with_a_suffix_of_several_blocks():
    # 1040 tokens, of which 40 after the compaction point at 1000: the row is that of a prompt
    # of 1000 whose first 40 generated tokens are given.
    geometry = geometry_of(1040, budget=256, window=32, suffix=40)
    assert (geometry.first_kept_block, geometry.boundary_block) == (60, 62)
    assert geometry.num_region_blocks == 13
    assert (geometry.num_tail_tokens, geometry.num_dense_prompt_tokens) == (40, 80)
    assert [geometry.num_row_blocks(n) for n in (992, 993, 1000, 1008)] == [62, 76, 76, 76]
    assert [geometry.num_row_blocks(n) for n in (1009, 1025, 1040, 1041)] == [77, 78, 78, 79]
    assert [row_index(geometry, p) for p in (991, 992, 1007, 1008, 1039)] == [61, 75, 75, 76, 77]


def test_region_comes_with_the_compaction_point_and_not_with_the_prompts_end():
    geometry = geometry_of(1056, budget=256, window=32, suffix=32)
    assert geometry.num_region_blocks == 14
    assert [geometry.num_row_blocks(n) for n in (1023, 1024, 1025)] == [64, 78, 79]
    assert [row_index(geometry, p) for p in (1023, 1024)] == [63, 78]


def test_tokens_of_the_window_compete_but_for_the_recent_ones():
    # 1000 - 8 = 992 tokens are 62 pages, and the window begins in page 60.
    geometry = geometry_of(1000, budget=256, window=32, recent=8)
    assert (geometry.first_kept_block, geometry.num_region_blocks) == (62, 15)
    assert geometry.num_tail_tokens == 8
    # A prompt that the window covers has no query from outside the candidates.
    assert not geometry_of(32, ratio=0.9, window=32, recent=8).is_compressed


def test_budget_below_window_and_one_page_is_refused_with_all_numbers():
    config = KVCompressConfig("snapkv", budget=47, window=32)
    with pytest.raises(KVCompressConfigError, match=r"47 .*32 \+ 16 = 48"):
        config.geometry(16)
    with pytest.raises(ValueError, match=r"47 .*32 \+ 16 = 48"):
        Geometry(config.retention, config.schedule, 16)
    enough = KVCompressConfig("snapkv", budget=48, window=32)
    assert enough.geometry(16).of(1000).is_compressed


@pytest.mark.parametrize(
    ("ratio", "least", "most"), [(0.875, 0.124, 0.126), (0.9375, 0.0615, 0.0635)]
)
def test_a_ratio_is_met_on_average(ratio, least, most):
    """Over prompts of all lengths, in the blocks that a CPU has by default."""
    geometries_ = KVCompressConfig("span", ratio=ratio).geometry(32)
    lengths = range(1024, 2048)
    kept = sum(geometries_.of(length).num_kept_tokens for length in lengths)
    assert least <= kept / sum(lengths) <= most


@given(requests)
def test_kept_tokens_stay_within_what_was_asked(request):
    geometries_, prompt_len = request
    retention, block_size = geometries_.retention, geometries_.block_size
    geometry = geometries_.of(prompt_len)
    if not geometry.is_compressed:
        return
    compact_len = prompt_len - suffix_of(geometries_)
    kept = geometry.num_kept_tokens - suffix_of(geometries_)
    asked = retention.num_tokens(compact_len)
    if geometry.num_region_blocks == 1:
        assert kept < retention.recent_tokens + 2 * block_size
    elif retention.ratio is None:
        assert kept <= asked
    else:
        assert kept <= asked + block_size / 2
    # Nor is more left unused than rounding to whole pages takes.
    unused = block_size if retention.ratio is None else block_size // 2 + 1
    assert kept > asked - unused
    assert kept < compact_len == geometry.compact_len
    assert geometry.first_kept_block - geometry.num_region_blocks >= 1


@given(requests)
def test_recent_tokens_are_always_dense(request):
    geometries_, prompt_len = request
    geometry = geometries_.of(prompt_len)
    recent = geometries_.retention.recent_tokens
    assert geometry.num_dense_prompt_tokens >= min(recent, prompt_len)
    if geometry.is_compressed:
        assert recent <= geometry.num_tail_tokens < recent + geometries_.block_size
        suffix = suffix_of(geometries_)
        assert geometry.num_dense_prompt_tokens == geometry.num_tail_tokens + suffix


@given(requests)
def test_every_position_has_its_own_slot_outside_the_region(request):
    geometries_, prompt_len = request
    geometry = geometries_.of(prompt_len)
    boundary = geometry.boundary_block
    region = range(boundary, boundary + geometry.num_region_blocks)
    block_size = geometries_.block_size
    last = prompt_len + 3 * block_size
    indices = [row_index(geometry, p) for p in range(0, last, block_size)]
    assert len(set(indices)) == len(indices)
    assert not set(indices) & set(region)
    for position in range(last):
        assert row_index(geometry, position) == indices[position // block_size]


@given(requests)
def test_row_grows_in_order_and_holds_every_position(request):
    geometries_, prompt_len = request
    geometry = geometries_.of(prompt_len)
    boundary, num_region = geometry.boundary_block, geometry.num_region_blocks
    previous = 0
    for num_tokens in range(1, prompt_len + 2 * geometries_.block_size):
        length = geometry.num_row_blocks(num_tokens)
        assert length >= previous
        # The row ends with the last token's block, or with the region that follows it.
        last_index = row_index(geometry, num_tokens - 1)
        assert length in (last_index + 1, last_index + 1 + num_region)
        # Anything past the prompt's full blocks implies the whole region.
        assert length <= boundary or length >= boundary + num_region
        if num_tokens >= geometry.compact_len:
            assert length >= boundary + num_region
        previous = length


@pytest.mark.parametrize(
    ("max_model_len", "num_region_blocks"),
    [
        pytest.param(256, 0, id="all_dense"),
        pytest.param(257, 13, id="one_compressed_prompt"),
        pytest.param(1024, 14, id="largest_region_at_the_end"),
        pytest.param(1039, 14, id="largest_region_a_block_before_the_end"),
        pytest.param(1040, 14, id="largest_region_again"),
    ],
)
def test_largest_region(max_model_len, num_region_blocks):
    geometries_ = KVCompressConfig("snapkv", budget=256, window=32).geometry(16)
    assert geometries_.max_region_blocks(max_model_len) == num_region_blocks
    num_blocks = cdiv(max_model_len, 16) + num_region_blocks
    assert geometries_.max_request_blocks(max_model_len) == num_blocks
    with_suffix = config_of(100, budget=256, window=32).geometry(16)
    assert with_suffix.max_region_blocks(max_model_len + 100) == num_region_blocks


@given(geometries(), st.integers(1, 1600))
def test_bounds_hold_for_every_prompt_up_to_max_model_len(geometries_, max_model_len):
    requests_ = [geometries_.of(n) for n in range(1, max_model_len + 1)]
    largest = max(request.num_region_blocks for request in requests_)
    assert geometries_.max_region_blocks(max_model_len) == largest
    bound = geometries_.max_request_blocks(max_model_len)
    assert bound == cdiv(max_model_len, geometries_.block_size) + largest
    assert max(request.num_row_blocks(max_model_len) for request in requests_) <= bound
    assert max(r.num_row_blocks(r.prompt_len) for r in requests_) <= bound
    # What a resumed request is admitted by: the largest region of any prompt within it.
    for request in requests_[:: geometries_.block_size]:
        shorter = geometries_.max_region_blocks(request.prompt_len)
        assert request.num_region_blocks <= shorter <= largest


@given(st.sampled_from(BLOCK_SIZES), st.integers(1, 3000), st.integers(0, 3000))
def test_budget_above_the_prompt_or_ratio_0_stays_dense(block_size, prompt_len, spare):
    budget = max(prompt_len + spare, 32 + block_size)
    assert not geometry_of(prompt_len, block_size, budget=budget).is_compressed
    assert not geometry_of(prompt_len, block_size, ratio=0.0).is_compressed


@pytest.mark.parametrize(("a", "b", "expected"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_cdiv(a, b, expected):
    assert cdiv(a, b) == expected


@pytest.mark.parametrize(
    ("suffix", "prompt_len", "points"),
    [
        (0, 1, (1,)),
        (0, 1000, (1000,)),
        (40, 1000, (960,)),
        (40, 41, (1,)),
        (40, 40, ()),
        (40, 9, ()),
    ],
)
def test_a_schedule_has_one_point_before_the_suffix(suffix, prompt_len, points):
    assert Schedule(suffix).points(prompt_len) == points
    config = KVCompressConfig("snapkv", options=(("suffix_tokens", suffix),))
    assert config.schedule == Schedule(suffix)


def test_a_retention_has_a_budget_or_a_ratio():
    for budget, ratio in ((None, None), (100, 0.5)):
        with pytest.raises(ValueError, match=f"{budget}.*{ratio}"):
            Retention(32, 32, budget, ratio)
    config = KVCompressConfig("span", ratio=0.5, window=16, options=(("recent_tokens", 4),))
    assert config.retention == Retention(window=16, recent_tokens=4, ratio=0.5)


def test_settings_that_keep_as_much_share_one_geometry():
    span, other = (KVCompressConfig(method, budget=512, window=16) for method in ("kvc", "snapkv"))
    geometry = span.geometry(32)
    assert other.geometry(32) is geometry is span.geometry(32)
    assert geometry is shared_geometry(span.retention, span.schedule, 32)
    # A request of any other setting has its own.
    different = (
        span.geometry(16),
        KVCompressConfig("kvc", budget=513, window=16).geometry(32),
        KVCompressConfig("kvc", budget=512, window=17).geometry(32),
        config_of(suffix=1, budget=512, window=16).geometry(32),
    )
    assert len({id(geometry), *map(id, different)}) == 5


def test_a_setting_that_has_been_used_is_equal_to_a_new_one_and_pickles():
    used, new = (KVCompressConfig("snapkv", budget=512) for _ in range(2))
    used.geometry(32).of(1000)
    assert used.one_shot == new.one_shot
    again = pickle.loads(pickle.dumps(used))
    assert used == new == again and hash(used) == hash(again)
    assert again.geometry(32) is used.geometry(32)
