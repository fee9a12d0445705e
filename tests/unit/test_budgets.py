"""Shares of pages: among places, layers and heads; every total is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_selection import share as share_pages

from vllm_kvcompress.ops import apportion
from vllm_kvcompress.policies.budgets.ada import Ada, AdaPyramid
from vllm_kvcompress.policies.budgets.base import PageSupply
from vllm_kvcompress.policies.budgets.joint import Joint
from vllm_kvcompress.policies.budgets.pyramid import Pyramid
from vllm_kvcompress.policies.budgets.static import Static
from vllm_kvcompress.policies.budgets.uniform import Uniform
from vllm_kvcompress.policies.builtin import budgets_class
from vllm_kvcompress.policies.options import make_part
from vllm_kvcompress.policies.recipes import BUDGETS


def layer_pages(budgets, mean_pages, num_layers, max_pages):
    """Pages per KV head of each layer."""
    return budgets.layer_pages(PageSupply(num_layers, 1, mean_pages, max_pages))


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


PYRAMIDS = [Pyramid(beta=20.0), AdaPyramid(beta=20.0)]


@pytest.mark.parametrize("budgets", PYRAMIDS)
@pytest.mark.parametrize("num_layers", [2, 30, 32, 80])
@pytest.mark.parametrize("mean_pages", [1, 2, 3, 4, 7, 8, 16, 63, 128])
@pytest.mark.parametrize("room", [0, 1, 5, 1000])
def test_pyramid_is_exact_and_falls(budgets, num_layers, mean_pages, room):
    max_pages = 2 * mean_pages + room
    pages = layer_pages(budgets, mean_pages, num_layers, max_pages)
    assert sum(pages) == mean_pages * num_layers
    assert pages == sorted(pages, reverse=True)
    assert pages[-1] >= 1
    assert pages[0] <= max_pages
    if mean_pages >= 3:
        assert pages[0] > mean_pages > pages[-1]


def test_pyramid_by_hand():
    # Mean 8 and beta 4: from 14 down to 2 in steps of 2.
    assert layer_pages(Pyramid(4.0), 8, 7, 100) == [14, 12, 10, 8, 6, 4, 2]
    # From 12.25 down to 1.75 by largest remainder.
    assert layer_pages(Pyramid(4.0), 7, 3, 100) == [12, 7, 2]
    # Mean 8 at 80 layers: the sum is exact although hardly any share is a whole number.
    pages = layer_pages(Pyramid(20.0), 8, 80, 1000)
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
    pages = layer_pages(Pyramid(beta), mean_pages, num_layers, max_pages)
    assert sum(pages) == mean_pages * num_layers
    assert pages == sorted(pages, reverse=True)
    assert all(1 <= count <= max_pages for count in pages)


@pytest.mark.parametrize("max_pages", [16, 17])
def test_steepest_pyramid_reaches_the_candidates_and_keeps_the_mean(max_pages):
    # A top of nearly twice the mean meets a prompt of just that many candidate pages.
    pages = layer_pages(Pyramid(1000.0), 8, 32, max_pages)
    assert pages[0] == 16
    assert sum(pages) == 8 * 32


@pytest.mark.parametrize("num_layers", [1, 2, 31])
def test_beta_1_is_uniform(num_layers):
    assert layer_pages(Pyramid(1.0), 6, num_layers, 500) == [6] * num_layers


@pytest.mark.parametrize(
    ("budgets", "num_layers", "max_pages"),
    [
        pytest.param(Uniform(), 30, 1000, id="uniform"),
        pytest.param(Ada(), 30, 1000, id="ada"),
        pytest.param(Pyramid(20.0), 30, 15, id="prompt_shorter_than_twice_the_mean"),
        pytest.param(AdaPyramid(beta=20.0), 30, 15, id="ada_pyramid_of_a_short_prompt"),
        pytest.param(Pyramid(20.0), 1, 1000, id="one_layer"),
    ],
)
def test_uniform_layers(budgets, num_layers, max_pages):
    pages = layer_pages(budgets, 8, num_layers, max_pages)
    assert pages == [8] * num_layers


@pytest.mark.parametrize(
    ("table", "mean_pages", "max_pages", "expected"),
    [
        pytest.param((1.0, 2.0, 3.0), 4, 100, [2, 4, 6], id="proportional"),
        pytest.param((10.0, 20.0, 30.0), 4, 100, [2, 4, 6], id="only_ratios_count"),
        pytest.param((1.0, 1.0, 1.0), 5, 100, [5, 5, 5], id="equal"),
        pytest.param((1.0, 1.0, 2.0), 3, 100, [2, 2, 5], id="largest_remainder"),
        pytest.param((1.0, 1.0, 98.0), 4, 100, [1, 1, 10], id="one_page_at_least"),
        pytest.param((1.0, 1.0, 98.0), 4, 7, [3, 2, 7], id="all_candidates_at_most"),
    ],
)
def test_static_table_per_layer(table, mean_pages, max_pages, expected):
    assert layer_pages(Static(table), mean_pages, len(table), max_pages) == expected
    budgets = share_pages(Static(table), torch.rand(3, 2, max_pages), mean_pages)
    assert budgets.num_pages.tolist() == [[count, count] for count in expected]
    assert budgets.guaranteed.tolist() == [0] * 3


def test_static_table_per_layer_and_head():
    table = ((1.0, 5.0), (2.0, 4.0), (3.0, 3.0))
    scores = torch.rand(3, 2, 200, generator=torch.Generator().manual_seed(0))
    for page_size in (1, 4):
        budgets = share_pages(Static(table), scores, 6, page_size)
        assert budgets.num_pages.tolist() == [[2, 10], [4, 8], [6, 6]]
        assert budgets.num_pages.dtype == torch.int64
        assert budgets.guaranteed.tolist() == [0] * 3


@given(
    st.lists(st.lists(st.floats(0.01, 100), min_size=2, max_size=2), min_size=1, max_size=6),
    st.integers(1, 8),
    st.integers(0, 8),
)
def test_static_tables_are_exact_and_bounded(rows, mean_pages, room):
    num_pages = mean_pages + room
    scores = torch.zeros(len(rows), 2, num_pages * 4)
    for table in (tuple(map(tuple, rows)), tuple(row[0] for row in rows)):
        pages = share_pages(Static(table), scores, mean_pages, 4).num_pages
        assert pages.shape == (len(rows), 2)
        assert int(pages.sum()) == mean_pages * len(rows) * 2
        assert 1 <= int(pages.min()) <= int(pages.max()) <= num_pages


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((1.0, 2.0), "2 layers, the model 3"),
        ((1.0, 2.0, 3.0, 4.0), "4 layers, the model 3"),
        (((1.0, 1.0),) * 2, "2 layers, the model 3"),
        (((1.0,),) * 3, "1 heads, the model 2"),
        (((1.0, 1.0, 1.0),) * 3, "3 heads, the model 2"),
    ],
)
def test_tables_of_another_shape_are_refused(table, message):
    with pytest.raises(ValueError, match=f"budget table has {message}$"):
        Static(table).check_model(3, 2)
    with pytest.raises(ValueError, match=message):
        share_pages(Static(table), torch.zeros(3, 2, 20), 4)


def test_tables_that_fit():
    Static((1.0, 2.0, 3.0)).check_model(3, 2)
    Static(((1.0, 2.0),) * 3).check_model(3, 2)
    for budgets in (Uniform(), Pyramid(), Ada(), AdaPyramid(), Joint()):
        budgets.check_model(3, 2)


def ramp(num_rows, num_entries):
    """Distinct scores, row by row interleaved, so that no row is better than another."""
    return torch.arange(num_rows * num_entries).view(num_entries, num_rows).t().float()


def one_layer(scores, mean_pages, page_size, alpha=0.2):
    """Pages of the heads of one layer that compete."""
    budgets = share_pages(Ada(alpha), scores[None], mean_pages, page_size)
    return budgets.num_pages[0].tolist()


@pytest.mark.parametrize("budgets", [Uniform(), Pyramid(20.0)], ids=["uniform", "pyramid"])
def test_heads_that_do_not_compete_ignore_scores(budgets):
    scores = torch.zeros(4, 3, 30)
    scores[:, 1] = 9.0
    result = share_pages(budgets, scores, 4)
    assert torch.equal(result.num_pages, result.num_pages[:, :1].expand(-1, 3))
    assert result.num_pages[:, 0].tolist() == layer_pages(budgets, 4, 4, 30)
    assert result.guaranteed.tolist() == [0] * 4


@pytest.mark.parametrize("page_size", [1, 16])
def test_ada_shares_evenly_among_equally_good_heads(page_size):
    assert one_layer(ramp(4, 20 * page_size), 5, page_size) == [5, 5, 5, 5]


@pytest.mark.parametrize("page_size", [1, 16])
def test_ada_shares_evenly_when_all_scores_are_equal(page_size):
    scores = torch.full((4, 20 * page_size), 0.25)
    assert one_layer(scores, 5, page_size) == [5, 5, 5, 5]


DOMINATED = [
    pytest.param(1, 0.0, [1, 37, 1, 1], id="one_page_at_least"),
    pytest.param(1, 0.2, [2, 34, 2, 2], id="default"),
    pytest.param(1, 0.55, [5, 25, 5, 5], id="guarantee_rounded_down"),
    pytest.param(1, 1.0, [10, 10, 10, 10], id="all_guaranteed"),
    pytest.param(16, 0.0, [1, 37, 1, 1], id="one_page_at_least_by_tokens"),
    pytest.param(16, 0.2, [2, 34, 2, 2], id="default_by_tokens"),
    # 88 tokens each are 5.5 pages; two of the halves make a page.
    pytest.param(16, 0.55, [6, 24, 5, 5], id="half_pages_by_tokens"),
    pytest.param(16, 1.0, [10, 10, 10, 10], id="all_guaranteed_by_tokens"),
]


def dominated(page_size):
    scores = torch.rand(4, 50 * page_size, generator=torch.Generator().manual_seed(0))
    scores[1] += 10
    return scores


@pytest.mark.parametrize(("page_size", "alpha", "expected"), DOMINATED)
def test_one_dominating_head_gets_all_but_the_guarantee(page_size, alpha, expected):
    assert one_layer(dominated(page_size), 10, page_size, alpha) == expected


@pytest.mark.parametrize(("page_size", "floor", "expected"), DOMINATED)
def test_joint_is_ada_over_all_layers_and_heads(page_size, floor, expected):
    # The same four streams, as heads of one layer, of two layers and of four.
    for num_layers in (1, 2, 4):
        scores = dominated(page_size).view(num_layers, 4 // num_layers, -1)
        result = share_pages(Joint(floor), scores, 10, page_size)
        assert result.num_pages.shape == (num_layers, 4 // num_layers)
        assert result.num_pages.flatten().tolist() == expected


def test_dominating_head_is_bounded_by_its_candidates():
    scores = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    scores[0] += 10
    assert one_layer(scores, 8, 1) == [12, 4]
    joint = share_pages(Joint(0.0), scores[:, None], 8, 1)
    assert joint.num_pages.tolist() == [[12], [4]]


def test_ada_layers_do_not_compete_but_joint_layers_do():
    scores = ramp(4, 40).view(2, 2, 40).clone()
    scores[1] += 1000
    ada = share_pages(Ada(0.0), scores, 10, 1)
    assert ada.num_pages.tolist() == [[10, 10], [10, 10]]
    joint = share_pages(Joint(0.0), scores, 10, 1)
    assert joint.num_pages.tolist() == [[1, 1], [19, 19]]


@pytest.mark.parametrize("page_size", [1, 16])
def test_joint_shares_evenly_when_all_scores_are_equal(page_size):
    scores = torch.full((3, 4, 20 * page_size), 0.25)
    result = share_pages(Joint(0.05), scores, 5, page_size)
    assert (result.num_pages == 5).all()


def test_joint_gives_a_tied_rest_to_the_first_streams():
    scores = torch.full((3, 2, 20), 0.25)
    # 24 pages: seven are the last stream's, the others go round rank by rank.
    scores[2, 1, :7] = 1.0
    result = share_pages(Joint(0.0), scores, 4, 1)
    assert result.num_pages.flatten().tolist() == [4, 4, 3, 3, 3, 7]


@pytest.mark.parametrize(
    ("budgets", "share", "mean_pages", "page_size", "expected"),
    [
        (Ada, 0.5, 5, 1, 2),
        (Ada, 0.0, 5, 1, 1),
        (Ada, 0.1, 5, 1, 1),
        (Ada, 0.5, 5, 16, 40),
        (Ada, 0.0, 5, 16, 0),
        (Joint, 0.05, 8, 1, 1),
        (Joint, 0.5, 9, 1, 4),
        (Joint, 0.05, 8, 16, 6),
    ],
)
def test_guarantee_in_entries(budgets, share, mean_pages, page_size, expected):
    scores = torch.rand(2, 2, 20 * page_size)
    result = share_pages(budgets(share), scores, mean_pages, page_size)
    assert result.guaranteed.tolist() == [expected] * 2


def test_ada_pyramid_is_ada_within_each_layer_of_a_pyramid():
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(6, 3, 60, generator=generator) + torch.rand(6, 3, 1, generator=generator)
    result = share_pages(AdaPyramid(alpha=0.3, beta=10.0), scores, 7)
    per_layer = layer_pages(Pyramid(10.0), 7, 6, 60)
    assert result.num_pages.sum(dim=1).tolist() == [3 * pages for pages in per_layer]
    assert per_layer[0] > per_layer[-1]
    for layer, pages in enumerate(per_layer):
        assert result.num_pages[layer].tolist() == one_layer(scores[layer], pages, 1, 0.3)
    # Each layer's guarantee follows its own mean.
    assert result.guaranteed.tolist() == [max(1, int(0.3 * pages)) for pages in per_layer]
    assert result.guaranteed[0] > result.guaranteed[-1]
    assert any(len(set(row)) > 1 for row in result.num_pages.tolist())


@given(
    st.sampled_from(sorted(set(BUDGETS) - {"static"})),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(0, 12),
    st.sampled_from([1, 4]),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_any_budget_is_exact_and_leaves_no_head_empty(
    budgets, num_layers, num_heads, mean, room, page_size, share, tied, seed
):
    generator = torch.Generator().manual_seed(seed)
    num_pages = mean + room
    skew = torch.rand(num_layers, num_heads, 1, generator=generator) * 3
    shape = (num_layers, num_heads, num_pages * page_size)
    scores = torch.rand(shape, generator=generator) + skew
    if tied:
        scores = scores.round()
    options = {"alpha": share, "floor": share, "beta": 1 + 20 * share}
    result = share_pages(make_part(budgets_class(budgets), options), scores, mean, page_size)
    pages = result.num_pages
    assert pages.dtype == torch.int64
    assert int(pages.sum()) == mean * num_layers * num_heads
    assert 1 <= int(pages.min()) <= int(pages.max()) <= num_pages
    if budgets in ("ada", "joint"):
        assert int(pages.min()) >= int(share * mean)
    assert result.guaranteed.dtype == torch.int64
    assert result.guaranteed.shape == (num_layers,)
    if page_size == 1:
        assert (result.guaranteed <= pages.min(dim=1).values).all()
