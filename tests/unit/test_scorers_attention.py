"""SnapKV's scores on tensors small enough to reason about, and what CriticalKV adds to them."""

from __future__ import annotations

import pytest
import torch
from layer_inputs import random_inputs

from vllm_kvcompress import ops
from vllm_kvcompress.policies.base import ScoreInputs
from vllm_kvcompress.policies.scorers.criticalkv import CriticalKV
from vllm_kvcompress.policies.scorers.defensivekv import DefensiveKV
from vllm_kvcompress.policies.scorers.keydiff import KeyDiff
from vllm_kvcompress.policies.scorers.snapkv import SnapKV
from vllm_kvcompress.policies.scorers.span import Span
from vllm_kvcompress.policies.scorers.span_keydiff import SpanKeyDiff
from vllm_kvcompress.policies.scorers.tova import TOVA

NUM_HEADS, GROUP, WINDOW, NUM_KEYS, HEAD_SIZE = 2, 2, 4, 64, 8
NUM_CANDIDATES = 48


def inputs(key, window_query, num_candidates=NUM_CANDIDATES, scale=1.0, **rest):
    return ScoreInputs(
        key=key,
        num_candidates=num_candidates,
        budget_tokens=16,
        scale=scale,
        window_query=window_query,
        **rest,
    )


def axis(index, length=10.0):
    vector = torch.zeros(HEAD_SIZE)
    vector[index] = length
    return vector


def planted(positions, **rest):
    """Inputs where the query heads of KV head h look at key `positions[h]` alone."""
    key = torch.zeros(NUM_HEADS, NUM_KEYS, HEAD_SIZE)
    query = axis(0).expand(NUM_HEADS, GROUP, WINDOW, HEAD_SIZE)
    for head, position in enumerate(positions):
        key[head, position] = axis(0)
    return inputs(key, query, **rest)


def snapkv(score_inputs, **options):
    return SnapKV(**{"pool_kernel": 1, **options}).score(score_inputs).first


def test_snapkv_finds_a_planted_key():
    scores = snapkv(planted([5, 41]))
    assert scores.argmax(dim=1).tolist() == [5, 41]
    torch.testing.assert_close(scores.amax(dim=1), torch.ones(2))
    assert scores.sum() < 2.001


def test_snapkv_has_one_stage():
    assert SnapKV().score(planted([5, 41])).second is None


def test_snapkv_pooling_keeps_the_neighbours_of_a_planted_key():
    plain = snapkv(planted([20, 20]))
    peak, floor = plain[0, 20], plain[0, 0]
    pooled = snapkv(planted([20, 20]), pool_kernel=7, pool_kind="max")
    assert (pooled[:, 17:24] == peak).all()
    assert (pooled[:, :17] == floor).all()
    assert (pooled[:, 24:] == floor).all()
    averaged = snapkv(planted([20, 20]), pool_kernel=5, pool_kind="avg")
    torch.testing.assert_close(averaged[:, 18:23], (peak + 4 * floor).expand(2, 5) / 5)
    assert (averaged[:, 23:] < 0.01).all()


def test_snapkv_pools_across_the_last_candidate():
    # Key 50 is dense, but its fact may begin among the candidates.
    scores = snapkv(planted([50, 52]), pool_kernel=7)
    assert scores.shape == (NUM_HEADS, NUM_CANDIDATES)
    assert scores[0, 47] > 0.9
    assert scores[1, 47] < 0.01


@pytest.mark.parametrize("pool_first", [True, False])
def test_snapkv_does_not_pool_the_window_in(pool_first):
    # The window's keys attend to one another strongly; that says nothing about the others.
    score_inputs = planted([NUM_KEYS - WINDOW] * 2, num_candidates=NUM_KEYS - WINDOW)
    assert snapkv(score_inputs, pool_kernel=63, pool_first=pool_first).max() < 0.01


def test_snapkv_is_causal_inside_the_window():
    # Only the last query sees the last key; the others share their mass evenly.
    scores = snapkv(planted([NUM_KEYS - 1] * 2))
    visible = [NUM_KEYS - WINDOW + i + 1 for i in range(WINDOW - 1)]
    expected = sum(1 / n for n in visible) / WINDOW
    torch.testing.assert_close(scores, torch.full_like(scores, expected))


def two_query_heads():
    """One query head looks at key 10, the other at key 12."""
    key = torch.zeros(NUM_HEADS, NUM_KEYS, HEAD_SIZE)
    key[:, 10], key[:, 12] = axis(0), axis(1)
    query = torch.stack([axis(0), axis(1)])[None, :, None].expand(NUM_HEADS, GROUP, WINDOW, -1)
    return inputs(key, query)


def test_snapkv_joins_query_heads_after_pooling():
    mean = snapkv(two_query_heads(), pool_kernel=3)
    torch.testing.assert_close(mean[:, 11], torch.ones(NUM_HEADS))
    torch.testing.assert_close(mean[:, 9], torch.full((NUM_HEADS,), 0.5))
    largest = snapkv(two_query_heads(), pool_kernel=3, group_reduce="max")
    torch.testing.assert_close(largest[:, 9:14], torch.ones(NUM_HEADS, 5))
    summed = snapkv(two_query_heads(), pool_kernel=3, group_reduce="sum")
    torch.testing.assert_close(summed, 2 * mean)


def test_snapkv_joins_query_heads_before_pooling_if_told():
    mean = snapkv(two_query_heads(), pool_kernel=3, pool_first=False)
    torch.testing.assert_close(mean[:, 9:14], torch.full((NUM_HEADS, 5), 0.5))
    # Averages are joined the same either way.
    options = {"pool_kernel": 5, "pool_kind": "avg"}
    score_inputs, _ = random_inputs()
    torch.testing.assert_close(
        snapkv(score_inputs, pool_first=False, **options), snapkv(score_inputs, **options)
    )


def test_snapkv_joins_the_window():
    key = torch.zeros(NUM_HEADS, NUM_KEYS, HEAD_SIZE)
    key[:, 7], key[:, 30] = axis(0), axis(1)
    query = torch.stack([axis(0), axis(1), axis(1), axis(1)]).expand(NUM_HEADS, GROUP, -1, -1)
    for how, expected in (("mean", [0.25, 0.75]), ("sum", [1.0, 3.0]), ("max", [1.0, 1.0])):
        scores = snapkv(inputs(key, query), window_reduce=how)
        torch.testing.assert_close(scores[:, [7, 30]], torch.tensor([expected] * 2))


def test_snapkv_squares_before_it_joins():
    # Half of one query's attention, or all of it from half of the queries: squares differ.
    key = torch.zeros(1, NUM_KEYS, HEAD_SIZE)
    key[0, 7], key[0, 8], key[0, 9] = axis(0), axis(0), axis(1)
    query = torch.stack([axis(0), axis(0), axis(1), axis(1)]).expand(1, 1, -1, -1)
    plain = snapkv(inputs(key, query))[0, 7:10]
    torch.testing.assert_close(plain, torch.tensor([0.25, 0.25, 0.5]))
    squared = snapkv(inputs(key, query), score_power=2)[0, 7:10]
    torch.testing.assert_close(squared, torch.tensor([0.125, 0.125, 0.5]))


def test_snapkv_uses_scale_and_soft_cap():
    flat = snapkv(planted([5, 41], scale=0.0))
    assert flat.max() - flat.min() < 1e-6
    # A cap of 1 lets the planted key weigh at most e times any other.
    capped = snapkv(planted([5, 41], logits_soft_cap=1.0))
    torch.testing.assert_close(capped[0, 5] / capped[0, 0], torch.tensor(1.0).exp())


@pytest.mark.parametrize(
    "scorer", [SnapKV(), CriticalKV(), DefensiveKV(), Span()], ids=lambda s: type(s)
)
def test_half_precision_is_scored_in_float32(scorer):
    half, _ = random_inputs(dtype=torch.bfloat16)
    scores = scorer.score(half)
    exact = scorer.score(
        ScoreInputs(
            key=half.key.float(),
            num_candidates=half.num_candidates,
            budget_tokens=half.budget_tokens,
            scale=half.scale,
            window_query=half.window_query.float(),
            value=half.value.float(),
            output_weight=half.output_weight.float(),
            output_root=half.output_root,
        )
    )
    for name in ("first", "second"):
        a, b = getattr(scores, name), getattr(exact, name)
        if a is None:
            assert b is None
            continue
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("epsilon", [0.0, 1e-4, 0.5])
def test_criticalkv_weighs_the_second_stage_by_value_norms(epsilon):
    score_inputs, _ = random_inputs(num_candidates=48)
    options = {"pool_kernel": 3, "window_reduce": "sum"}
    scores = CriticalKV(epsilon=epsilon, **options).score(score_inputs)
    assert torch.equal(scores.first, SnapKV(**options).score(score_inputs).first)
    norms = ops.projected_value_norm(
        score_inputs.value[:, :48], score_inputs.output_weight, backend="reference"
    )
    torch.testing.assert_close(scores.second, (scores.first + epsilon) * norms)


def test_defensivekv_without_value_norms_ignores_the_values():
    score_inputs, _ = random_inputs()
    scorer = DefensiveKV(value_norm=False)
    other = {
        "key": score_inputs.key,
        "num_candidates": score_inputs.num_candidates,
        "budget_tokens": score_inputs.budget_tokens,
        "scale": score_inputs.scale,
        "window_query": score_inputs.window_query,
        "value": torch.full_like(score_inputs.value, 3.0),
        "output_weight": torch.full_like(score_inputs.output_weight, 3.0),
    }
    scores = scorer.score(score_inputs).first
    assert torch.equal(scores, scorer.score(ScoreInputs(**other)).first)
    assert not torch.equal(scores, DefensiveKV().score(score_inputs).first)


def test_defensivekv_survives_queries_that_see_nothing_before_the_window():
    # Key 60 draws all attention of the queries that see it: the rest underflows to 0.
    key = torch.zeros(NUM_HEADS, NUM_KEYS, HEAD_SIZE)
    key[:, NUM_KEYS - WINDOW] = axis(0, 1000.0)
    query = axis(0, 1000.0).expand(NUM_HEADS, GROUP, WINDOW, HEAD_SIZE)
    score_inputs = inputs(
        key,
        query,
        value=torch.ones(NUM_HEADS, NUM_KEYS, HEAD_SIZE),
        output_weight=torch.ones(NUM_HEADS, GROUP, HEAD_SIZE, 4),
    )
    scores = DefensiveKV().score(score_inputs).first
    assert not scores.isnan().any()


def test_span_keydiff_is_span_first_and_keydiff_second():
    score_inputs, _ = random_inputs(seed=3)
    scores = SpanKeyDiff().score(score_inputs)
    span = Span().score(score_inputs)
    keydiff = KeyDiff(span_kernel=5).score(score_inputs)
    assert torch.equal(scores.first, span.first)
    torch.testing.assert_close(scores.second, keydiff.first + 1)
    assert (scores.second >= 0).all()


def test_tova_keeps_the_neighbours_of_what_it_looks_at():
    score_inputs, _ = random_inputs(num_candidates=NUM_CANDIDATES)
    narrow = TOVA().score(score_inputs).first
    wide = TOVA(span_kernel=5).score(score_inputs).first
    assert torch.equal(wide, ops.pool_scores(narrow, 5, "max"))
    assert not torch.equal(wide, narrow)
