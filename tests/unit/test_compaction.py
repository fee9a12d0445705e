"""Compactor on a small pool: random element order, shuffled blocks, NaN everywhere else."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from vllm_kvcompress import ops
from vllm_kvcompress.compaction import CacheShape, Compactor, PromptCompaction
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import Geometry, RequestGeometry, cdiv
from vllm_kvcompress.ops import reference
from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.base import ScoreInputs
from vllm_kvcompress.policies.selection import select

SHAPE = CacheShape(num_layers=3, num_kv_heads=2, num_queries_per_kv=3, head_size=6, block_size=4)
WINDOW = 5
SCALE = 0.7
NUM_BLOCKS = 60


def bits(tensor):
    return tensor.view(torch.int32)


@dataclass
class Prompt:
    """One prompt's tensors, in token order and in the pool."""

    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor
    pool: torch.Tensor
    order: ops.PageOrder
    blocks: torch.Tensor
    region: torch.Tensor
    geometry: RequestGeometry


def make_prompt(config, prompt_len, seed=0, geometry=None):
    generator = torch.Generator().manual_seed(seed)
    num_layers, num_heads, head_size = SHAPE.num_layers, SHAPE.num_kv_heads, SHAPE.head_size
    block_size = SHAPE.block_size
    key, value = torch.randn(2, num_layers, num_heads, prompt_len, head_size, generator=generator)
    num_query_heads = num_heads * SHAPE.num_queries_per_kv
    query = torch.randn(num_layers, WINDOW, num_query_heads, head_size, generator=generator)
    page_elements = 2 * block_size * head_size
    # The element order is the kernel's, the same for every prompt.
    permutation = torch.randperm(page_elements, generator=torch.Generator().manual_seed(77))
    order = ops.PageOrder(*permutation.view(2, block_size, head_size))
    geometry = geometry or Geometry(config, block_size).of(prompt_len)
    ids = torch.randperm(NUM_BLOCKS, generator=generator)
    num_prompt_blocks = cdiv(prompt_len, block_size)
    blocks, ids = ids[:num_prompt_blocks], ids[num_prompt_blocks:]
    # Other requests' pages, and the rest of our last block, are NaN.
    pool = torch.full((NUM_BLOCKS * SHAPE.pages_per_block, page_elements), float("nan"))
    for token in range(prompt_len):
        for layer in range(num_layers):
            for head in range(num_heads):
                page = pool[page_id(blocks[token // block_size], layer, head)]
                page[order.key_offsets[token % block_size]] = key[layer, head, token]
                page[order.value_offsets[token % block_size]] = value[layer, head, token]
    region = ids[: geometry.num_region_blocks]
    return Prompt(key, value, query, pool, order, blocks, region, geometry)


def page_id(block, layer, head):
    return (int(block) * SHAPE.num_layers + layer) * SHAPE.num_kv_heads + head


def deliver(compactor, collected, query, chunks=(WINDOW,)):
    """Hand the window's queries over, chunk by chunk, all layers in each."""
    first = 0
    for size in chunks:
        for layer in range(SHAPE.num_layers):
            compactor.save_window_queries(
                collected, layer, query[layer, first : first + size], first
            )
        first += size


def finish(compactor, collected, prompt):
    for layer in range(SHAPE.num_layers):
        assert not collected.is_scored
        compactor.score_layer(collected, layer, prompt.pool, prompt.blocks, SCALE, 0.0)
    assert collected.is_scored
    return compactor.compact(collected, prompt.pool, prompt.blocks, prompt.region)


def compact(config, prompt, chunks=(WINDOW,)):
    compactor = Compactor(config, SHAPE, prompt.order)
    collected = PromptCompaction(prompt.geometry, SHAPE.num_layers)
    deliver(compactor, collected, prompt.query, chunks)
    return finish(compactor, collected, prompt)


def expected_selection(config, prompt):
    """The selection from the plain tensors, without pool or chunks."""
    scorer = make_scorer(config)
    size = (WINDOW, SHAPE.num_kv_heads, SHAPE.num_queries_per_kv, SHAPE.head_size)
    scores = [
        scorer.score(
            ScoreInputs(
                key=prompt.key[layer],
                num_candidates=prompt.geometry.num_candidate_tokens,
                scale=SCALE,
                window_query=prompt.query[layer].view(size).permute(1, 2, 0, 3),
                logits_soft_cap=0.0,
                layer=layer,
            )
        )
        for layer in range(SHAPE.num_layers)
    ]
    geometry = prompt.geometry
    return select(torch.stack(scores), config, geometry.num_region_blocks, geometry.block_size)


def kept_tokens(selection):
    """Token positions kept by each (layer, head), in their order in the region."""
    per_page = 1 if selection.granularity == "page" else SHAPE.block_size
    counts = selection.num_pages.flatten() * per_page
    kept = []
    for indices in selection.indices.split(counts.tolist()):
        if selection.granularity == "page":
            slots = torch.arange(SHAPE.block_size)
            indices = (indices[:, None] * SHAPE.block_size + slots).flatten()
        kept.append(indices.tolist())
    return kept


CONFIGS = {
    "snapkv_page": ("snapkv", {}),
    "snapkv_token": ("snapkv", {"granularity": "token", "pool_kernel": 3}),
    "pyramidkv_page": ("pyramidkv", {"beta": 4}),
    "ada_snapkv_page": ("ada-snapkv", {"pool_kernel": 1}),
    "ada_snapkv_token": ("ada-snapkv", {"granularity": "token", "alpha": 0.0}),
    "ada_pyramidkv_token": ("ada-pyramidkv", {"granularity": "token"}),
    "streamingllm_token": ("streamingllm", {"granularity": "token"}),
    "knorm_page": ("knorm", {}),
    "random_token": ("random", {"granularity": "token", "seed": 3}),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request):
    method, options = request.param
    return KVCompressConfig(
        method, budget=28, window=WINDOW, options=tuple(sorted(options.items()))
    )


# Window ending in a partial block, on a block boundary, and one token past it.
@pytest.mark.parametrize("prompt_len", [70, 72, 73])
def test_region_holds_the_selected_tokens_and_nothing_else_changes(config, prompt_len):
    prompt = make_prompt(config, prompt_len)
    before = prompt.pool.clone()
    selection = compact(config, prompt)
    expected = expected_selection(config, prompt)
    assert torch.equal(selection.num_pages, expected.num_pages)
    assert torch.equal(selection.indices, expected.indices)
    assert selection.granularity == config.granularity

    region_pages = [
        int(block) * SHAPE.pages_per_block + slot
        for block in prompt.region
        for slot in range(SHAPE.pages_per_block)
    ]
    block_size = SHAPE.block_size
    virtual_page = 0
    for stream, tokens in enumerate(kept_tokens(selection)):
        layer, head = divmod(stream, SHAPE.num_kv_heads)
        assert int(selection.page_offsets[stream]) == virtual_page
        assert len(tokens) == int(selection.num_pages[layer, head]) * block_size
        assert tokens == sorted(set(tokens))
        assert tokens[-1] < prompt.geometry.num_candidate_tokens
        for rank, token in enumerate(tokens):
            page = prompt.pool[region_pages[virtual_page + rank // block_size]]
            slot = rank % block_size
            assert torch.equal(page[prompt.order.key_offsets[slot]], prompt.key[layer, head, token])
            assert torch.equal(
                page[prompt.order.value_offsets[slot]], prompt.value[layer, head, token]
            )
        virtual_page += len(tokens) // block_size
    assert virtual_page == len(region_pages) == int(selection.page_offsets[-1])

    untouched = torch.ones(len(before), dtype=torch.bool)
    untouched[region_pages] = False
    assert torch.equal(bits(prompt.pool[untouched]), bits(before[untouched]))


@pytest.mark.parametrize("chunks", [(1, 4), (3, 1, 1), (1,) * WINDOW], ids=str)
def test_queries_in_chunks_select_the_same(config, chunks):
    whole, chunked = (make_prompt(config, 70) for _ in range(2))
    expected = compact(config, whole)
    actual = compact(config, chunked, chunks)
    assert torch.equal(actual.num_pages, expected.num_pages)
    assert torch.equal(actual.indices, expected.indices)
    assert torch.equal(bits(chunked.pool), bits(whole.pool))


@pytest.mark.parametrize("method", ["snapkv", "ada-snapkv"])
def test_preempted_prompt_starts_its_window_again(method):
    config = KVCompressConfig(method, budget=28, window=WINDOW)
    prompt = make_prompt(config, 70)
    compactor = Compactor(config, SHAPE, prompt.order)
    collected = PromptCompaction(prompt.geometry, SHAPE.num_layers)
    # Cut off after three of five window tokens, then computed again with other chunks.
    deliver(compactor, collected, prompt.query.flip(1), chunks=(2, 1))
    deliver(compactor, collected, prompt.query, chunks=(4, 1))
    selection = finish(compactor, collected, prompt)
    assert torch.equal(selection.indices, expected_selection(config, prompt).indices)


def test_compacted_prompt_can_be_compacted_again_elsewhere():
    config = KVCompressConfig("ada-snapkv", budget=28, window=WINDOW)
    prompt = make_prompt(config, 70)
    compactor = Compactor(config, SHAPE, prompt.order)
    collected = PromptCompaction(prompt.geometry, SHAPE.num_layers)
    deliver(compactor, collected, prompt.query)
    first = finish(compactor, collected, prompt)
    assert collected.window_query is None
    assert not collected.is_scored
    content = prompt.pool[ops.region_page_ids(prompt.region, SHAPE.pages_per_block)]
    taken = {*prompt.blocks.tolist(), *prompt.region.tolist()}
    free = [block for block in range(NUM_BLOCKS) if block not in taken]
    prompt.region = torch.tensor(free[: len(prompt.region)])
    deliver(compactor, collected, prompt.query)
    second = finish(compactor, collected, prompt)
    assert torch.equal(first.indices, second.indices)
    again = prompt.pool[ops.region_page_ids(prompt.region, SHAPE.pages_per_block)]
    assert torch.equal(again, content)


def test_one_compactor_serves_interleaved_prompts():
    # Nothing of one request, not even its budget, may leak into the next.
    config = KVCompressConfig("ada-pyramidkv", budget=28, window=WINDOW)
    prompts = [make_prompt(config, n, seed) for seed, n in enumerate((70, 118, 41, 70))]
    compactor = Compactor(config, SHAPE, prompts[0].order)
    collected = [PromptCompaction(prompt.geometry, SHAPE.num_layers) for prompt in prompts]
    for first, size in ((0, 3), (3, 2)):
        for prompt, one in zip(prompts, collected, strict=True):
            for layer in range(SHAPE.num_layers):
                chunk = prompt.query[layer, first : first + size]
                compactor.save_window_queries(one, layer, chunk, first)
    for prompt, one in zip(prompts, collected, strict=True):
        selection = finish(compactor, one, prompt)
        expected = expected_selection(config, prompt)
        assert torch.equal(selection.num_pages, expected.num_pages)
        assert torch.equal(selection.indices, expected.indices)


def test_scale_and_soft_cap_reach_the_scorer():
    config = KVCompressConfig("snapkv", budget=28, window=WINDOW)
    prompt = make_prompt(config, 70)
    compactor = Compactor(config, SHAPE, prompt.order)

    def scores(scale, soft_cap):
        collected = PromptCompaction(prompt.geometry, SHAPE.num_layers)
        deliver(compactor, collected, prompt.query)
        compactor.score_layer(collected, 1, prompt.pool, prompt.blocks, scale, soft_cap)
        return collected.layer_scores[1]

    plain = scores(0.7, 0.0)
    assert plain.isfinite().all()
    # A cap far above the logits changes next to nothing; a cap far below flattens them.
    torch.testing.assert_close(scores(0.7, 1e4), plain, rtol=1e-3, atol=1e-6)
    assert scores(0.7, 0.01).std() < 0.1 * plain.std()
    assert scores(0.001, 0.0).std() < 0.1 * plain.std()


def test_queries_are_kept_as_a_copy():
    config = KVCompressConfig("snapkv", budget=28, window=WINDOW)
    prompt = make_prompt(config, 70)
    compactor = Compactor(config, SHAPE, prompt.order)
    collected = PromptCompaction(prompt.geometry, SHAPE.num_layers)
    given = prompt.query.clone()
    deliver(compactor, collected, given, chunks=(2, 3))
    given.fill_(float("nan"))
    selection = finish(compactor, collected, prompt)
    assert torch.equal(selection.indices, expected_selection(config, prompt).indices)


def test_missing_window_queries_are_noticed():
    config = KVCompressConfig("snapkv", budget=28, window=WINDOW)
    prompt = make_prompt(config, 70)
    compactor = Compactor(config, SHAPE, prompt.order)
    collected = PromptCompaction(prompt.geometry, SHAPE.num_layers)
    deliver(compactor, collected, prompt.query, chunks=(2,))
    with pytest.raises(AssertionError, match="arrive at 3, expected 2"):
        compactor.save_window_queries(collected, 0, prompt.query[0, 3:], 3)
    with pytest.raises(AssertionError):
        compactor.score_layer(collected, 0, prompt.pool, prompt.blocks, SCALE, 0.0)


@pytest.mark.parametrize("method", ["streamingllm", "knorm", "random"])
def test_scorers_without_window_queries_store_none(method):
    config = KVCompressConfig(method, budget=28, window=WINDOW)
    prompt = make_prompt(config, 70)
    collected = PromptCompaction(prompt.geometry, SHAPE.num_layers)
    deliver(Compactor(config, SHAPE, prompt.order), collected, prompt.query)
    assert collected.window_query is None


def stream_tokens(prompt, selection, stream):
    """K and V that a decode step reads for one (layer, head), through its page table."""
    geometry, block_size = prompt.geometry, SHAPE.block_size
    tail = prompt.blocks[geometry.first_kept_block :]
    width = int(selection.num_pages.max()) + len(tail)
    ids = ops.region_page_ids(prompt.region, SHAPE.pages_per_block)
    table = ops.ragged_page_table(ids, selection.page_offsets, tail, width)
    num_region_pages = int(selection.num_pages.flatten()[stream])
    num_tokens = num_region_pages * block_size + geometry.num_dense_prompt_tokens
    pages = table[stream, : cdiv(num_tokens, block_size)].long()
    key = ops.unpack_pages(prompt.pool, pages, prompt.order.key_offsets)
    value = ops.unpack_pages(prompt.pool, pages, prompt.order.value_offsets)
    return key[:num_tokens], value[:num_tokens]


def decode_attention(prompt, selection, layer, query):
    heads = range(SHAPE.num_kv_heads)
    read = [stream_tokens(prompt, selection, layer * len(heads) + head) for head in heads]
    keys, values = zip(*read, strict=True)
    return reference.ragged_attention(query, list(keys), list(values), SCALE)


def plain_attention(prompt, layer, query, keep_mask=None):
    key, value = prompt.key[layer].double(), prompt.value[layer].double()
    logits = torch.einsum("hgd,hnd->hgn", query.double(), key) * SCALE
    if keep_mask is not None:
        logits = logits.masked_fill(~keep_mask[:, None], float("-inf"))
    return torch.einsum("hgn,hnd->hgd", logits.softmax(dim=-1), value)


def decode_query(seed=9):
    generator = torch.Generator().manual_seed(seed)
    size = (SHAPE.num_kv_heads, SHAPE.num_queries_per_kv, SHAPE.head_size)
    return torch.randn(size, generator=generator)


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("method", ["snapkv", "ada-snapkv", "pyramidkv"])
def test_attention_over_everything_kept_is_full_attention(method, granularity):
    config = KVCompressConfig(
        method, budget=28, window=WINDOW, options=(("granularity", granularity),)
    )
    num_pages = Geometry(config, SHAPE.block_size).of(70).first_kept_block
    everything = RequestGeometry(70, SHAPE.block_size, num_pages, num_pages)
    prompt = make_prompt(config, 70, geometry=everything)
    selection = compact(config, prompt)
    assert (selection.num_pages == num_pages).all()
    query = decode_query()
    for layer in range(SHAPE.num_layers):
        actual = decode_attention(prompt, selection, layer, query)
        torch.testing.assert_close(actual, plain_attention(prompt, layer, query))


def test_attention_over_ragged_heads_is_attention_over_the_kept_tokens(config):
    prompt = make_prompt(config, 70)
    selection = compact(config, prompt)
    kept = kept_tokens(selection)
    query = decode_query()
    for layer in range(SHAPE.num_layers):
        keep_mask = torch.zeros(SHAPE.num_kv_heads, 70, dtype=torch.bool)
        keep_mask[:, prompt.geometry.num_candidate_tokens :] = True
        for head in range(SHAPE.num_kv_heads):
            keep_mask[head, kept[layer * SHAPE.num_kv_heads + head]] = True
        actual = decode_attention(prompt, selection, layer, query)
        torch.testing.assert_close(actual, plain_attention(prompt, layer, query, keep_mask))
        full = plain_attention(prompt, layer, query)
        assert (actual - full).abs().max() > 1e-3


def test_ada_gives_heads_different_lengths_here():
    # Without this the ragged tests above would not be about ragged heads.
    config = KVCompressConfig("ada-snapkv", budget=28, window=WINDOW)
    selection = compact(config, make_prompt(config, 70))
    assert len(set(selection.num_pages.flatten().tolist())) > 1
