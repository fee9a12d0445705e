"""Our methods keep the tokens that kvpress 0.5.5 keeps; every difference is named and bounded.

benchmarks/quality/kvpress_env.sh wrote tests/data/kvpress. Scores are compared as well, so that
sets cannot agree by luck. kvpress' control, RandomPress, is left out: it draws from torch's
global generator, ours from a seed and the layer. Unless a test says otherwise, budgets are
single tokens (block_size 1), which is all that kvpress knows.

kvpress counts the window as part of the kept tokens and gives it the best score; ours keeps it
outside the competition. So every comparison is over the tokens before the window, and asserts
that kvpress kept the window whole.
"""

from __future__ import annotations

import pytest
import torch
from kvpress_data import (
    SINGLE_LAYER,
    assert_close_scores,
    keep,
    load,
    matching_alpha,
    pyramid_budgets,
    rank_order,
    runs_of,
    score,
    theirs,
)
from paper_forms import token_config

from vllm_kvcompress import ops
from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.base import LayerScores, ScoreInputs
from vllm_kvcompress.policies.budgets.base import PageSupply
from vllm_kvcompress.policies.budgets.pyramid import Pyramid

SNAPKV = {"pool_kernel": 5, "pool_kind": "avg"}


@runs_of("snapkv")
def test_snapkv(case, run):
    arrays, _ = load(case)
    window, config = run["window"], token_config("snapkv", **SNAPKV)
    scores = score(config, arrays, window, window)
    reference, kept = theirs(arrays, run, window)
    assert_close_scores(scores.first, reference)
    assert torch.equal(keep(scores, config, run["budget"] - window), kept)


@runs_of("snapkv")
def test_snapkv_in_blocks_differs_only_by_rounding_to_whole_blocks(case, run):
    """With blocks of 16, the tail reaches back to a block boundary, and the budget rounds down.

    So ours lacks the worst of kvpress' tokens and has the few between the last boundary and
    the window beside them.
    """
    arrays, _ = load(case)
    block_size, window, config = 16, run["window"], token_config("snapkv", **SNAPKV)
    num_tokens = arrays["key"].shape[1]
    num_candidates = (num_tokens - window) // block_size * block_size
    num_tail_tokens = num_tokens - num_candidates
    mean_pages = max(1, (run["budget"] - num_tail_tokens) // block_size)
    scores = score(config, arrays, window, num_tail_tokens)
    ours = keep(scores, config, mean_pages, num_tail_tokens, block_size)
    reference, kept = theirs(arrays, run, window)
    reference, kept = reference[:, :num_candidates], kept[:, :num_candidates]
    assert (ours.sum(dim=1) == mean_pages * block_size).all()
    if mean_pages * block_size + num_tail_tokens > run["budget"]:
        # One page is the least that a head keeps; it then holds more than kvpress' tokens.
        assert mean_pages == 1
        for head in range(len(ours)):
            best = rank_order(reference)[head, :block_size].tolist()
            assert set(best) == set(ours[head].nonzero().flatten().tolist())
        return
    assert not (ours & ~kept).any()
    for head in range(len(ours)):
        lacking = reference[head][kept[head] & ~ours[head]]
        assert (lacking <= reference[head][ours[head]].min()).all()


@runs_of("snapkv")
def test_snapkv_in_whole_pages_keeps_the_pages_of_their_best_tokens(case, run):
    """Granularity 'page': going down kvpress' ranking, the first pages met are kept whole."""
    arrays, _ = load(case)
    page, window = 8, run["window"]
    config = token_config("snapkv", granularity="page", **SNAPKV)
    scores = score(config, arrays, window, window)
    mean_pages = (run["budget"] - window) // page
    ours = keep(scores, config, mean_pages, window, page)
    reference, _ = theirs(arrays, run, window)
    for head, order in enumerate(rank_order(reference).tolist()):
        pages = list(dict.fromkeys(token // page for token in order))[:mean_pages]
        expected = {page * number + slot for number in pages for slot in range(page)}
        assert set(ours[head].nonzero().flatten().tolist()) == expected


@runs_of("ada-snapkv")
def test_ada_snapkv_given_the_same_guarantee(case, run):
    """The guarantee counts differently (see matching_alpha); given the same one, sets agree.

    Ours never guarantees less than one token, which no head of these cases needs.
    """
    arrays, _ = load(case)
    window = run["window"]
    alpha, guaranteed = matching_alpha(run, window)
    config = token_config("ada-snapkv", alpha=alpha, **SNAPKV)
    scores = score(config, arrays, window, window)
    reference, kept = theirs(arrays, run, window)
    assert_close_scores(scores.first, reference)
    counts = kept.sum(dim=1)
    assert (counts >= max(1, guaranteed)).all()
    assert torch.equal(keep(scores, config, run["budget"] - window), kept)


def test_some_ada_run_depends_on_the_guarantee():
    """Guards the test above: in a few runs the guarantee decides, in others it does not."""
    decided = []
    for case in SINGLE_LAYER[:-1]:
        arrays, runs = load(case)
        ada = {(run["budget"], run["alpha"]): run for run in runs if run["press"] == "ada-snapkv"}
        for budget, alpha in ada:
            free = arrays[ada[budget, 0.0]["name"] + "/kept"]
            kept = arrays[ada[budget, alpha]["name"] + "/kept"]
            decided.append((alpha, not torch.equal(free, kept)))
    assert (0.9, True) in decided
    assert (0.2, False) in decided


@runs_of("ada-snapkv")
def test_ada_snapkv_in_blocks_fills_the_last_page_with_the_next_best(case, run):
    """With pages of 8 tokens each head is within a page of kvpress' count, along one ranking."""
    arrays, _ = load(case)
    page, window = 8, run["window"]
    base = run["budget"] - window
    if base % page:
        base -= base % page
    alpha, _ = matching_alpha(run, window)
    config = token_config("ada-snapkv", alpha=alpha, **SNAPKV)
    scores = score(config, arrays, window, window)
    # Tokens as kvpress would share them at this budget: checked above to be the same.
    by_token = keep(scores, config, base, window).sum(dim=1)
    ours = keep(scores, config, base // page, window, page)
    reference, _ = theirs(arrays, run, window)
    assert int(ours.sum()) == int(by_token.sum())
    for head, order in enumerate(rank_order(reference)):
        count = int(ours[head].sum())
        assert count % page == 0
        assert abs(count - int(by_token[head])) < page or count == page
        assert ours[head, order[:count]].all()


@runs_of("critical")
def test_criticalkv(case, run):
    """Exact: kvpress' floor of one first-stage token is always one of the window here."""
    arrays, _ = load(case)
    window, budget = run["window"], run["budget"]
    config = token_config("criticalkv", first_stage=run["first_stage"], **SNAPKV)
    scores = score(config, arrays, window, window)
    reference, kept = theirs(arrays, run, window)
    assert_close_scores(scores.first, reference)
    norms = arrays["value_norm"][:, : reference.shape[1]]
    assert_close_scores(scores.second, (reference + 1e-4) * norms)
    assert torch.equal(keep(scores, config, budget - window, window), kept)


@runs_of("critical-ada")
def test_ada_criticalkv_given_the_same_guarantee(case, run):
    """As for Ada-SnapKV; and our least guarantee, one token, takes a head's best one by the
    first score even where kvpress has no first stage: then one token per head may differ.
    """
    arrays, _ = load(case)
    window = run["window"]
    alpha, guaranteed = matching_alpha(run, window)
    options = {"alpha": alpha, "first_stage": run["first_stage"]}
    config = token_config("ada-criticalkv", **options, **SNAPKV)
    scores = score(config, arrays, window, window)
    reference, kept = theirs(arrays, run, window)
    ours = keep(scores, config, run["budget"] - window, window)
    assert torch.equal(ours.sum(dim=1), kept.sum(dim=1))
    for head in range(len(ours)):
        extra = ours[head] & ~kept[head]
        if extra.any():
            assert guaranteed == 0
            assert extra.nonzero().flatten().tolist() == [int(reference[head].argmax())]
            weighted = (reference[head] + 1e-4) * arrays["value_norm"][head, : len(extra)]
            missing = kept[head] & ~ours[head]
            assert int(missing.sum()) == 1
            assert weighted[missing] == weighted[kept[head]].min()


def test_both_stages_decide_something():
    """Guards the CriticalKV tests: the share of the first stage changes what is kept."""
    arrays, _ = load("group3")
    kept = [
        arrays[f"{name}/kept"]
        for name in (
            "snapkv_budget=33",
            "critical_budget=33_first_stage=0.0",
            "critical_budget=33_first_stage=0.9",
        )
    ]
    assert not any(torch.equal(kept[a], kept[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


EXPECTED_OPTIONS = {
    "use_covariance": "covariance",
    "use_vnorm": "value_norm",
    "n_sink": "num_sinks",
    "n_future_positions": "num_future",
    "epsilon": "epsilon",
}


@runs_of("expected")
def test_expected_attention(case, run):
    """Exact; kvpress gives the sinks the best score plus one, ours +inf."""
    arrays, _ = load(case)
    own = {ours: run[name] for name, ours in EXPECTED_OPTIONS.items() if name in run}
    config = token_config("expected-attention", **own)
    num_sinks = run.get("n_sink", 4)
    scores = score(config, arrays)
    reference, kept = theirs(arrays, run)
    assert (scores.first[:, :num_sinks] == float("inf")).all()
    # Covariances are sums of products in float32 there and float64 here.
    torch.testing.assert_close(
        scores.first[:, num_sinks:], reference[:, num_sinks:], rtol=2e-4, atol=1e-8
    )
    assert torch.equal(keep(scores, config, run["budget"]), kept)


@runs_of("ada-expected")
def test_ada_over_expected_attention(case, run):
    """Exact: without a window both guarantee the same share of the kept tokens."""
    arrays, _ = load(case)
    config = token_config("expected-attention", budgets="ada", alpha=run["alpha"])
    scores = score(config, arrays)
    _, kept = theirs(arrays, run)
    assert torch.equal(keep(scores, config, run["budget"]), kept)


@runs_of("observed")
def test_h2o_scores_are_observed_attention(case, run):
    """ObservedAttentionPress is H2O's score per query that saw the token, and no recent half."""
    arrays, _ = load(case)
    config = token_config("h2o", recent=0.0, normalize=True)
    scores = score(config, arrays)
    # Sums over the group here, means there.
    group = arrays["query"].shape[1]
    reference, kept = theirs(arrays, run)
    assert_close_scores(scores.first / group, reference)
    assert torch.equal(keep(scores, config, run["budget"]), kept)


@runs_of("tova")
def test_tova(case, run):
    """Exact if the last token alone is set aside, as kvpress does; ours keeps its window, too."""
    arrays, _ = load(case)
    config = token_config("tova")
    # Queries before the last have no say, whatever the window.
    scores = score(config, arrays, 8, 1)
    reference, kept = theirs(arrays, run, 1)
    assert_close_scores(scores.first, reference)
    assert torch.equal(keep(scores, config, run["budget"] - 1), kept)


@runs_of("keydiff", "knorm")
def test_scores_of_keys_alone(case, run):
    """Exact if nothing is set aside: kvpress has no window here, ours would keep one."""
    arrays, _ = load(case)
    config = token_config(run["press"])
    scores = score(config, arrays)
    reference, kept = theirs(arrays, run)
    torch.testing.assert_close(scores.first, reference, rtol=2e-5, atol=1e-6)
    assert torch.equal(keep(scores, config, run["budget"]), kept)


@runs_of("streaming")
def test_streamingllm(case, run):
    """Exact with and without a window, which is part of the recent tokens anyway.

    Scores are not compared: kvpress marks kept tokens by 1, ours orders by position.
    """
    arrays, _ = load(case)
    config = token_config("streamingllm", num_sinks=run["n_sink"])
    for num_tail_tokens in (0, run["window"]):
        _, kept = theirs(arrays, run, num_tail_tokens)
        scores = score(config, arrays, 1, num_tail_tokens)
        assert torch.equal(keep(scores, config, run["budget"] - num_tail_tokens), kept)


@runs_of("chunk")
def test_chunkkv(case, run):
    """The order of chunks is kvpress', for chunks that lie before the window.

    kvpress' chunks reach into the window, whose tokens have the best score, so the chunk on
    the boundary is always kept; it takes no further chunk in part, where ours cuts one. If its
    budget in chunks cannot hold the window, kvpress evicts a part of that.
    """
    arrays, _ = load(case)
    window, length = run["window"], run["chunk_length"]
    config = token_config("chunkkv", chunk_length=length)
    scores = score(config, arrays, window, window)
    num_candidates = arrays["key"].shape[1] - window
    num_whole = num_candidates // length
    whole = num_whole * length
    if not arrays[f"{run['name']}/kept"][:, num_candidates:].all():
        assert not arrays[f"{run['name']}/kept"][:, :whole].any()
        return
    reference, kept = theirs(arrays, run, window)
    per_token = reference[:, :whole].sum(dim=0) * arrays["query"].shape[1] * window
    per_chunk = per_token.view(num_whole, length).sum(dim=1)
    torch.testing.assert_close(scores.first[0, :whole:length], per_chunk, rtol=2e-5, atol=0)
    assert kept[:, whole:].all()
    assert torch.equal(kept, kept[:1].expand_as(kept))
    # The boundary chunk aside, what they keep is what we keep first.
    only_whole = LayerScores(scores.first[:, :whole])
    count = int(kept[0, :whole].sum())
    if count == 0:
        return
    assert torch.equal(keep(only_whole, config, count), kept[:, :whole])
    if count + 3 > whole:
        return
    # Three tokens more are the beginning of their next-best chunk.
    chunks = set(range(num_whole)) - set((kept[0, :whole].nonzero() // length).flatten().tolist())
    best = max(chunks, key=lambda number: per_chunk[number])
    extra = keep(only_whole, config, count + 3) & ~kept[:, :whole]
    expected = list(range(best * length, best * length + 3))
    for head in extra:
        assert head.nonzero().flatten().tolist() == expected


def test_some_chunk_runs_have_no_boundary_chunk():
    """Guards the test above: with chunks of 4 or 8 the candidates are whole chunks."""
    for case in SINGLE_LAYER[:-1]:
        arrays, runs = load(case)
        lengths = {run["chunk_length"] for run in runs if run["press"] == "chunk"}
        assert {4, 8} <= lengths
        assert (arrays["key"].shape[1] - runs[0]["window"]) % 8 == 0


@pytest.mark.parametrize("run", load("pyramid")[1], ids=lambda run: run["name"])
def test_pyramidkv_keeps_the_same_tokens_in_every_layer(run):
    """Given kvpress' number of tokens per layer, sets agree (the numbers: next tests)."""
    arrays, _ = load("pyramid")
    window, config = run["window"], token_config("snapkv", **SNAPKV)
    scorer, counts = make_scorer(config), []
    for layer in range(arrays["key"].shape[0]):
        key = arrays["key"][layer]
        scores = scorer.score(
            ScoreInputs(
                key=key,
                num_candidates=key.shape[1] - window,
                budget_tokens=1,
                scale=key.shape[2] ** -0.5,
                layer=layer,
                window_query=arrays["query"][layer],
            )
        )
        assert_close_scores(scores.first, arrays[f"{run['name']}/score"][layer][:, :-window])
        kept = arrays[f"{run['name']}/kept"][layer]
        assert kept[:, -window:].all()
        counts.append(int(kept[0].sum()) - window)
        assert torch.equal(keep(scores, config, counts[-1], window), kept[:, :-window])
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 10 * counts[-1]


@pytest.mark.parametrize(
    "setting", pyramid_budgets(), ids=lambda x: "-".join(str(x[k]) for k in list(x)[:4])
)
def test_pyramidkv_budgets_per_layer(setting):
    """The slope is kvpress', within one token of its rounding; ours sums exactly.

    Three more differences. kvpress counts the window in a layer's number, ours adds it (as the
    authors do). It clamps a first layer that exceeds the prompt, where ours shares uniformly,
    as the authors do for prompts shorter than twice the mean. And it falls back to uniform if
    the last layer would not hold the window, which with the window apart is no problem.
    """
    mean, kept, beta = setting["mean"], setting["kept"], setting["beta"]
    max_pages = setting["num_tokens"] - setting["window"]
    ours = Pyramid(beta).layer_pages(PageSupply(len(kept), 1, mean, max_pages))
    assert sum(ours) == mean * len(kept)
    if max_pages < 2 * mean:
        assert ours == [mean] * len(kept)
        assert kept[0] <= max_pages
    elif mean / beta < setting["window"]:
        assert kept == [mean] * len(kept)
        assert ours[0] > mean > ours[-1]
    else:
        assert all(abs(a - b) <= 1 for a, b in zip(ours, kept, strict=True))
        assert ours[0] > 2 * ours[-1]


def test_pyramid_budgets_cover_every_difference():
    """Guards the test above: each of its branches has a setting."""
    settings = pyramid_budgets()
    short = [x["num_tokens"] - x["window"] < 2 * x["mean"] for x in settings]
    fallback = [x["mean"] / x["beta"] < x["window"] for x in settings]
    assert short.count(True) == 2
    assert fallback.count(True) == 1


def test_projected_value_norm():
    for case in SINGLE_LAYER:
        arrays, _ = load(case)
        norms = ops.projected_value_norm(arrays["value"], arrays["output_weight"])
        assert_close_scores(norms, arrays["value_norm"])
