"""Prompts that never had blocks: what is kept must be bit for bit what blocks would have given."""

from __future__ import annotations

import pytest
import torch
from compaction_prompts import (
    NO_BLOCK,
    SHAPE,
    bits,
    collection_of,
    compact,
    make_compactor,
    make_prompt,
    on_backend,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress import ops
from vllm_kvcompress.candidates import LayerPages
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import cdiv
from vllm_kvcompress.policies import RECIPES, make_budgets
from vllm_kvcompress.policies.base import LayerScores
from vllm_kvcompress.policies.selection import entries_per_page, entry_scores, select

BUDGETS = {
    "uniform": {},
    "pyramid": {"beta": 5},
    "ada": {"alpha": 0.2},
    "ada-pyramid": {},
    "joint": {"floor": 0.1},
    "static": {"table": [1, 3, 2]},
    "static per head": {"table": [[1, 2], [3, 4], [2, 1]]},
}
CASES = [
    *(({"method": method}) for method in RECIPES),
    *(
        {"method": "snapkv", "budgets": name.split()[0], **options}
        for name, options in BUDGETS.items()
    ),
    {"method": "criticalkv", "budgets": "joint", "first_stage": 0.3},
    {"method": "span", "page_reduce": "max", "floor": 0.0},
    {"method": "snapkv", "suffix_tokens": 9},
]


@pytest.fixture(autouse=True, scope="module", params=["torch", "native"])
def backend(request):
    with on_backend(request.param):
        yield request.param


def config_of(case, granularity="page", budget=28):
    raw = {"granularity": granularity, "budget": budget, "window": 5, **case}
    return KVCompressConfig.from_dict(raw)


def compact_in_one_shot(config, prompt, on_layer=lambda collected: None):
    """As a step does it: one layer's pages at a time, in a scratch that the next overwrites."""
    compactor, collected = make_compactor(config, prompt), collection_of(prompt)
    block_size, num_heads = SHAPE.block_size, SHAPE.num_kv_heads
    end = prompt.geometry.compact_len
    blocks = torch.randperm(cdiv(end, block_size) + 3, generator=torch.Generator().manual_seed(1))
    scratch = torch.empty(len(blocks) * num_heads, prompt.pool.shape[1])
    tokens = torch.arange(end)
    for layer in range(SHAPE.num_layers):
        scratch.fill_(float("nan"))
        pages = LayerPages(scratch, blocks[: cdiv(end, block_size)], num_heads, 0)
        for head in range(num_heads):
            ids = (blocks[tokens // block_size] * num_heads + head)[:, None]
            slots = tokens % block_size
            scratch[ids, prompt.order.key_offsets[slots]] = prompt.key[layer, head, :end]
            scratch[ids, prompt.order.value_offsets[slots]] = prompt.value[layer, head, :end]
        compactor.collect(collected, layer, prompt.query[layer, :end], 0, pages)
        compactor.score_layer(collected, layer, pages)
        compactor.hold(collected, pages)
        on_layer(collected)
    nowhere = torch.full((cdiv(end, block_size),), NO_BLOCK)
    return compactor.compact(collected, prompt.pool, nowhere, prompt.region)


@pytest.mark.parametrize("prompt_len", [61, 150])
@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_region_is_the_one_that_blocks_would_have_given(case, granularity, prompt_len):
    config = config_of(case, granularity)
    usual, prompt = make_prompt(config, prompt_len), make_prompt(config, prompt_len)
    expected = compact(config, usual)
    selection = compact_in_one_shot(config, prompt)
    assert torch.equal(selection.num_pages, expected.num_pages)
    assert torch.equal(selection.indices, expected.indices)
    region = ops.region_page_ids(prompt.region, SHAPE.pages_per_block)
    assert not prompt.pool[region].isnan().any()
    assert torch.equal(bits(prompt.pool[region]), bits(usual.pool[region]))
    # And nothing else was written.
    prompt.pool[region] = float("nan")
    assert prompt.pool.isnan().all()


@pytest.mark.parametrize("granularity", ["page", "token"])
def test_what_cannot_be_kept_is_let_go(granularity):
    config = config_of({"method": "span"}, granularity)
    prompt = make_prompt(config, 200)
    per_page = entries_per_page(config, SHAPE.block_size)
    geometry = prompt.geometry
    kept = geometry.num_region_blocks * SHAPE.pages_per_block * per_page
    held = []
    compact_in_one_shot(config, prompt, lambda c: held.append(c.candidates.num_held))
    # After a layer: one and a half times what is kept, or what is kept and a page per head.
    rounding = SHAPE.pages_per_block * (per_page if per_page > 1 else 0)
    assert max(held) <= max(1.5 * kept, kept + rounding)
    layer_size = geometry.first_kept_block * per_page * SHAPE.num_kv_heads
    assert max(held) < 1.5 * layer_size


def test_a_lost_candidate_is_noticed():
    config = config_of({"method": "snapkv", "budgets": "joint"})
    prompt = make_prompt(config, 61)

    def lose(collected):
        candidates = collected.candidates
        candidates._narrow(0, candidates._keys[0][:1])

    with pytest.raises(RuntimeError, match="a candidate was dropped"):
        compact_in_one_shot(config, prompt, lose)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_head_ends_up_with_more_than_its_bound(data):
    granularity = data.draw(st.sampled_from(["page", "token"]))
    num_layers, num_heads = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    block_size, num_pages = 4, data.draw(st.integers(2, 6))
    mean_pages = data.draw(st.integers(1, num_pages - 1))
    floor = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    config = config_of(
        {"method": "snapkv", "budgets": "joint", "floor": floor}, granularity, budget=1000
    )
    # Few values, so that many are equal.
    values = st.lists(
        st.integers(0, 3), min_size=num_pages * block_size, max_size=num_pages * block_size
    )
    scores = [
        LayerScores(
            torch.tensor([data.draw(values) for _ in range(num_heads)], dtype=torch.float32)
        )
        for _ in range(num_layers)
    ]
    selection = select(scores, config, mean_pages, block_size)
    per_page = entries_per_page(config, block_size)
    for num_known in range(1, num_layers + 1):
        known = torch.stack(
            [entry_scores(layer, config, block_size).first for layer in scores[:num_known]]
        )
        bounds = make_budgets(config).most_entries(known, num_layers, mean_pages, per_page)
        assert (bounds >= selection.num_pages[:num_known] * per_page).all()


def spoil(prompt, what):
    """Put in what is no number, here and there."""
    rows = slice(None, None, 3)
    if what == "some keys":
        prompt.key[:, :, rows, 0] = float("nan")
    elif what == "a layer":
        prompt.key[1], prompt.value[1], prompt.query[1] = float("nan"), float("nan"), float("nan")
    elif what == "a head's values":
        prompt.value[:, 1] = float("nan")
    elif what == "endless keys":
        prompt.key[:, :, rows, 0], prompt.key[:, :, 1::5, 1] = float("inf"), -float("inf")
    elif what == "huge":
        for tensor in (prompt.key, prompt.value, prompt.query):
            tensor *= 1e30
    else:
        for tensor in (prompt.key, prompt.value, prompt.query):
            tensor.fill_(float("nan"))
    return prompt


@pytest.mark.parametrize(
    "what", ["some keys", "a layer", "a head's values", "endless keys", "huge", "everything"]
)
@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_region_is_filled_all_the_same(case, granularity, what):
    config = config_of(case, granularity)
    selections = []
    for in_one_shot in (False, True):
        prompt = spoil(make_prompt(config, 150), what)
        selections.append((compact_in_one_shot if in_one_shot else compact)(config, prompt))
        selection, geometry = selections[-1], prompt.geometry
        assert int(selection.num_pages.min()) >= 1
        num_pages = geometry.num_region_blocks * SHAPE.pages_per_block
        assert int(selection.num_pages.sum()) == num_pages
        assert int(selection.indices.min()) >= 0
        per_page = SHAPE.block_size if granularity == "token" else 1
        assert int(selection.indices.max()) < geometry.first_kept_block * per_page
    usual, one_shot = selections
    assert torch.equal(usual.num_pages, one_shot.num_pages)
    assert torch.equal(usual.indices, one_shot.indices)
