"""Attention sinks: a learned logit per query head that joins the softmax and has no value."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cache_shapes import cache_shape
from compaction_prompts import (
    LAYERS,
    SHAPE,
    WINDOW,
    batch_scores,
    collection_of,
    deliver,
    make_compactor,
    make_prompt,
    score,
)
from layer_inputs import observe, random_inputs

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.compactor import Compactor
from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.compaction.prompts import PromptCompaction
from vllm_kvcompress.compaction.scoring import Backends
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.policies import RECIPES, make_scorer
from vllm_kvcompress.policies.base import ScoreInputs
from vllm_kvcompress.policies.scorers.expected_attention import ExpectedAttention, QueryMoments

SHAPES = {
    "gqa_1_to_1": (4, 1, 8, 40, 16),
    "gqa_3_to_1_odd_lengths": (3, 3, 7, 61, 12),
    "gqa_8_to_1": (1, 8, 5, 129, 32),
    "window_is_the_prompt": (2, 2, 16, 16, 16),
    "one_token": (1, 1, 1, 1, 8),
}
# What these rate is not attention, so no sink has a say in it.
METHODS_WITHOUT_ATTENTION = {"knorm", "keydiff", "random", "streamingllm"}


def with_column(query, key, scale, cap, sinks):
    """Weights by a softmax in float64 over the keys and one more column, which is then dropped."""
    logits = torch.einsum("hgwd,hnd->hgwn", query.double(), key.double()) * scale
    if cap:
        logits = cap * torch.tanh(logits / cap)
    window, num_keys = logits.shape[2:]
    visible = torch.arange(num_keys) <= torch.arange(num_keys - window, num_keys)[:, None]
    column = sinks.double()[:, :, None, None].expand(-1, -1, window, 1)
    logits = torch.cat([torch.where(visible, logits, -math.inf), column], dim=-1)
    return logits.softmax(dim=-1)[..., :num_keys].float()


def drawn_sinks(num_heads, group):
    """Sinks that draw from nearly nothing to nearly everything."""
    return torch.linspace(-6.0, 9.0, num_heads * group).view(num_heads, group)


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_window_attention_counts_the_sink(shape, dtype, cap):
    num_heads, group, window, num_keys, head_size = shape
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(num_heads, group, window, head_size, generator=generator).to(dtype)
    key = torch.randn(num_heads, num_keys, head_size, generator=generator).to(dtype)
    sinks = drawn_sinks(num_heads, group)
    actual = ops.window_attention(query, key, 1.5, cap, sinks)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(
        actual, ops.window_attention(query, key, 1.5, cap, sinks, backend="reference")
    )
    torch.testing.assert_close(actual, with_column(query, key, 1.5, cap, sinks))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_window_attention_with_a_sink_by_hand(backend):
    key = torch.tensor([[[1.0], [3.0]]])
    query = torch.ones(1, 1, 1, 1)
    weights = ops.window_attention(query, key, 1.0, sinks=torch.tensor([[2.0]]), backend=backend)
    total = sum(math.exp(x) for x in (1, 3, 2))
    expected = torch.tensor([math.exp(1) / total, math.exp(3) / total])
    torch.testing.assert_close(weights.flatten(), expected)
    # Nothing overflows, whichever is the greatest.
    for sink, kept in ((1000.0, 0.0), (-1000.0, 1.0)):
        given = torch.tensor([[sink]])
        weights = ops.window_attention(query, key, 1.0, sinks=given, backend=backend)
        assert float(weights.sum()) == pytest.approx(kept)


@pytest.mark.parametrize(
    "sinks", [torch.zeros(2, 4), torch.zeros(6), torch.zeros(2, 3, dtype=torch.bfloat16)], ids=str
)
def test_window_attention_refuses_sinks_that_do_not_fit(sinks):
    inputs, _ = random_inputs()
    with pytest.raises(ValueError, match=r"want sinks \(2, 3\) float32, got \(\("):
        ops.window_attention(inputs.window_query, inputs.key, 1.0, sinks=sinks)


def scores_of(method, inputs, query):
    scorer = make_scorer(KVCompressConfig(method, budget=24, window=5))
    if "all_queries" in scorer.needs:
        inputs = dataclasses.replace(inputs, observed=observe(scorer, inputs, query))
    return scorer.score(inputs)


def assert_same(actual, expected):
    torch.testing.assert_close(actual.first, expected.first)
    assert (actual.second is None) == (expected.second is None)
    if actual.second is not None:
        torch.testing.assert_close(actual.second, expected.second)


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_rates_the_models_own_attention(method, monkeypatch):
    sinks = drawn_sinks(2, 3)
    inputs, query = random_inputs()
    plain = scores_of(method, inputs, query)
    scores = scores_of(method, dataclasses.replace(inputs, sinks=sinks), query)
    if method in METHODS_WITHOUT_ATTENTION:
        assert torch.equal(scores.first, plain.first)
        return
    assert not torch.allclose(scores.first, plain.first)
    if method == "expected-attention":
        # A softmax of its own, tested below.
        return
    # The same without sinks, on weights made here.
    monkeypatch.setattr(
        ops,
        "window_attention",
        lambda query, key, scale, cap, none: with_column(query, key, scale, cap, sinks),
    )
    assert_same(scores_of(method, inputs, query), scores)


@pytest.mark.parametrize("method", RECIPES)
def test_sinks_that_draw_nothing_change_nothing(method):
    inputs, query = random_inputs()
    scores = scores_of(method, dataclasses.replace(inputs, sinks=torch.full((2, 3), -90.0)), query)
    assert_same(scores, scores_of(method, inputs, query))


@pytest.mark.parametrize("num_sinks", [0, 4])
def test_expected_attention_shares_with_the_sink(num_sinks):
    scorer = ExpectedAttention(num_sinks=num_sinks, value_norm=False)
    sinks = torch.tensor([[0.5], [3.0]])
    inputs, query = random_inputs(group=1, num_candidates=61)
    inputs = dataclasses.replace(inputs, observed=observe(scorer, inputs, query))

    def rated(sinks):
        return scorer.score(dataclasses.replace(inputs, sinks=sinks)).first[:, num_sinks:]

    # Keys keep their shares; what the sink draws beside them has odds of exp(sink).
    plain, one, other = rated(None), rated(sinks), rated(sinks + 2.0)
    torch.testing.assert_close(plain.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(one / one.sum(dim=1, keepdim=True), plain)
    odds = [(1 - x.sum(dim=1)) / x.sum(dim=1) for x in (one, other)]
    torch.testing.assert_close(odds[1] / odds[0], torch.full((2,), math.exp(2)), rtol=1e-4, atol=0)
    # A sink like the sum of all keys takes half.
    equal = sinks - odds[0].log()[:, None]
    torch.testing.assert_close(rated(equal).sum(dim=1), torch.full((2,), 0.5))


def test_expected_attention_weighs_query_heads_by_their_sinks():
    scorer, sinks = ExpectedAttention(), drawn_sinks(2, 3)
    inputs, query = random_inputs()
    moments = observe(scorer, inputs, query)
    scores = scorer.score(dataclasses.replace(inputs, observed=moments, sinks=sinks)).first
    each = []
    for g in range(3):
        own = QueryMoments(
            moments.count, moments.total[:, g : g + 1], moments.products[:, g : g + 1]
        )
        given = dataclasses.replace(inputs, observed=own, sinks=sinks[:, g : g + 1])
        each.append(scorer.score(given).first)
    torch.testing.assert_close(scores, torch.stack(each).mean(dim=0))


@pytest.mark.parametrize("method", ["span", "h2o", "expected-attention"])
def test_each_layer_is_scored_with_its_own_sinks(method):
    config = KVCompressConfig(method, budget=28, window=WINDOW)
    prompt = make_prompt(config, 72)
    heads = (SHAPE.num_kv_heads, SHAPE.num_queries_per_kv)

    def layer_scores(layers):
        compactor, collected = make_compactor(config, prompt, layers), collection_of(prompt)
        deliver(compactor, collected, prompt, (40,))
        return [scores.first for scores in batch_scores(score(compactor, collected, prompt))]

    plain = layer_scores(LAYERS)
    for layer in range(SHAPE.num_layers):
        layers = list(LAYERS)
        layers[layer] = dataclasses.replace(layers[layer], sinks=drawn_sinks(*heads))
        for i, scores in enumerate(layer_scores(layers)):
            assert torch.equal(scores, plain[i]) == (i != layer)


@pytest.mark.parametrize("method", ["snapkv", "kvc", "tova"])
def test_batches_on_a_gpus_pages_count_the_sink(method):
    num_tokens, block_size = 101, 16
    shape = cache_shape(2, 2, 3, 64, block_size)
    options = (("granularity", "token"),)
    config = KVCompressConfig(method, budget=48, window=WINDOW, options=options)
    geometry = config.geometry(block_size).of(num_tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(20, generator=generator)
    # The last block of the prompt is not full, so it lies behind the region.
    blocks, region = ids[:7], ids[7 : 7 + geometry.num_region_blocks]
    row = torch.cat([blocks[:6], region, blocks[6:]]).int()
    pool = torch.randn(20, 2, 2, block_size, 2 * 64, generator=generator)
    query = torch.randn(2, num_tokens, 6, 64, generator=generator)
    layers = [LayerParameters(0.4, sinks=drawn_sinks(2, 3) + layer) for layer in range(2)]
    compactor = Compactor(
        config,
        shape,
        pool.view(-1, block_size, 128),
        PageOrder.plain(block_size, 64),
        layers,
        Backends.all("reference"),
    )
    scorer = compactor.scoring.scorer
    assert compactor.scoring.is_fused == (method != "tova")
    prompt = PromptCompaction(geometry, 2)
    batch = compactor.batch([prompt], row[None])
    for layer in range(2):
        pages = compactor.pages(layer, blocks)
        compactor.scoring.collect(prompt, layer, query[layer], 0, pages)
        compactor.score_layer(batch, layer, [None], [pages])
    num_candidates = geometry.num_candidate_tokens
    for layer, parameters in enumerate(layers):
        inputs = ScoreInputs(
            key=pool[blocks, layer, :, :, :64].transpose(0, 1).flatten(1, 2)[:, :num_tokens],
            num_candidates=num_candidates,
            budget_tokens=48,
            scale=0.4,
            sinks=parameters.sinks,
            window_query=query[layer, -WINDOW:].unflatten(1, (2, 3)).permute(1, 2, 0, 3),
        )
        expected = scorer.score(inputs).first
        found = batch.first[0, 2 * layer : 2 * layer + 2, :num_candidates]
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-8)
        plain = scorer.score(dataclasses.replace(inputs, sinks=None)).first
        assert not torch.allclose(plain, expected, rtol=0.01)
