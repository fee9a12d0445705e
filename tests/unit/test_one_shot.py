"""Prompts that never had blocks: what is kept must be bit for bit what blocks would have given."""

from __future__ import annotations

import pytest
import torch
from cache_shapes import cache_shape
from compaction_prompts import (
    NO_BLOCK,
    SHAPE,
    bits,
    block_row,
    collection_of,
    compact,
    deliver,
    make_compactor,
    make_prompt,
    on_backend,
    score,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.staging import Staging, flat_places
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import cdiv
from vllm_kvcompress.policies import RECIPES, make_budgets
from vllm_kvcompress.policies.budgets.base import PageSupply
from vllm_kvcompress.policies.entries import entries_per_page

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


def compact_in_one_shot(config, prompt, buffer=None):
    """As a step does it: each layer's pages lie in the buffer, and nowhere else."""
    compactor, collected = make_compactor(config, prompt), collection_of(prompt)
    if buffer is not None:
        compactor.use_buffer(buffer)
    end = prompt.geometry.compact_len
    row = block_row(prompt)
    # Whoever looks for what is evicted fails.
    row[: prompt.geometry.first_kept_block] = NO_BLOCK
    batch = compactor.batch([collected], row[None], is_one_shot=True)
    num_heads = SHAPE.num_kv_heads
    for layer in range(SHAPE.num_layers):
        area = compactor.begin_layer(batch, layer)
        slots = batch.staging.slots(slice(1))
        assert len(slots) == end
        blocks, slots = slots // SHAPE.block_size, slots % SHAPE.block_size
        pages = area.flatten(2)
        for head in range(num_heads):
            where = (blocks[:, None], head)
            pages[(*where, prompt.order.key_offsets[slots])] = prompt.key[layer, head, :end]
            pages[(*where, prompt.order.value_offsets[slots])] = prompt.value[layer, head, :end]
        own = batch.staging.pages(0)
        compactor.scoring.collect(collected, layer, prompt.query[layer, :end], 0, own)
        compactor.score_layer(batch, layer, [None], [own])
    return tuple(result[0] for result in compactor.compact(batch))


def region_of(prompt):
    return prompt.pool[ops.region_page_ids(prompt.region, SHAPE.pages_per_block)]


@pytest.mark.parametrize("prompt_len", [61, 150])
@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_region_is_the_one_that_blocks_would_have_given(case, granularity, prompt_len):
    config = config_of(case, granularity)
    usual, prompt = make_prompt(config, prompt_len), make_prompt(config, prompt_len)
    expected = compact(config, usual)
    num_pages, page_offsets = compact_in_one_shot(config, prompt)
    assert torch.equal(num_pages, expected.num_pages.flatten().int())
    assert torch.equal(page_offsets, expected.page_offsets.int())
    assert not region_of(prompt).isnan().any()
    assert torch.equal(bits(region_of(prompt)), bits(region_of(usual)))
    # And nothing else was written.
    prompt.pool[ops.region_page_ids(prompt.region, SHAPE.pages_per_block)] = float("nan")
    assert prompt.pool.isnan().all()


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("method", ["span", "span-keydiff", "ada-snapkv"])
def test_a_buffer_of_fixed_size_gives_the_same(method, granularity):
    config = config_of({"method": method, "budgets": "joint"}, granularity, budget=20)
    usual, prompt = make_prompt(config, 150), make_prompt(config, 150)
    assert config.one_shot.fits_counted_buffer(prompt.geometry)
    # The smallest there can be: what cannot win is dropped after every layer.
    num_blocks = cdiv(150, SHAPE.block_size)
    held = config.one_shot.most_held_pages(SHAPE, prompt.geometry.num_region_blocks)
    num_pages = num_blocks * SHAPE.num_kv_heads + 2 * held
    assert num_pages < num_blocks * SHAPE.pages_per_block
    assert num_pages <= config.one_shot.counted_buffer_pages(SHAPE, 160, 1)
    compact(config, usual)
    buffer = torch.zeros(num_pages, SHAPE.block_size, 2 * SHAPE.head_size)
    compact_in_one_shot(config, prompt, buffer)
    assert torch.equal(bits(region_of(prompt)), bits(region_of(usual)))


def test_a_buffer_made_for_a_step_is_smaller_than_its_prompts():
    config = config_of({"method": "span"})
    geometry = make_prompt(config, 200).geometry
    dense = SHAPE.pages_per_block * cdiv(200, SHAPE.block_size)
    assert config.one_shot.buffer_pages(SHAPE, [geometry]) < 0.75 * dense


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_nothing_that_wins_is_dropped(data):
    """With the smallest buffer, whatever the scores: few values, so that many are equal."""
    num_layers, num_heads = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3))
    granularity, block_size = data.draw(st.sampled_from(["page", "token"])), 4
    shape = cache_shape(num_layers, num_heads, 1, 2, block_size)
    floor = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    raw = {"method": "snapkv", "budgets": "joint", "floor": floor}
    num_pages = data.draw(st.integers(3, 6))
    config = config_of(raw, granularity, budget=8 + block_size * data.draw(st.integers(1, 2)))
    geometry = config.geometry(block_size).of(num_pages * block_size + 5)
    assume(geometry.is_compressed)
    per_page = entries_per_page(config, block_size)
    num_entries = geometry.first_kept_block * per_page
    values = st.lists(st.integers(0, 3), min_size=num_entries, max_size=num_entries)
    num_streams = shape.pages_per_block
    scores = torch.tensor([data.draw(values) for _ in range(num_streams)]).float()[None]
    mean = geometry.num_region_blocks
    plan = make_budgets(config).plan(
        PageSupply(num_layers, num_heads, mean, geometry.first_kept_block, per_page)
    )
    held = config.one_shot.most_held_pages(shape, mean)
    area = cdiv(geometry.compact_len, block_size) * num_heads
    buffer = torch.zeros(area + 2 * held, block_size, 4)
    pool = torch.zeros((mean + 20) * num_streams, block_size, 4)
    table = torch.arange(geometry.num_row_blocks(geometry.compact_len)).int()[None]
    staging = Staging(
        config,
        shape,
        buffer,
        pool,
        None,
        [geometry],
        table,
        [int(plan.guaranteed)],
        "torch",
        "torch",
    )
    entries = torch.tensor([num_entries], dtype=torch.int32)
    for layer in range(num_layers):
        staging.begin_layer(layer, scores, None, entries)
    counts = ops.joint_page_counts(
        scores,
        entries,
        plan.total_pages[None].int(),
        plan.guaranteed[None].int(),
        per_page,
        backend="torch",
    )
    offsets, indices = ops.select_entries(
        scores, entries, counts, int(plan.total_pages), per_page, backend="torch"
    )
    places = flat_places(offsets, indices, num_entries, per_page)
    assert (staging._where.gather(1, places) >= 0).all()


def test_a_lost_entry_is_noticed(monkeypatch):
    config = config_of({"method": "snapkv", "budgets": "joint"})
    begin = Staging.begin_layer

    def lose(self, layer, *scores):
        area = begin(self, layer, *scores)
        if layer:
            self._where[:, :1] = -1
        return area

    monkeypatch.setattr(Staging, "begin_layer", lose)
    prompt = make_prompt(config, 61)
    # Its first page is the best of all.
    prompt.key[0, 0, :4] = prompt.query[0, -1, 0] * 9
    with pytest.raises(RuntimeError, match="an entry was dropped"):
        compact_in_one_shot(config, prompt)


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
    regions, counts = [], []
    for in_one_shot in (False, True):
        prompt = spoil(make_prompt(config, 150), what)
        if in_one_shot:
            num_pages, _ = compact_in_one_shot(config, prompt)
        else:
            compactor, collected = make_compactor(config, prompt), collection_of(prompt)
            deliver(compactor, collected, prompt)
            num_pages = compactor.compact(score(compactor, collected, prompt))[0][0]
        assert int(num_pages.min()) >= 1
        assert int(num_pages.sum()) == len(prompt.region) * SHAPE.pages_per_block
        counts.append(num_pages)
        regions.append(region_of(prompt))
    assert torch.equal(counts[0], counts[1])
    assert torch.equal(bits(regions[0]), bits(regions[1]))
