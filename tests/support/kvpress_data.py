"""What kvpress scored and kept (tests/data/kvpress), and our methods on the same tensors."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_selection import select

from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.base import ChunkInputs, Rotary, ScoreInputs

DATA = Path(__file__).parents[1] / "data" / "kvpress"
SINGLE_LAYER = ("group1", "group3", "group4", "group8", "yarn")


@functools.cache
def load(case):
    """One case's arrays as tensors, and its runs."""
    with np.load(DATA / f"{case}.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    runs = json.loads(str(arrays.pop("runs")))
    arrays.pop("budgets", None)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, runs


def runs_of(*presses):
    """(case, run) of every run of some presses, for parametrize."""
    found = [
        pytest.param(case, run, id=f"{case}-{run['name']}")
        for case in SINGLE_LAYER
        for run in load(case)[1]
        if run["press"] in presses
    ]
    assert len(found) >= 8
    return pytest.mark.parametrize(("case", "run"), found)


def score_inputs(arrays, window, num_tail_tokens, budget_tokens, observed=None):
    num_tokens, head_size = arrays["key"].shape[1:]
    return ScoreInputs(
        key=arrays["key"],
        num_candidates=num_tokens - num_tail_tokens,
        budget_tokens=budget_tokens,
        scale=head_size**-0.5,
        window_query=arrays["query"][:, :, num_tokens - window :],
        value=arrays["value"],
        output_weight=arrays["output_weight"],
        observed=observed,
        rotary=rotary_of(arrays),
    )


def rotary_of(arrays):
    angles = torch.arange(1024)[:, None] * arrays["inv_freq"]
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return Rotary(cos_sin * float(arrays["attention_scaling"]))


def observe_all(scorer, arrays, chunk_length=37):
    """What a scorer makes of all queries, in chunks, as the engine shows them."""
    state, num_tokens = None, arrays["key"].shape[1]
    for first in range(0, num_tokens, chunk_length):
        end = min(first + chunk_length, num_tokens)
        chunk = ChunkInputs(
            query=arrays["query"][:, :, first:end],
            key=arrays["key"][:, :end],
            first=first,
            scale=arrays["key"].shape[2] ** -0.5,
            rotary=rotary_of(arrays),
        )
        state = scorer.observe(chunk, state)
    return state


def score(config, arrays, window=1, num_tail_tokens=0, budget_tokens=1):
    scorer = make_scorer(config)
    observed = observe_all(scorer, arrays) if "all_queries" in scorer.needs else None
    return scorer.score(score_inputs(arrays, window, num_tail_tokens, budget_tokens, observed))


def keep(scores, config, mean_pages, num_tail_tokens=0, block_size=1):
    """[H, candidates] mask of the tokens that one layer keeps."""
    selection = select([scores], config, mean_pages, block_size, num_tail_tokens)
    is_token = selection.granularity == "token"
    counts = selection.num_pages.flatten() * (block_size if is_token else 1)
    num_heads, num_candidates = scores.first.shape
    mask = torch.zeros(num_heads, num_candidates // (1 if is_token else block_size)).bool()
    for head, indices in enumerate(selection.indices.split(counts.tolist())):
        mask[head, indices] = True
    return mask if is_token else mask.repeat_interleave(block_size, dim=1)


def theirs(arrays, run, num_tail_tokens=0):
    """kvpress' scores and kept mask of the candidates; the tail must be kept whole."""
    kept = arrays[f"{run['name']}/kept"]
    num_candidates = kept.shape[1] - num_tail_tokens
    assert kept[:, num_candidates:].all()
    return arrays[run["score"]][:, :num_candidates], kept[:, :num_candidates]


def rank_order(scores):
    return scores.sort(dim=1, descending=True, stable=True).indices


def assert_close_scores(ours, reference):
    assert reference.isfinite().all()
    torch.testing.assert_close(ours, reference, rtol=2e-5, atol=1e-8)


def matching_alpha(run, window):
    """Our alpha for the same guarantee as kvpress', and that guarantee in candidates.

    kvpress guarantees a share of all kept tokens, which the window fills first; ours a share
    of what is kept beside the window. kvpress' `max(1, ...)` is a token of the window.
    """
    guaranteed = max(0, int(run["budget"] * run["alpha"]) - window)
    base = run["budget"] - window
    return min(1.0, (guaranteed + 0.5) / base) if guaranteed else 0.0, guaranteed


def pyramid_budgets():
    with np.load(DATA / "pyramid.npz") as stored:
        return json.loads(str(stored["budgets"]))
