"""Scorers that look at no query: Knorm, KeyDiff, StreamingLLM and the random control."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layer_inputs import random_inputs
from plain_selection import select

from vllm_kvcompress import ops
from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.base import ScoreInputs
from vllm_kvcompress.policies.scorers.keydiff import KeyDiff
from vllm_kvcompress.policies.scorers.knorm import KNorm
from vllm_kvcompress.policies.scorers.random import Random
from vllm_kvcompress.policies.scorers.streamingllm import StreamingLLM

NUM_HEADS, NUM_KEYS, HEAD_SIZE, NUM_CANDIDATES = 2, 64, 8, 48


def inputs(key=None, layer=0, num_candidates=NUM_CANDIDATES):
    if key is None:
        key = torch.zeros(NUM_HEADS, NUM_KEYS, HEAD_SIZE)
    return ScoreInputs(
        key=key, num_candidates=num_candidates, budget_tokens=16, scale=1.0, layer=layer
    )


def select_from(scorer, method, mean_pages, block_size, granularity="page"):
    """What one layer of zero keys keeps, per head, as lists of indices."""
    config = KVCompressConfig(method, budget=999, options=(("granularity", granularity),))
    selection = select([scorer.score(inputs())], config, mean_pages, block_size)
    per_page = block_size if granularity == "token" else 1
    counts = (selection.num_pages.flatten() * per_page).tolist()
    return [part.tolist() for part in selection.indices.split(counts)]


@pytest.mark.parametrize("num_sinks", [0, 1, 4])
def test_streamingllm_keeps_sinks_and_the_most_recent(num_sinks):
    kept = select_from(StreamingLLM(num_sinks), "streamingllm", 2, 4, "token")
    recent = range(NUM_CANDIDATES - 8 + num_sinks, NUM_CANDIDATES)
    assert kept == [[*range(num_sinks), *recent]] * NUM_HEADS


def test_streamingllm_with_more_sinks_than_room_keeps_the_first():
    kept = select_from(StreamingLLM(30), "streamingllm", 2, 4, "token")
    assert kept == [list(range(8))] * NUM_HEADS


def test_streamingllm_in_pages_keeps_the_page_of_the_sinks_whole():
    assert select_from(StreamingLLM(4), "streamingllm", 3, 8) == [[0, 4, 5]] * NUM_HEADS


def test_streamingllm_accepts_more_sinks_than_candidates():
    scores = StreamingLLM(100).score(inputs()).first
    assert (scores == float("inf")).all()
    assert scores.shape == (NUM_HEADS, NUM_CANDIDATES)


def test_knorm_prefers_small_norms():
    score_inputs, _ = random_inputs(num_candidates=NUM_CANDIDATES)
    scores = KNorm().score(score_inputs).first
    norms = (score_inputs.key[:, :NUM_CANDIDATES] ** 2).sum(dim=-1)
    assert torch.equal(scores.argsort(dim=1, descending=True), norms.argsort(dim=1))


def test_knorm_is_exact_for_half_precision_keys():
    # In bfloat16 all these norms would round to the same number.
    key = torch.full((1, NUM_KEYS, HEAD_SIZE), 16.0, dtype=torch.bfloat16)
    key[0, 30, 0] = 15.9375
    scores = KNorm().score(inputs(key)).first
    assert scores.dtype == torch.float32
    assert scores.argmax() == 30
    assert (scores == scores.max()).sum() == 1


def test_keydiff_prefers_keys_that_point_away_from_the_others():
    key = torch.zeros(1, NUM_KEYS, HEAD_SIZE)
    key[0, :, 0] = torch.arange(1, NUM_KEYS + 1)
    key[0, 13] = -key[0, 13]
    key[0, 20] = torch.nn.functional.one_hot(torch.tensor(5), HEAD_SIZE)
    scores = KeyDiff().score(inputs(key)).first[0]
    assert scores.argsort(descending=True)[:2].tolist() == [13, 20]
    # Length does not count: the rest is equally redundant.
    rest = [i for i in range(NUM_CANDIDATES) if i not in (13, 20)]
    assert scores[rest].max() - scores[rest].min() < 1e-6


def test_keydiff_takes_the_mean_of_directions_over_the_whole_prompt():
    score_inputs, _ = random_inputs(num_candidates=NUM_CANDIDATES, dtype=torch.bfloat16)
    key = score_inputs.key.double()
    anchor = F.normalize(key, dim=-1).mean(dim=1, keepdim=True)
    expected = -F.cosine_similarity(key, anchor, dim=-1)[:, :NUM_CANDIDATES]
    scores = KeyDiff().score(score_inputs).first
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
    wide = KeyDiff(span_kernel=5).score(score_inputs).first
    assert torch.equal(wide, ops.pool_scores(scores, 5, "max"))


def test_random_is_seeded_and_differs_between_layers_and_seeds():
    def score(seed, layer=2):
        return Random(seed=seed).score(inputs(layer=layer)).first

    first = score(7)
    assert torch.equal(first, score(7))
    assert not torch.equal(first, score(7, layer=3))
    assert not torch.equal(first, score(8))
    assert not torch.equal(first[0], first[1])
    assert ((first >= 0) & (first < 1)).all()


def test_random_depends_on_nothing_but_seed_layer_and_shape():
    scores = [Random().score(random_inputs(seed=seed)[0]).first for seed in (0, 1)]
    assert torch.equal(*scores)


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Random(seed=1).score(inputs())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32, 2**64])
def test_any_accepted_seed_gives_scores(seed):
    try:
        config = KVCompressConfig("random", options=(("seed", seed),))
    except KVCompressConfigError as error:
        assert seed >= 2**32
        assert str(seed) in str(error)
    else:
        assert seed < 2**32
        assert make_scorer(config).score(inputs(layer=99)).first.isfinite().all()
