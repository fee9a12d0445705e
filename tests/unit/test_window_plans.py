"""A scorer's plan for ops that read pages gives what its `score` does."""

from __future__ import annotations

import pytest
import torch
from layer_inputs import random_inputs

from vllm_kvcompress import ops
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.recipes import RECIPES

BLOCK_SIZE, HEAD_SIZE, NUM_TOKENS, WINDOW = 16, 64, 101, 7

PLANNED = [
    ("snapkv", {}),
    ("snapkv", {"pool_kind": "avg", "pool_kernel": 5, "window_reduce": "max"}),
    ("snapkv", {"pool_first": False, "group_reduce": "sum", "window_reduce": "sum"}),
    ("kvc", {}),
    ("ada-pyramidkv", {"published": True}),
    ("span", {}),
    ("span", {"value_norm": False, "span_kernel": 1, "near_tokens": 3}),
    ("defensivekv", {"value_norm": False, "pool_kernel": 7}),
]


def scorer_of(method, options):
    options = tuple(options.items())
    return make_scorer(KVCompressConfig(method, budget=64, window=WINDOW, options=options))


def in_pages(key, value):
    """A pool of one layer that holds the tokens, and its row descriptor and block table."""
    num_heads, num_tokens, head_size = key.shape
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    entries = torch.full((num_heads, num_blocks * BLOCK_SIZE, 2 * head_size), torch.nan)
    entries[:, :num_tokens] = torch.cat([key, value], dim=-1)
    pages = entries.unflatten(1, (num_blocks, BLOCK_SIZE)).transpose(0, 1).flatten(0, 1)
    rows = torch.tensor([ops.RowDescriptor(num_tokens)], dtype=torch.int32)
    return pages.contiguous(), rows, torch.arange(num_blocks, dtype=torch.int32)[None]


@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize(("method", "options"), PLANNED, ids=str)
def test_plan_and_score_agree(method, options, with_sinks):
    scorer = scorer_of(method, options)
    plan = scorer.window_plan()
    # The last candidates of a scorer that rates the window lie in it.
    num_candidates = 96 if plan.rates_window else 80
    sinks = torch.linspace(-3.0, 9.0, 6).view(2, 3) if with_sinks else None
    inputs, _ = random_inputs(
        num_tokens=NUM_TOKENS,
        window=WINDOW,
        head_size=HEAD_SIZE,
        num_candidates=num_candidates,
        sinks=sinks,
    )
    num_heads, group = inputs.window_query.shape[:2]
    pool, rows, table = in_pages(inputs.key, inputs.value)
    num_rated = plan.num_rated(NUM_TOKENS, num_candidates, WINDOW)
    assert num_rated == (96 if plan.rates_window else NUM_TOKENS - WINDOW)
    rated, candidates = (torch.tensor([n], dtype=torch.int32) for n in (num_rated, num_candidates))
    prompts = ops.Prompts(ops.Rows(rows, table), rated, candidates, num_rated, num_candidates)
    query = inputs.window_query.permute(2, 0, 1, 3).reshape(1, WINDOW, num_heads * group, HEAD_SIZE)
    found = ops.planned_scores(
        plan,
        query,
        ops.Pool(pool, 1, num_heads),
        prompts,
        0,
        ops.Logits(inputs.scale, sinks=None if sinks is None else sinks.flatten()),
        output_root=inputs.output_root,
        page_reduce=None,
        backend="reference",
    )
    expected = scorer.score(inputs)
    assert expected.second is None
    torch.testing.assert_close(found[0], expected.first, rtol=2e-5, atol=1e-8)


def test_methods_without_a_plan():
    planless = {name for name in RECIPES if scorer_of(name, {}).window_plan() is None}
    assert planless == {
        "chunkkv",
        "criticalkv",
        "ada-criticalkv",
        "defensivekv",
        "expected-attention",
        "h2o",
        "keydiff",
        "knorm",
        "layer-defensivekv",
        "random",
        "span-keydiff",
        "streamingllm",
        "tova",
    }
    assert scorer_of("defensivekv", {"value_norm": False, "mass_first": 0.5}).window_plan() is None
