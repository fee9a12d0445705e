"""Shares of pages: among places, layers and heads; every total is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies.budgets import apportion, head_pages, layer_pages
from vllm_kvcompress.policies.selection import select


@pytest.mark.parametrize(
    ("ideal", "total", "lower", "upper", "expected"),
    [
        pytest.param([1.5, 2.5, 3.0], 7, 0, 9, [2, 2, 3], id="equal_remainders_to_the_first"),
        pytest.param([1.2, 2.7, 3.1], 7, 0, 9, [1, 3, 3], id="largest_remainder"),
        pytest.param([0.1, 0.2, 5.7], 6, 1, 9, [1, 1, 4], id="lower_bound_paid_by_the_rest"),
        pytest.param([9.0, 1.0], 10, 0, 6, [6, 4], id="upper_bound_given_to_the_rest"),
        pytest.param([2.0, 2.0], 4, 2, 2, [2, 2], id="no_room"),
        pytest.param([0.0], 3, 1, 5, [3], id="one_place"),
    ],
)
def test_apportion_by_hand(ideal, total, lower, upper, expected):
    assert apportion(ideal, total, lower, upper) == expected


@given(
    st.lists(st.floats(0, 40), min_size=1, max_size=40),
    st.integers(0, 5),
    st.integers(0, 30),
    st.data(),
)
def test_apportion_is_exact_and_bounded(ideal, lower, extra, data):
    upper = lower + extra
    total = data.draw(st.integers(len(ideal) * lower, len(ideal) * upper))
    shares = apportion(ideal, total, lower, upper)
    assert sum(shares) == total
    assert all(lower <= share <= upper for share in shares)


@given(st.lists(st.floats(1, 40), min_size=1, max_size=40))
def test_apportion_moves_no_share_by_a_whole_page(ideal):
    total = round(sum(ideal))
    shares = apportion(ideal, total, 0, 100)
    assert all(abs(share - x) <= 1 for share, x in zip(shares, ideal, strict=True))


@pytest.mark.parametrize("total", [2, 10])
def test_apportion_refuses_what_the_bounds_cannot_hold(total):
    with pytest.raises(ValueError, match=f"{total} pages among 3 places of 1 to 3 pages"):
        apportion([1.0, 1.0, 1.0], total, 1, 3)


@pytest.mark.parametrize("num_layers", [2, 30, 32, 80])
@pytest.mark.parametrize("mean_pages", [1, 2, 3, 4, 7, 8, 16, 63, 128])
@pytest.mark.parametrize("room", [0, 1, 5, 1000])
def test_pyramid_is_exact_and_falls(num_layers, mean_pages, room):
    max_pages = 2 * mean_pages + room
    pages = layer_pages("pyramid", mean_pages, num_layers, max_pages)
    assert sum(pages) == mean_pages * num_layers
    assert pages == sorted(pages, reverse=True)
    assert pages[-1] >= 1
    assert pages[0] <= max_pages


def test_pyramid_by_hand():
    # Mean 8 and beta 4: from 14 down to 2 in steps of 2.
    assert layer_pages("pyramid", 8, 7, 100, beta=4.0) == [14, 12, 10, 8, 6, 4, 2]
    # The paper's form at 80 layers and 128 tokens of 16-token pages, authors' code: +27 %.
    pages = layer_pages("pyramid", 8, 80, 1000)
    assert sum(pages) == 640
    assert (pages[0], pages[-1]) == (16, 1)


@given(
    st.integers(1, 100),
    st.integers(1, 60),
    st.integers(0, 400),
    st.floats(1, 1000),
)
def test_layer_pages_of_any_pyramid(mean_pages, num_layers, room, beta):
    max_pages = mean_pages + room
    pages = layer_pages("pyramid", mean_pages, num_layers, max_pages, beta)
    assert sum(pages) == mean_pages * num_layers
    assert pages == sorted(pages, reverse=True)
    assert all(1 <= count <= max_pages for count in pages)


@pytest.mark.parametrize("max_pages", [16, 17])
def test_steepest_pyramid_reaches_the_candidates_and_keeps_the_mean(max_pages):
    # A top of nearly twice the mean meets a prompt of just that many candidate pages.
    pages = layer_pages("pyramid", 8, 32, max_pages, beta=1000.0)
    assert pages[0] == 16
    assert sum(pages) == 8 * 32


@pytest.mark.parametrize("num_layers", [1, 2, 31])
def test_beta_1_is_uniform(num_layers):
    assert layer_pages("pyramid", 6, num_layers, 500, beta=1.0) == [6] * num_layers


@pytest.mark.parametrize(
    ("schedule", "num_layers", "max_pages"),
    [
        pytest.param("uniform", 30, 1000, id="uniform_schedule"),
        pytest.param("pyramid", 30, 15, id="prompt_shorter_than_twice_the_mean"),
        pytest.param("pyramid", 1, 1000, id="one_layer"),
    ],
)
def test_uniform_layers(schedule, num_layers, max_pages):
    assert layer_pages(schedule, 8, num_layers, max_pages) == [8] * num_layers


def ramp(num_heads, num_entries):
    """Distinct scores, head by head interleaved, so that no head is better than another."""
    return torch.arange(num_heads * num_entries).view(num_entries, num_heads).t().float()


def test_uniform_heads_ignore_scores():
    scores = torch.zeros(3, 20)
    scores[1] = 9.0
    assert head_pages("uniform", scores, 4, 1) == [4, 4, 4]


@pytest.mark.parametrize("page_size", [1, 16])
def test_ada_shares_evenly_among_equally_good_heads(page_size):
    assert head_pages("ada", ramp(4, 20 * page_size), 5, page_size) == [5, 5, 5, 5]


@pytest.mark.parametrize("page_size", [1, 16])
def test_ada_shares_evenly_when_all_scores_are_equal(page_size):
    scores = torch.full((4, 20 * page_size), 0.25)
    assert head_pages("ada", scores, 5, page_size) == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("page_size", "alpha", "expected"),
    [
        pytest.param(1, 0.0, [1, 37, 1, 1], id="one_page_at_least"),
        pytest.param(1, 0.2, [2, 34, 2, 2], id="default"),
        pytest.param(1, 0.55, [5, 25, 5, 5], id="guarantee_rounded_down"),
        pytest.param(1, 1.0, [10, 10, 10, 10], id="all_guaranteed"),
        pytest.param(16, 0.0, [1, 37, 1, 1], id="one_page_at_least_by_tokens"),
        pytest.param(16, 0.2, [2, 34, 2, 2], id="default_by_tokens"),
        # 88 tokens each are 5.5 pages; two of the halves make a page.
        pytest.param(16, 0.55, [6, 24, 5, 5], id="half_pages_by_tokens"),
        pytest.param(16, 1.0, [10, 10, 10, 10], id="all_guaranteed_by_tokens"),
    ],
)
def test_one_dominating_head_gets_all_but_the_guarantee(page_size, alpha, expected):
    scores = torch.rand(4, 50 * page_size, generator=torch.Generator().manual_seed(0))
    scores[1] += 10
    assert head_pages("ada", scores, 10, page_size, alpha) == expected


def test_dominating_head_is_bounded_by_its_candidates():
    scores = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    scores[0] += 10
    assert head_pages("ada", scores, 8, 1) == [12, 4]


@given(
    st.integers(1, 6),
    st.integers(1, 8),
    st.integers(0, 12),
    st.sampled_from([1, 4]),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_ada_is_exact_and_leaves_no_head_empty(num_heads, mean, room, page_size, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    num_pages = mean + room
    skew = torch.rand(num_heads, 1, generator=generator) * 3
    scores = torch.rand(num_heads, num_pages * page_size, generator=generator) + skew
    pages = head_pages("ada", scores, mean, page_size, alpha)
    assert sum(pages) == mean * num_heads
    assert all(max(1, int(alpha * mean)) <= count <= num_pages for count in pages)


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("method", ["snapkv", "pyramidkv", "ada-snapkv", "ada-pyramidkv"])
def test_selection_is_exact_in_whole_pages(method, granularity):
    config = KVCompressConfig(method, budget=999, options=(("granularity", granularity),))
    scores = torch.rand(8, 3, 40 * 16, generator=torch.Generator().manual_seed(1))
    selection = select(scores, config, mean_pages=6, block_size=16)
    assert int(selection.num_pages.sum()) == 6 * 8 * 3
    assert int(selection.num_pages.min()) >= 1
    assert selection.page_offsets.tolist()[-1] == 6 * 8 * 3
    per_page = 16 if granularity == "token" else 1
    assert selection.indices.numel() == 6 * 8 * 3 * per_page
    if "pyramid" in method:
        per_layer = selection.num_pages.sum(dim=1).tolist()
        assert per_layer[0] > per_layer[-1]
    else:
        assert selection.num_pages.sum(dim=1).tolist() == [18] * 8
    if "ada" not in method:
        assert torch.equal(selection.num_pages, selection.num_pages[:, :1].expand(-1, 3))


def test_options_of_schedule_and_allocation_reach_the_selection():
    scores = torch.rand(4, 2, 40 * 16, generator=torch.Generator().manual_seed(1))
    scores[:, 0] += 10

    def num_pages(method, **options):
        config = KVCompressConfig(method, budget=999, options=tuple(options.items()))
        return select(scores, config, mean_pages=10, block_size=16).num_pages.tolist()

    assert num_pages("pyramidkv", beta=1) == [[10, 10]] * 4
    assert num_pages("pyramidkv", beta=5) == [[18, 18], [13, 13], [7, 7], [2, 2]]
    assert num_pages("ada-snapkv", alpha=1.0) == [[10, 10]] * 4
    assert num_pages("ada-snapkv", alpha=0.3) == [[17, 3]] * 4
