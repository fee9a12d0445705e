"""From scores to kept pages and tokens: granularities, two stages, every budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_selection import select

from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.policies.base import LayerScores
from vllm_kvcompress.policies.method_options import pair_problem
from vllm_kvcompress.policies.recipes import BUDGETS, RECIPES

NUM_LAYERS, NUM_HEADS = 8, 3
TABLES = {
    "per_layer": tuple(range(1, NUM_LAYERS + 1)),
    "per_head": tuple((1.0, 2.0, 3.0 + layer) for layer in range(NUM_LAYERS)),
}


def config_of(method="snapkv", **options):
    """Whole pages, unless the options say otherwise."""
    options = {"granularity": "page", **options}
    return KVCompressConfig(method, budget=999, options=tuple(options.items()))


def random_scores(num_layers, num_heads, num_tokens, seed=1, two_stages=False):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.rand(num_heads, num_tokens, generator=generator)

    return [LayerScores(draw(), draw() if two_stages else None) for _ in range(num_layers)]


def parts_of(selection, block_size):
    """Kept indices of each stream, as lists."""
    per_page = block_size if selection.granularity == "token" else 1
    counts = (selection.num_pages.flatten() * per_page).tolist()
    return [part.tolist() for part in selection.indices.split(counts)]


def check_selection(selection, mean_pages, num_layers, num_heads, num_tokens, block_size):
    """What must hold for any scores and budgets."""
    total = mean_pages * num_layers * num_heads
    assert selection.num_pages.shape == (num_layers, num_heads)
    assert selection.num_pages.dtype == selection.indices.dtype == torch.int64
    assert int(selection.num_pages.sum()) == total
    assert int(selection.num_pages.min()) >= 1
    assert selection.page_offsets.tolist() == [
        int(selection.num_pages.flatten()[:i].sum()) for i in range(num_layers * num_heads + 1)
    ]
    size = num_tokens if selection.granularity == "token" else num_tokens // block_size
    for part in parts_of(selection, block_size):
        assert part == sorted(set(part))
        assert 0 <= part[0] <= part[-1] < size


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("budgets", [*BUDGETS, "static-per-head"])
@pytest.mark.parametrize("method", ["snapkv", "ada-criticalkv"])
def test_selection_is_exact_in_whole_pages(method, budgets, granularity):
    options = {"granularity": granularity, "budgets": budgets}
    if budgets.startswith("static"):
        table = TABLES["per_head" if budgets.endswith("head") else "per_layer"]
        options |= {"budgets": "static", "table": table}
    scores = random_scores(NUM_LAYERS, NUM_HEADS, 40 * 16, two_stages="critical" in method)
    selection = select(scores, config_of(method, **options), mean_pages=6, block_size=16)
    assert selection.granularity == granularity
    check_selection(selection, 6, NUM_LAYERS, NUM_HEADS, 40 * 16, 16)
    per_layer = selection.num_pages.sum(dim=1).tolist()
    if "pyramid" in budgets:
        assert per_layer[0] > per_layer[-1]
    elif budgets in ("uniform", "ada"):
        assert per_layer == [18] * NUM_LAYERS
    elif budgets == "static":
        assert per_layer == sorted(per_layer)
        assert per_layer[0] < per_layer[-1]
    if budgets in ("uniform", "pyramid", "static"):
        assert torch.equal(selection.num_pages, selection.num_pages[:, :1].expand(-1, NUM_HEADS))
    if budgets == "static-per-head":
        assert (selection.num_pages[:, 0] < selection.num_pages[:, 2]).all()


@given(
    st.sampled_from(sorted(RECIPES)),
    st.sampled_from(sorted(set(BUDGETS) - {"static"})),
    st.sampled_from(["page", "token"]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(0, 6),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_selection_of_any_scores(
    method, budgets, granularity, num_layers, num_heads, mean_pages, room, seed, tied
):
    if pair_problem(RECIPES[method].scorer, budgets):
        return
    config = config_of(method, budgets=budgets, granularity=granularity)
    num_tokens = 4 * (mean_pages + room)
    scores = random_scores(num_layers, num_heads, num_tokens, seed, config.num_scores == 2)
    if tied:
        scores = [
            LayerScores(s.first.round(), None if s.second is None else s.second.round())
            for s in scores
        ]
    selection = select(scores, config, mean_pages, 4, num_tail_tokens=seed % 7)
    check_selection(selection, mean_pages, num_layers, num_heads, num_tokens, 4)
    if room == 0:
        assert (selection.num_pages == mean_pages).all()


def test_page_granularity_keeps_the_page_of_the_best_token():
    # In a page of otherwise worst tokens, too: a page is as good as its best token.
    scores = torch.full((2, 48), 0.5)
    scores[:, 16:32] = 0.0
    scores[0, 31] = scores[1, 33] = 0.9
    selection = select([LayerScores(scores)], config_of(), 1, 16)
    assert parts_of(selection, 16) == [[1], [2]]


def test_token_granularity_gathers_the_best_tokens():
    scores = torch.zeros(2, 48)
    best = [[1, 9, 17, 40], [0, 2, 3, 47]]
    for head, positions in enumerate(best):
        scores[head, positions] = 0.1
    selection = select([LayerScores(scores)], config_of(granularity="token"), 1, 4)
    assert parts_of(selection, 4) == best


@pytest.mark.parametrize("granularity", ["page", "token"])
def test_heads_that_win_pages_fill_them_with_their_own_next_best(granularity):
    scores = random_scores(2, 2, 64, seed=3)
    config = config_of("ada-snapkv", granularity=granularity, page_reduce="max")
    selection = select(scores, config, 3, 8)
    entries = torch.stack([s.first for s in scores]).flatten(0, 1)
    if granularity == "page":
        entries = entries.view(4, 8, 8).amax(dim=-1)
    for row, part in zip(entries, parts_of(selection, 8), strict=True):
        best = row.topk(len(part)).indices
        assert part == sorted(best.tolist())


def two_stage_scores():
    """Tokens from best to worst by the first score, from worst to best by the second."""
    falling = torch.arange(64, 0, -1).float().expand(2, -1)
    return [LayerScores(falling, falling.flip(1))]


@pytest.mark.parametrize(
    ("first_stage", "num_tail_tokens", "by_first"),
    [
        pytest.param(0.5, 0, 8, id="half"),
        pytest.param(0.0, 0, 0, id="second_stage_alone"),
        pytest.param(1.0, 0, 16, id="first_stage_alone"),
        pytest.param(0.3, 0, 4, id="rounded_down"),
        # Half of 22 kept tokens are 11, of which the tail fills 6.
        pytest.param(0.5, 6, 5, id="the_tail_fills_the_first_stage"),
        pytest.param(0.5, 40, 0, id="the_tail_is_more_than_the_first_stage"),
        pytest.param(1.0, 6, 16, id="first_stage_alone_with_a_tail"),
    ],
)
def test_two_stages_by_token(first_stage, num_tail_tokens, by_first):
    config = config_of("criticalkv", granularity="token", first_stage=first_stage)
    selection = select(two_stage_scores(), config, 4, 4, num_tail_tokens)
    expected = [*range(by_first), *range(64 - (16 - by_first), 64)]
    assert parts_of(selection, 4) == [expected] * 2


@pytest.mark.parametrize(
    ("first_stage", "num_tail_tokens", "by_first"),
    [
        pytest.param(0.5, 0, 2, id="half"),
        pytest.param(0.0, 0, 0, id="second_stage_alone"),
        pytest.param(1.0, 0, 4, id="first_stage_alone"),
        # 0.7 of 16 tokens are 11, two pages and a bit.
        pytest.param(0.7, 0, 2, id="rounded_down_to_pages"),
        # Half of 22 kept tokens are 11; 5 beside the tail are one page.
        pytest.param(0.5, 6, 1, id="the_tail_fills_the_first_stage"),
    ],
)
def test_two_stages_by_page(first_stage, num_tail_tokens, by_first):
    config = config_of("criticalkv", first_stage=first_stage)
    selection = select(two_stage_scores(), config, 4, 4, num_tail_tokens)
    expected = [*range(by_first), *range(16 - (4 - by_first), 16)]
    assert parts_of(selection, 4) == [expected] * 2


@pytest.mark.parametrize("granularity", ["page", "token"])
def test_what_a_head_is_guaranteed_is_its_best_by_the_first_score(granularity):
    config = config_of("ada-criticalkv", granularity=granularity, first_stage=0.0, alpha=0.5)
    selection = select(two_stage_scores(), config, 4, 4)
    # Half of 4 pages of 4 tokens.
    expected = [0, 1, 14, 15] if granularity == "page" else [*range(8), *range(56, 64)]
    assert parts_of(selection, 4) == [expected] * 2


def test_the_first_score_decides_how_much_a_head_gets():
    first = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    first[1] += 1
    scores = [LayerScores(first, first.flip(0))]
    config = config_of("ada-criticalkv", granularity="token", alpha=0.0)
    assert select(scores, config, 4, 4).num_pages.tolist() == [[1, 7]]


def test_each_head_has_its_own_first_stage():
    first = torch.arange(64, 0, -1).float().repeat(2, 1)
    first[1] += 100
    scores = [LayerScores(first, first.flip(1))]
    config = config_of("ada-criticalkv", granularity="token", alpha=0.25)
    kept = parts_of(select(scores, config, 4, 4), 4)
    # The guarantee is one page; half of 4 and of 28 tokens go to the first stage, or that.
    assert kept == [[*range(4)], [*range(14), *range(50, 64)]]


def test_each_layer_has_its_own_guarantee():
    scores = two_stage_scores() * 3
    options = {"budgets": "ada-pyramid", "beta": 7.0, "alpha": 1.0, "first_stage": 0.0}
    kept = parts_of(select(scores, config_of("criticalkv", **options), 7, 1), 1)
    # 13, 7 and 1 tokens per head, all of them guaranteed and so taken by the first score.
    assert kept == [[*range(count)] for count in (13, 13, 7, 7, 1, 1)]


def test_one_stage_ignores_the_tail():
    scores = random_scores(2, 2, 64)
    config = config_of("ada-snapkv", granularity="token")
    plain, with_tail = select(scores, config, 3, 8), select(scores, config, 3, 8, 50)
    assert torch.equal(plain.indices, with_tail.indices)


def test_selection_does_not_write_to_the_scores():
    scores = random_scores(2, 2, 64, two_stages=True)
    before = [(s.first.clone(), s.second.clone()) for s in scores]
    select(scores, config_of("ada-criticalkv"), 3, 8)
    for layer, (first, second) in zip(scores, before, strict=True):
        assert torch.equal(layer.first, first)
        assert torch.equal(layer.second, second)


def test_options_of_the_budgets_reach_the_selection():
    scores = random_scores(4, 2, 40 * 16)
    scores = [LayerScores(layer.first + torch.tensor([[10.0], [0.0]])) for layer in scores]

    def num_pages(method, **options):
        return select(scores, config_of(method, **options), 10, 16).num_pages.tolist()

    assert num_pages("pyramidkv", beta=1) == [[10, 10]] * 4
    assert num_pages("pyramidkv", beta=5) == [[18, 18], [13, 13], [7, 7], [2, 2]]
    assert num_pages("ada-snapkv", alpha=1.0) == [[10, 10]] * 4
    assert num_pages("ada-snapkv", alpha=0.3) == [[17, 3]] * 4
    assert num_pages("ada-pyramidkv", alpha=0.5, beta=5) == [[27, 9], [20, 6], [11, 3], [3, 1]]
    assert num_pages("kvc", floor=1.0) == [[10, 10]] * 4
    assert num_pages("snapkv", budgets="static", table=[1, 2, 3, 4]) == [
        [4, 4],
        [8, 8],
        [12, 12],
        [16, 16],
    ]
    rows = [[1, 3], [2, 2], [1, 3], [2, 2]]
    expected = [[5, 15], [10, 10], [5, 15], [10, 10]]
    assert num_pages("snapkv", budgets="static", table=rows) == expected


def test_a_table_of_another_model_is_refused():
    scores = random_scores(4, 2, 64)
    for table, message in (
        ([1, 2, 3], "3 layers, the model 4"),
        ([[1, 1, 1]] * 4, "3 heads, the model 2"),
    ):
        config = config_of("snapkv", budgets="static", table=table)
        with pytest.raises(ValueError, match=message):
            select(scores, config, 2, 4)


def test_page_reduction_decides_which_page_counts_more():
    # Page 0 has the best token, page 1 the best sum, page 2 is second in both.
    scores = torch.tensor([[9.0, 0, 0, 0, 5, 5, 5, 5, 8, 6, 3, 0]])
    kept = {
        reduce: select([LayerScores(scores)], config_of(page_reduce=reduce), 1, 4).indices.tolist()
        for reduce in ("max", "mean", "rms")
    }
    assert kept == {"max": [0], "mean": [1], "rms": [2]}


@pytest.mark.parametrize("method", ["keydiff", "knorm"])
def test_squares_of_negative_scores_are_refused(method):
    with pytest.raises(KVCompressConfigError, match=r"page_reduce.*must be one of max, mean"):
        config_of(method, page_reduce="rms")
