"""What defines each scorer, on tensors small enough to reason about; and the recipes table."""

from __future__ import annotations

import pytest
import torch

from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.policies import RECIPES, make_scorer
from vllm_kvcompress.policies.base import ScoreInputs, Scorer
from vllm_kvcompress.policies.knorm import KNorm
from vllm_kvcompress.policies.random import Random
from vllm_kvcompress.policies.recipes import (
    ALLOCATION_OPTIONS,
    SCHEDULE_OPTIONS,
    SCORER_OPTIONS,
    option_specs,
)
from vllm_kvcompress.policies.selection import select
from vllm_kvcompress.policies.snapkv import SnapKV
from vllm_kvcompress.policies.streamingllm import StreamingLLM

NUM_HEADS, GROUP, WINDOW, NUM_KEYS, HEAD_SIZE = 2, 2, 4, 64, 8
NUM_CANDIDATES = 48


def inputs(key=None, window_query=None, layer=0, num_candidates=NUM_CANDIDATES, **rest):
    if key is None:
        key = torch.zeros(NUM_HEADS, NUM_KEYS, HEAD_SIZE)
    return ScoreInputs(
        key=key,
        num_candidates=num_candidates,
        scale=rest.get("scale", 1.0),
        window_query=window_query,
        logits_soft_cap=rest.get("logits_soft_cap", 0.0),
        layer=layer,
    )


def axis(index, length=10.0):
    vector = torch.zeros(HEAD_SIZE)
    vector[index] = length
    return vector


def planted(positions):
    """Inputs where the query heads of KV head h look at key `positions[h]` alone."""
    key = torch.zeros(NUM_HEADS, NUM_KEYS, HEAD_SIZE)
    query = axis(0).expand(NUM_HEADS, GROUP, WINDOW, HEAD_SIZE)
    for head, position in enumerate(positions):
        key[head, position] = axis(0)
    return inputs(key, query)


def select_from(scorer, method, score_inputs, mean_pages, block_size=16, **options):
    """What one layer keeps, per head, as lists of indices."""
    config = KVCompressConfig(method, budget=999, options=tuple(options.items()))
    selection = select(scorer.score(score_inputs)[None], config, mean_pages, block_size)
    per_page = block_size if selection.granularity == "token" else 1
    counts = (selection.num_pages.flatten() * per_page).tolist()
    return [part.tolist() for part in selection.indices.split(counts)]


def test_snapkv_finds_a_planted_key():
    scores = SnapKV(pool_kernel=1).score(planted([5, 41]))
    assert scores.argmax(dim=1).tolist() == [5, 41]
    torch.testing.assert_close(scores.amax(dim=1), torch.ones(2))
    assert scores.sum() < 2.001


def test_snapkv_pooling_keeps_the_neighbours_of_a_planted_key():
    plain = SnapKV(pool_kernel=1).score(planted([20, 20]))
    peak, floor = plain[0, 20], plain[0, 0]
    pooled = SnapKV(pool_kernel=7, pool_kind="max").score(planted([20, 20]))
    assert (pooled[:, 17:24] == peak).all()
    assert (pooled[:, :17] == floor).all()
    assert (pooled[:, 24:] == floor).all()
    averaged = SnapKV(pool_kernel=5, pool_kind="avg").score(planted([20, 20]))
    torch.testing.assert_close(averaged[:, 18:23], (peak + 4 * floor).expand(2, 5) / 5)
    assert (averaged[:, 23:] < 0.01).all()


def test_snapkv_pools_across_the_last_candidate():
    # Key 50 is dense, but its fact may begin among the candidates.
    scores = SnapKV(pool_kernel=7).score(planted([50, 52]))
    assert scores.shape == (NUM_HEADS, NUM_CANDIDATES)
    assert scores[0, 47] > 0.9
    assert scores[1, 47] < 0.01


def test_snapkv_does_not_pool_the_window_in():
    # The window's keys attend to one another strongly; that says nothing about the others.
    score_inputs = planted([NUM_KEYS - WINDOW] * 2)
    scores = SnapKV(pool_kernel=63).score(
        inputs(score_inputs.key, score_inputs.window_query, num_candidates=NUM_KEYS - WINDOW)
    )
    assert scores.max() < 0.01


def test_snapkv_is_causal_inside_the_window():
    # Only the last query sees the last key; the others share their mass evenly.
    scores = SnapKV(pool_kernel=1).score(planted([NUM_KEYS - 1] * 2))
    visible = [NUM_KEYS - WINDOW + i + 1 for i in range(WINDOW - 1)]
    expected = sum(1 / n for n in visible) / WINDOW
    torch.testing.assert_close(scores, torch.full_like(scores, expected))


def test_snapkv_joins_query_heads_after_pooling():
    key = torch.zeros(NUM_HEADS, NUM_KEYS, HEAD_SIZE)
    key[:, 10], key[:, 12] = axis(0), axis(1)
    query = torch.stack([axis(0), axis(1)])[None, :, None].expand(NUM_HEADS, GROUP, WINDOW, -1)
    mean = SnapKV(pool_kernel=3).score(inputs(key, query))
    # Joining first would leave key 11 with half of this.
    torch.testing.assert_close(mean[:, 11], torch.ones(NUM_HEADS))
    torch.testing.assert_close(mean[:, 9], torch.full((NUM_HEADS,), 0.5))
    largest = SnapKV(pool_kernel=3, group_reduce="max").score(inputs(key, query))
    torch.testing.assert_close(largest[:, 9:14], torch.ones(NUM_HEADS, 5))


def test_snapkv_averages_over_the_window():
    key = torch.zeros(NUM_HEADS, NUM_KEYS, HEAD_SIZE)
    key[:, 7], key[:, 30] = axis(0), axis(1)
    query = torch.stack([axis(0), axis(1), axis(1), axis(1)]).expand(NUM_HEADS, GROUP, -1, -1)
    scores = SnapKV(pool_kernel=1).score(inputs(key, query))
    torch.testing.assert_close(scores[:, [7, 30]], torch.tensor([[0.25, 0.75]] * 2))


def test_snapkv_uses_scale_and_soft_cap():
    score_inputs = planted([5, 41])
    key, query = score_inputs.key, score_inputs.window_query
    flat = SnapKV(pool_kernel=1).score(inputs(key, query, scale=0.0))
    assert flat.max() - flat.min() < 1e-6
    # A cap of 1 lets the planted key weigh at most e times any other.
    capped = SnapKV(pool_kernel=1).score(inputs(key, query, logits_soft_cap=1.0))
    torch.testing.assert_close(capped[0, 5] / capped[0, 0], torch.tensor(1.0).exp())


def test_snapkv_scores_half_precision_keys_in_float32():
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(NUM_HEADS, NUM_KEYS, HEAD_SIZE, generator=generator).bfloat16()
    query = torch.randn(NUM_HEADS, GROUP, WINDOW, HEAD_SIZE, generator=generator).bfloat16()
    half = SnapKV().score(inputs(key, query))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, SnapKV().score(inputs(key.float(), query.float())))


def test_page_granularity_keeps_the_page_of_the_best_token():
    kept = select_from(SnapKV(pool_kernel=1), "snapkv", planted([5, 41]), 1)
    assert kept == [[0], [2]]
    # In a page of otherwise worst tokens, too: a page is as good as its best token.
    key = torch.ones(NUM_HEADS, NUM_KEYS, HEAD_SIZE)
    key[:, 16:32] = 5.0
    key[0, 31] = 0.1
    key[1, 33] = 0.1
    assert select_from(KNorm(), "knorm", inputs(key), 1) == [[1], [2]]


def test_token_granularity_gathers_the_best_tokens():
    key = torch.ones(NUM_HEADS, NUM_KEYS, HEAD_SIZE)
    small = [[1, 9, 17, 40], [0, 2, 3, 47]]
    for head, positions in enumerate(small):
        key[head, positions] = 0.1
    kept = select_from(KNorm(), "knorm", inputs(key), 1, block_size=4, granularity="token")
    assert kept == small


@pytest.mark.parametrize("num_sinks", [0, 1, 4])
def test_streamingllm_keeps_sinks_and_the_most_recent(num_sinks):
    kept = select_from(
        StreamingLLM(num_sinks), "streamingllm", inputs(), 2, block_size=4, granularity="token"
    )
    recent = range(NUM_CANDIDATES - 8 + num_sinks, NUM_CANDIDATES)
    assert kept == [[*range(num_sinks), *recent]] * NUM_HEADS


def test_streamingllm_with_more_sinks_than_room_keeps_the_first():
    kept = select_from(
        StreamingLLM(30), "streamingllm", inputs(), 2, block_size=4, granularity="token"
    )
    assert kept == [list(range(8))] * NUM_HEADS


def test_streamingllm_in_pages_keeps_the_page_of_the_sinks_whole():
    kept = select_from(StreamingLLM(4), "streamingllm", inputs(), 3, block_size=8)
    assert kept == [[0, 4, 5]] * NUM_HEADS


def test_streamingllm_accepts_more_sinks_than_candidates():
    scores = StreamingLLM(100).score(inputs())
    assert (scores == float("inf")).all()
    assert scores.shape == (NUM_HEADS, NUM_CANDIDATES)


def test_knorm_prefers_small_norms():
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(NUM_HEADS, NUM_KEYS, HEAD_SIZE, generator=generator)
    scores = KNorm().score(inputs(key))
    norms = (key[:, :NUM_CANDIDATES] ** 2).sum(dim=-1)
    assert torch.equal(scores.argsort(dim=1, descending=True), norms.argsort(dim=1))


def test_knorm_is_exact_for_half_precision_keys():
    # In bfloat16 all these norms would round to the same number.
    key = torch.full((1, NUM_KEYS, HEAD_SIZE), 16.0, dtype=torch.bfloat16)
    key[0, 30, 0] = 15.9375
    scores = KNorm().score(inputs(key))
    assert scores.dtype == torch.float32
    assert scores.argmax() == 30
    assert (scores == scores.max()).sum() == 1


def test_random_is_seeded_and_differs_between_layers_and_seeds():
    score = Random(seed=7).score
    first = score(inputs(layer=2))
    assert torch.equal(first, score(inputs(layer=2)))
    assert torch.equal(first, Random(seed=7).score(inputs(layer=2)))
    assert not torch.equal(first, score(inputs(layer=3)))
    assert not torch.equal(first, Random(seed=8).score(inputs(layer=2)))
    assert not torch.equal(first[0], first[1])
    assert ((first >= 0) & (first < 1)).all()


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Random(seed=1).score(inputs())
    assert torch.equal(torch.rand(3), expected)


def test_any_accepted_seed_gives_scores():
    try:
        config = KVCompressConfig("random", options=(("seed", 2**64),))
    except KVCompressConfigError as error:
        assert "18446744073709551616" in str(error)
    else:
        assert make_scorer(config).score(inputs()).isfinite().all()


@pytest.mark.parametrize("method", RECIPES)
def test_every_recipe_scores_every_candidate(method):
    scorer = make_scorer(KVCompressConfig(method))
    assert isinstance(scorer, Scorer)
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(NUM_HEADS, NUM_KEYS, HEAD_SIZE, generator=generator).bfloat16()
    query = torch.randn(NUM_HEADS, GROUP, WINDOW, HEAD_SIZE, generator=generator).bfloat16()
    key_before, query_before = key.clone(), query.clone()
    scores = scorer.score(inputs(key, query if scorer.needs_window_queries else None))
    assert scores.shape == (NUM_HEADS, NUM_CANDIDATES)
    assert scores.dtype == torch.float32
    assert not scores.isnan().any()
    assert torch.equal(key, key_before)
    assert torch.equal(query, query_before)


@pytest.mark.parametrize("method", RECIPES)
def test_recipe_is_made_of_known_parts(method):
    recipe = RECIPES[method]
    assert recipe.name == method
    assert recipe.scorer in SCORER_OPTIONS
    assert recipe.schedule in SCHEDULE_OPTIONS
    assert recipe.allocation in ALLOCATION_OPTIONS
    assert recipe.summary
    assert recipe.paper
    for text in (recipe.summary, *(spec.help for spec in option_specs(recipe).values())):
        assert "\n" not in text
        # argparse expands percent signs in help texts.
        assert "%" not in text


@pytest.mark.parametrize("method", RECIPES)
def test_default_options_are_allowed_values(method):
    specs = option_specs(RECIPES[method])
    assert {name: spec.problem(spec.default) for name, spec in specs.items()} == dict.fromkeys(
        specs
    )
    assert dict(KVCompressConfig(method).options) == {
        name: spec.default for name, spec in specs.items()
    }


def test_parts_of_a_recipe_take_options_of_different_names():
    for recipe in RECIPES.values():
        names = [
            "granularity",
            *SCORER_OPTIONS[recipe.scorer],
            *SCHEDULE_OPTIONS[recipe.schedule],
            *ALLOCATION_OPTIONS[recipe.allocation],
        ]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("snapkv", {"pool_kernel": 5, "pool_kind": "avg", "group_reduce": "max"}),
        ("ada-pyramidkv", {"pool_kernel": 1}),
        ("streamingllm", {"num_sinks": 9}),
        ("random", {"seed": 11}),
    ],
)
def test_options_reach_the_scorer(method, options):
    scorer = make_scorer(KVCompressConfig(method, options=tuple(options.items())))
    assert {name: getattr(scorer, name) for name in options} == options
