"""Methods that kvpress lacks, against their definitions written out as loops in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from layer_inputs import observe, random_inputs
from paper_forms import token_config
from plain_selection import select

from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.budgets.base import PageSupply
from vllm_kvcompress.policies.budgets.pyramid import Pyramid

SHAPES = {
    "gqa_1_to_1": {"num_heads": 3, "group": 1, "num_tokens": 53},
    "gqa_3_to_1": {"num_heads": 2, "group": 3, "num_tokens": 61},
    "gqa_8_to_1_long_window": {"num_heads": 2, "group": 8, "num_tokens": 90, "window": 32},
    "window_of_one": {"num_heads": 2, "group": 4, "num_tokens": 37, "window": 1},
}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def kept_tokens(scores, config, mean_tokens):
    """What each (layer, head) keeps at single-token pages: lists, layers outermost."""
    selection = select(scores, config, mean_tokens, 1)
    parts = selection.indices.split(selection.num_pages.flatten().tolist())
    num_heads = selection.num_pages.shape[1]
    parts = [part.tolist() for part in parts]
    return [parts[start : start + num_heads] for start in range(0, len(parts), num_heads)]


def causal_softmax(query, keys, scale):
    """Weights of one query [d] over its visible keys [m, d], as floats."""
    logits = [float(key.double() @ query.double()) * scale for key in keys]
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return [x / total for x in weights]


def window_rows(inputs):
    """rows[head][query head][query]: weights over the keys before the window."""
    num_heads, group, window, _ = inputs.window_query.shape
    before = inputs.key.shape[1] - window
    return [
        [
            [
                causal_softmax(
                    inputs.window_query[h, g, w], inputs.key[h, : before + w + 1], inputs.scale
                )[:before]
                for w in range(window)
            ]
            for g in range(group)
        ]
        for h in range(num_heads)
    ]


def near(row, i, kernel):
    return row[max(0, i - kernel // 2) : i + kernel // 2 + 1]


def value_norms(inputs, head, num_tokens):
    """||Wo v||_1 of a head's first values, mean over its query heads."""
    weight = inputs.output_weight[head].double()
    return [
        sum(float((inputs.value[head, i].double() @ w).abs().sum()) for w in weight) / len(weight)
        for i in range(num_tokens)
    ]


def defensive_reference(inputs, mass, kernel=5):
    """The authors' procedure: scores [H][tokens before the window], and the tokens put first."""
    rows = window_rows(inputs)
    num_heads, group, window, _ = inputs.window_query.shape
    before = inputs.key.shape[1] - window
    scores = []
    for h in range(num_heads):
        worst = [0.0] * before
        for g in range(group):
            for row in rows[h][g]:
                pooled = [sum(near(row, i, kernel)) / kernel for i in range(before)]
                back = sum(row) / sum(pooled)
                worst = [max(a, b * back) for a, b in zip(worst, pooled, strict=True)]
        floor = sum(worst) / before
        scores.append([max(x, floor) for x in worst])
    norms = [value_norms(inputs, h, before) for h in range(num_heads)]
    for h in range(num_heads):
        for i in range(before):
            scores[h][i] *= norms[h][i] / sum(norms[other][i] for other in range(num_heads))
    every_row = [row for head in rows for query_head in head for row in query_head]
    bias = sum(sum(row[-window:]) for row in every_row) / len(every_row)
    first = []
    for h in range(num_heads):
        of_head = [row for query_head in rows[h] for row in query_head]
        mean = [sum(row[i] for row in of_head) / len(of_head) for i in range(before)]
        share = [x / sum(mean) for x in mean]
        order = sorted(range(before), key=lambda i: -share[i])
        reached, count = 0.0, 0
        for rank, i in enumerate(order):
            reached += share[i]
            if reached >= mass - bias:
                # The token that reaches the threshold is not among the first.
                count = rank
                break
        first.append(sorted(order[: min(count, inputs.budget_tokens)]) if mass else [])
    top = max(max(row) for row in scores)
    for h in range(num_heads):
        for i in first[h]:
            scores[h][i] = top
    return torch.tensor(scores, dtype=torch.float64), first


@pytest.mark.parametrize("mass", [0.0, 0.3, 0.9])
@by_shape
def test_defensivekv(shape, mass):
    inputs, _ = random_inputs(seed=3, **shape)
    scorer = make_scorer(token_config("defensivekv", mass_first=mass))
    scores = scorer.score(inputs).first
    reference, first = defensive_reference(inputs, mass)
    torch.testing.assert_close(scores.double(), reference, rtol=1e-4, atol=1e-8)
    for head, tokens in enumerate(first):
        assert (scores[head, tokens] == scores.max()).all()
    if mass == 0.9:
        assert any(first)
    if mass == 0.3 and shape.get("window") == 32:
        # So long a window holds that mass itself and leaves nothing to put first.
        assert not any(first)


def test_defensivekv_puts_at_most_the_budget_first():
    inputs, _ = random_inputs(seed=3, budget_tokens=4, sharpness=0.1)
    _, first = defensive_reference(inputs, 0.9)
    assert [len(tokens) for tokens in first] == [4, 4]
    scores = make_scorer(token_config("defensivekv", mass_first=0.9)).score(inputs).first
    is_best = scores == scores.max()
    for head, tokens in enumerate(first):
        assert is_best[head, tokens].all()
    # One token has that score by itself.
    assert int(is_best.sum()) == 9


def span_reference(inputs, near_tokens, kernel=5, span=11):
    """Scores [H][candidates] as the docstring of `Span` tells them."""
    num_heads, group, window, _ = inputs.window_query.shape
    num_keys = inputs.key.shape[1]
    rated = max(inputs.num_candidates, num_keys - window)
    scores = []
    for h in range(num_heads):
        worst = [0.0] * rated
        for g in range(group):
            for w in range(window):
                position = num_keys - window + w
                row = causal_softmax(
                    inputs.window_query[h, g, w], inputs.key[h, : position + 1], inputs.scale
                )
                row += [0.0] * num_keys
                row = [x if position - i >= near_tokens else 0.0 for i, x in enumerate(row[:rated])]
                pooled = [sum(near(row, i, kernel)) / kernel for i in range(rated)]
                back = sum(row) / sum(pooled)
                worst = [max(a, b * back) for a, b in zip(worst, pooled, strict=True)]
        floor = sum(worst) / rated
        scores.append([max(x, floor) for x in worst])
    effects = [
        [float((inputs.value[h, i] @ inputs.output_root[h]).double().norm()) for i in range(rated)]
        for h in range(num_heads)
    ]
    for h in range(num_heads):
        for i in range(rated):
            scores[h][i] *= effects[h][i] / sum(effect[i] for effect in effects)
        scores[h] = [max(near(scores[h], i, span)) for i in range(inputs.num_candidates)]
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("near_tokens", [1, 8])
@pytest.mark.parametrize("recent", [1, 3, 34], ids="recent_{}".format)
@by_shape
def test_span(shape, near_tokens, recent):
    shape = {**shape, "num_candidates": shape["num_tokens"] - recent}
    inputs, _ = random_inputs(seed=3, **shape)
    scores = make_scorer(token_config("span", near_tokens=near_tokens)).score(inputs).first
    reference = span_reference(inputs, near_tokens)
    torch.testing.assert_close(scores.double(), reference, rtol=1e-4, atol=1e-8)


def authors_joint_top(scores, total):
    """[L][H] kept tokens of one flat top-`total` over [L, H, n] scores."""
    num_layers, num_heads, num_tokens = scores.shape
    flat = scores.flatten().tolist()
    best = sorted(range(len(flat)), key=lambda i: -flat[i])[:total]
    kept = [[[] for _ in range(num_heads)] for _ in range(num_layers)]
    for i in sorted(best):
        kept[i // (num_heads * num_tokens)][i // num_tokens % num_heads].append(i % num_tokens)
    return kept


@pytest.mark.parametrize("method", ["defensivekv", "layer-defensivekv"])
def test_defensivekv_selects_as_the_authors_do(method):
    """They guarantee heads nothing: alpha and floor are 0 for them, our defaults 0.2 and 0.05."""
    option = "floor" if method == "layer-defensivekv" else "alpha"
    config, mean_tokens = token_config(method, mass_first=0.6, **{option: 0.0}), 20
    scorer, scores, reference = make_scorer(config), [], []
    for layer in range(3):
        # Layers of unlike sharpness, so that they deserve unlike budgets.
        inputs, _ = random_inputs(
            seed=layer, layer=layer, budget_tokens=mean_tokens, sharpness=1.5 + layer / 4
        )
        scores.append(scorer.score(inputs))
        reference.append(defensive_reference(inputs, 0.6)[0])
    reference = torch.stack(reference)
    num_layers, num_heads, _ = reference.shape
    if method == "layer-defensivekv":
        expected = authors_joint_top(reference, mean_tokens * num_layers * num_heads)
    else:
        expected = [authors_joint_top(x[None], mean_tokens * num_heads)[0] for x in reference]
    assert kept_tokens(scores, config, mean_tokens) == expected
    sizes = {len(tokens) for layer in expected for tokens in layer}
    assert len(sizes) > 1
    assert min(sizes) >= 1


@by_shape
def test_kv_compress_metric(shape):
    """Squared, summed over the window, max-pooled over 7 per query head, summed over those."""
    inputs, _ = random_inputs(seed=5, **shape)
    scores = make_scorer(token_config("kvc")).score(inputs).first
    for h, head in enumerate(window_rows(inputs)):
        expected = torch.zeros(scores.shape[1], dtype=torch.float64)
        for query_head in head:
            squares = [sum(x**2 for x in column) for column in zip(*query_head, strict=True)]
            expected += torch.tensor([max(near(squares, i, 7)) for i in range(len(squares))])
        torch.testing.assert_close(scores[h].double(), expected, rtol=1e-4, atol=1e-9)


def test_kv_compress_selects_over_all_layers_and_heads():
    config, mean_tokens = token_config("kvc", floor=0.0), 10
    scores = [
        make_scorer(config).score(random_inputs(seed=i, sharpness=0.5 + i)[0]) for i in range(3)
    ]
    stacked = torch.stack([layer.first for layer in scores])
    expected = authors_joint_top(stacked, mean_tokens * 6)
    kept = kept_tokens(scores, config, mean_tokens)
    # Every stream keeps one page at least; the dullest layer would keep nothing here.
    assert expected[0] == [[], []]
    assert sum(len(tokens) for layer in kept for tokens in layer) == 60
    for layer in range(3):
        for head, (ours, theirs) in enumerate(zip(kept[layer], expected[layer], strict=True)):
            row = stacked[layer, head]
            if set(ours) <= set(theirs):
                # What a dull head was given is taken from the worst that others would keep.
                dropped = set(theirs) - set(ours)
                assert all(row[i] <= row[j] for i in dropped for j in ours)
            else:
                assert (theirs, ours) == ([], [int(row.argmax())])


@by_shape
def test_h2o_is_causal_and_counts_every_query(shape):
    inputs, query = random_inputs(seed=7, **shape)
    scorer = make_scorer(token_config("h2o", recent=0.0))
    inputs = dataclasses.replace(inputs, observed=observe(scorer, inputs, query, (7, 20)))
    scores = scorer.score(inputs).first
    num_heads, group, num_tokens, _ = query.shape
    for h in range(num_heads):
        expected = torch.zeros(num_tokens, dtype=torch.float64)
        for g in range(group):
            for i in range(num_tokens):
                weights = causal_softmax(query[h, g, i], inputs.key[h, : i + 1], inputs.scale)
                expected[: i + 1] += torch.tensor(weights, dtype=torch.float64)
        expected = expected[: inputs.num_candidates]
        torch.testing.assert_close(scores[h].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recent", [0.0, 0.3, 0.5, 1.0])
def test_h2o_keeps_the_latest_and_the_heaviest(recent):
    """Half of all kept tokens, the window among them, are the latest; the rest by their sums."""
    budget, window = 20, 5
    inputs, query = random_inputs(seed=8, window=window, budget_tokens=budget)
    config = token_config("h2o", recent=recent)
    scorer = make_scorer(config)
    inputs = dataclasses.replace(inputs, observed=observe(scorer, inputs, query))
    num_tokens = inputs.key.shape[1]
    num_latest = max(0, int(recent * (budget + window)) - window)
    latest = list(range(num_tokens - window - num_latest, num_tokens - window))
    for head, kept in enumerate(kept_tokens([scorer.score(inputs)], config, budget)[0]):
        sums = inputs.observed[head].tolist()
        others = sorted(range(num_tokens - window - num_latest), key=lambda i: -sums[i])
        assert kept == sorted(latest + others[: budget - num_latest])


@by_shape
def test_tova(shape):
    """The last query's attention, mean over every query head of the layer, alike for all heads."""
    inputs, _ = random_inputs(seed=9, **shape)
    scores = make_scorer(token_config("tova")).score(inputs).first
    num_heads, group = inputs.window_query.shape[:2]
    rows = [
        causal_softmax(inputs.window_query[h, g, -1], inputs.key[h], inputs.scale)
        for h in range(num_heads)
        for g in range(group)
    ]
    expected = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    expected = torch.tensor(expected[: inputs.num_candidates], dtype=torch.float64)
    torch.testing.assert_close(
        scores.double(), expected.expand(num_heads, -1), rtol=1e-4, atol=1e-9
    )


def chunk_sums(inputs, length):
    """Window attention of all heads, summed per chunk of candidates."""
    rows = [row for head in window_rows(inputs) for query_head in head for row in query_head]
    per_token = [sum(column) for column in zip(*rows, strict=True)][: inputs.num_candidates]
    starts = range(0, len(per_token), length)
    return [sum(per_token[start : start + length]) for start in starts]


def best_chunks(sums, length, num_candidates, budget):
    """Whole chunks from the best down, the last one cut; restored to token order."""
    chosen = []
    for number in sorted(range(len(sums)), key=lambda i: -sums[i]):
        chosen += range(number * length, min((number + 1) * length, num_candidates))
    return sorted(chosen[:budget])


@pytest.mark.parametrize("reuse", [1, 2, 3])
@pytest.mark.parametrize("budget", [20, 23, 7])
def test_chunkkv_with_layer_reuse(budget, reuse):
    """Groups of layers share the choice of their first; every head of a layer keeps the same."""
    config = token_config("chunkkv", reuse_layers=reuse)
    scorer, scores, expected = make_scorer(config), [], []
    for layer in range(5):
        inputs, _ = random_inputs(
            seed=20 + layer, num_tokens=68, layer=layer, earlier_scores=list(scores)
        )
        scores.append(scorer.score(inputs))
        if layer % reuse == 0:
            sums = chunk_sums(inputs, 10)
            kept = best_chunks(sums, 10, inputs.num_candidates, budget)
        expected.append([kept, kept])
    assert kept_tokens(scores, config, budget) == expected
    assert len({tuple(layer.first[0].tolist()) for layer in scores}) == math.ceil(5 / reuse)


def test_chunkkv_takes_a_short_last_chunk_by_its_sum():
    inputs, _ = random_inputs(seed=1, num_tokens=68, window=5)
    scores = make_scorer(token_config("chunkkv")).score(inputs).first
    expected = torch.tensor(chunk_sums(inputs, 10))
    torch.testing.assert_close(scores[0, ::10], expected, rtol=1e-4, atol=1e-6)
    assert (scores[0, 60:] == scores[0, 60]).all()


def authors_pyramid(budget, window, num_layers, num_tokens, beta=20):
    """Tokens per layer beside the window, in the integers of the authors' published code."""
    base = budget - window
    low = base // beta
    high = 2 * base - low
    if high >= num_tokens - window:
        high = num_tokens - window
        low = 2 * base - high
    step = (high - low) // (num_layers - 1)
    return [high - layer * step for layer in range(num_layers)]


@pytest.mark.parametrize(
    ("budget", "num_layers", "overspend"),
    [(64, 32, 0.117), (128, 32, 0.043), (128, 80, 0.273)],
)
def test_pyramidkv_spends_what_it_was_given(budget, num_layers, overspend):
    """The authors round their step down, so every layer after the first gets too much."""
    window, num_tokens = 8, 8000
    theirs = authors_pyramid(budget, window, num_layers, num_tokens)
    spent = sum(theirs) + window * num_layers
    assert spent / (budget * num_layers) - 1 == pytest.approx(overspend, abs=5e-4)
    supply = PageSupply(num_layers, 1, budget - window, num_tokens - window)
    ours = Pyramid(20.0).layer_pages(supply)
    assert sum(ours) + window * num_layers == budget * num_layers
    # The same slope but for the rounding, which adds up to less than a token per layer.
    drift = [a - b for a, b in zip(theirs, ours, strict=True)]
    assert drift[0] in (0, 1)
    assert all(-1 <= b - a <= 2 for a, b in itertools.pairwise(drift))
