"""Scorers that need every query, chunk by chunk; and the rotary encoding they undo."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_inputs import observe, random_inputs, rotary

from vllm_kvcompress.policies.base import ChunkInputs, Rotary
from vllm_kvcompress.policies.scorers import h2o
from vllm_kvcompress.policies.scorers.expected_attention import ExpectedAttention
from vllm_kvcompress.policies.scorers.h2o import H2O
from vllm_kvcompress.policies.scorers.snapkv import SnapKV

NUM_TOKENS = 61


def rotated_matrix(encoding, position, head_size):
    """Rotation at one position as an explicit matrix, written out pair by pair."""
    rotary_dim = encoding.cos_sin.shape[1]
    half = rotary_dim // 2
    matrix = torch.eye(head_size, dtype=torch.float64)
    for i in range(half):
        cos, sin = (float(encoding.cos_sin[position, j]) for j in (i, half + i))
        a, b = (i, half + i) if encoding.is_neox_style else (2 * i, 2 * i + 1)
        matrix[a, a] = matrix[b, b] = cos
        matrix[a, b], matrix[b, a] = -sin, sin
    return matrix


ENCODINGS = {
    "neox": {"rotary_dim": 8},
    "neox_partial": {"rotary_dim": 4},
    "interleaved": {"rotary_dim": 8, "is_neox_style": False},
    "interleaved_partial": {"rotary_dim": 6, "is_neox_style": False},
}
by_encoding = pytest.mark.parametrize("options", ENCODINGS.values(), ids=ENCODINGS)


@pytest.mark.parametrize("scaling", [1.0, 1.25], ids=["plain", "yarn"])
@by_encoding
def test_unrotate_undoes_the_encoding(options, scaling):
    encoding = rotary(scaling=scaling, **options)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 7, 8, generator=generator, dtype=torch.float64)
    encoded = torch.stack(
        [query[..., i, :] @ rotated_matrix(encoding, 11 + i, 8).t() for i in range(7)], dim=-2
    )
    assert not torch.allclose(encoded, query, atol=0.1)
    decoded = encoding.unrotate(encoded.float(), 11)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded.double(), query, rtol=1e-5, atol=1e-5)


def test_unrotate_works_in_float32_on_half_precision():
    encoding = rotary()
    query = torch.randn(1, 1, 40, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    decoded = encoding.unrotate(query, 5)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, encoding.unrotate(query.float(), 5))


@pytest.mark.parametrize(("first", "count"), [(0, 1), (61, 40), (500, 30)])
@by_encoding
def test_mean_rotation_is_the_mean_of_matrices(options, first, count):
    encoding = rotary(scaling=1.25, **options)
    # Past the table's end its last entry stands for the rest.
    last = encoding.cos_sin.shape[0] - 1
    matrices = [rotated_matrix(encoding, min(first + i, last), 8) for i in range(count)]
    expected = torch.stack(matrices).mean(dim=0)
    actual = encoding.mean_rotation(first, count, 8)
    assert actual.shape == (8, 8)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@given(st.sets(st.integers(1, NUM_TOKENS - 1), max_size=8))
def test_expected_attention_does_not_see_where_chunks_end(bounds):
    scorer = ExpectedAttention()
    inputs, query = random_inputs()
    whole = observe(scorer, inputs, query)
    parts = observe(scorer, inputs, query, sorted(bounds))
    assert parts.count == whole.count == NUM_TOKENS - 4
    torch.testing.assert_close(parts.total, whole.total)
    torch.testing.assert_close(parts.products, whole.products)
    scores = [
        scorer.score(dataclasses.replace(inputs, observed=observed)).first
        for observed in (whole, parts)
    ]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("scorer", [ExpectedAttention(), H2O()], ids=["expected", "h2o"])
def test_observing_leaves_the_state_before_alone(scorer):
    # A chunk that is computed again, after preemption, starts from the same state.
    inputs, query = random_inputs()

    def chunk(first, end):
        return ChunkInputs(
            query=query[:, :, first:end],
            key=inputs.key[:, :end],
            first=first,
            scale=inputs.scale,
            rotary=inputs.rotary,
        )

    state = scorer.observe(chunk(0, 20), None)
    before = copy.deepcopy(state)
    once = scorer.observe(chunk(20, 45), state)
    assert once is not state
    again = scorer.observe(chunk(20, 45), before)
    for a, b in ((state, before), (once, again)):
        if isinstance(scorer, H2O):
            assert torch.equal(a, b)
            continue
        assert a.count == b.count
        assert torch.equal(a.total, b.total)
        assert torch.equal(a.products, b.products)


@pytest.mark.parametrize("num_sinks", [0, 4])
@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("value_norm", [True, False])
def test_expected_attention_against_loops(num_sinks, covariance, value_norm):
    scorer = ExpectedAttention(
        num_future=9,
        num_sinks=num_sinks,
        covariance=covariance,
        value_norm=value_norm,
        epsilon=0.01,
    )
    inputs, query = random_inputs(num_candidates=48)
    inputs = dataclasses.replace(inputs, observed=observe(scorer, inputs, query, (3, 33)))
    scores = scorer.score(inputs).first
    num_heads, group, num_tokens, head_size = query.shape
    assert (scores[:, :num_sinks] == math.inf).all()
    rotations = [
        rotated_matrix(inputs.rotary, num_tokens + i, head_size).double() for i in range(9)
    ]
    rotation = sum(rotations) / 9
    for h in range(num_heads):
        mean_weights = torch.zeros(num_tokens - num_sinks, dtype=torch.float64)
        for g in range(group):
            plain = torch.stack(
                [
                    rotated_matrix(inputs.rotary, i, head_size).t() @ query[h, g, i].double()
                    for i in range(num_sinks, num_tokens)
                ]
            )
            mean = rotation @ plain.mean(dim=0)
            spread = rotation @ torch.cov(plain.t(), correction=0) @ rotation.t()
            logits = []
            for key in inputs.key[h, num_sinks:].double():
                logit = float(key @ mean) * inputs.scale
                if covariance:
                    logit += float(key @ spread @ key) * inputs.scale**2 / 2
                logits.append(logit)
            mean_weights += torch.tensor(logits, dtype=torch.float64).softmax(dim=0) / group
        if value_norm:
            norms = inputs.value[h, num_sinks:].double().pow(2).sum(dim=1).sqrt()
            mean_weights = (mean_weights + 0.01) * norms
        torch.testing.assert_close(
            scores[h, num_sinks:].double(), mean_weights[: 48 - num_sinks], rtol=1e-4, atol=1e-6
        )


def test_expected_attention_of_a_prompt_of_sinks_alone():
    scorer = ExpectedAttention(num_sinks=100)
    inputs, query = random_inputs()
    inputs = dataclasses.replace(inputs, observed=observe(scorer, inputs, query, (10,)))
    assert (scorer.score(inputs).first == math.inf).all()


@given(st.sets(st.integers(1, NUM_TOKENS - 1), max_size=8))
def test_h2o_does_not_see_where_chunks_end(bounds):
    scorer = H2O()
    inputs, query = random_inputs()
    whole = observe(scorer, inputs, query)
    parts = observe(scorer, inputs, query, sorted(bounds))
    torch.testing.assert_close(parts, whole)
    # Every query gives away exactly its attention of 1.
    total = torch.full((2,), 3.0 * NUM_TOKENS)
    torch.testing.assert_close(whole.sum(dim=1), total)


def test_h2o_holds_few_queries_at_once(monkeypatch):
    inputs, query = random_inputs()
    whole = observe(H2O(), inputs, query, (40,))
    monkeypatch.setattr(h2o, "QUERIES_AT_ONCE", 7)
    torch.testing.assert_close(observe(H2O(), inputs, query, (40,)), whole)


def test_h2o_divides_by_the_queries_that_saw_a_token():
    inputs, query = random_inputs(num_candidates=48)
    inputs = dataclasses.replace(inputs, observed=observe(H2O(), inputs, query))
    plain = H2O(recent=0.0).score(inputs).first
    per_query = H2O(recent=0.0, normalize=True).score(inputs).first
    saw = torch.arange(NUM_TOKENS, NUM_TOKENS - 48, -1)
    torch.testing.assert_close(per_query * saw, plain)


def test_h2o_with_more_recent_tokens_than_the_prompt_has():
    inputs, query = random_inputs(budget_tokens=1000)
    inputs = dataclasses.replace(inputs, observed=observe(H2O(), inputs, query))
    assert (H2O(recent=1.0).score(inputs).first == math.inf).all()


def test_scoring_leaves_the_observed_state_alone():
    inputs, query = random_inputs()
    state = observe(H2O(), inputs, query)
    before = state.clone()
    H2O().score(dataclasses.replace(inputs, observed=state))
    assert torch.equal(state, before)


def test_a_scorer_of_the_window_refuses_all_queries():
    inputs, query = random_inputs()
    with pytest.raises(NotImplementedError, match="SnapKV does not look at all queries"):
        observe(SnapKV(), inputs, query)


def test_rotary_is_neox_unless_told():
    assert Rotary(torch.zeros(1, 4)).is_neox_style
