"""Compactor on a small pool: random element order, shuffled blocks, NaN everywhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compaction_prompts import (
    LAYERS,
    NUM_BLOCKS,
    SHAPE,
    WINDOW,
    assert_scores_close,
    batch_of,
    batch_scores,
    bits,
    collection_of,
    compact,
    deliver,
    deliver_chunk,
    expected_entry_scores,
    expected_scores,
    expected_selection,
    finish,
    in_one_pool,
    kept_tokens,
    make_compactor,
    make_prompt,
    on_backend,
    score,
    score_layer,
    scores_of,
    selection_of,
)

from vllm_kvcompress import ops
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import RequestGeometry, cdiv
from vllm_kvcompress.policies import RECIPES, make_scorer


@pytest.fixture(autouse=True, scope="module", params=["torch", "native"])
def backend(request):
    with on_backend(request.param):
        yield request.param


def config_of(method, **options):
    return KVCompressConfig(
        method, budget=28, window=WINDOW, options=tuple(sorted(options.items()))
    )


CONFIGS = {
    f"{method}_{granularity}": (method, {"granularity": granularity})
    for method in RECIPES
    for granularity in ("page", "token")
} | {
    "snapkv_token_narrow_pool": ("snapkv", {"granularity": "token", "pool_kernel": 3}),
    "pyramidkv_page_gentle": ("pyramidkv", {"granularity": "page", "beta": 4}),
    "ada_snapkv_page_no_pool": (
        "ada-snapkv",
        {"published": True, "granularity": "page", "pool_kernel": 1},
    ),
    "snapkv_pyramid": ("snapkv", {"budgets": "pyramid"}),
    "snapkv_ada_pyramid": ("snapkv", {"budgets": "ada-pyramid"}),
    "ada_snapkv_token_nothing_sure": ("ada-snapkv", {"granularity": "token", "alpha": 0.0}),
    "criticalkv_joint": ("criticalkv", {"budgets": "joint", "granularity": "token"}),
    "expected_attention_ada": ("expected-attention", {"budgets": "ada"}),
    "static_per_layer": ("knorm", {"budgets": "static", "table": [3, 1, 2]}),
    "static_per_head": (
        "snapkv",
        {"budgets": "static", "table": [[3, 1], [1, 2], [2, 2]], "granularity": "token"},
    ),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request):
    method, options = request.param
    return config_of(method, **options)


# Window ending in a partial block, on a block boundary, and one token past it.
@pytest.mark.parametrize("prompt_len", [70, 72, 73])
def test_region_holds_the_selected_tokens_and_nothing_else_changes(config, prompt_len):
    prompt = make_prompt(config, prompt_len)
    compactor, collected = make_compactor(config, prompt), collection_of(prompt)
    deliver(compactor, collected, prompt)
    before = prompt.pool.clone()
    selection = finish(compactor, collected, prompt)
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


@pytest.mark.parametrize("method", RECIPES)
def test_scorer_sees_the_prompts_tensors_unpermuted(method):
    config = config_of(method)
    prompt = make_prompt(config, 71)
    assert_scores_close(scores_of(config, prompt), expected_entry_scores(config, prompt))


# Chunks that end before the window, inside it, at a block's end, and of one token each.
@pytest.mark.parametrize(
    "cuts",
    [(65, 66), (68, 69), (40, 67), (3, 4, 64), (63, 69), tuple(range(1, 70))],
    ids=["one_then_rest", "cut_twice", "begins_before_it", "four", "window_in_two", "each"],
)
@pytest.mark.parametrize(
    "config",
    [
        config_of("snapkv"),
        config_of("ada-criticalkv", granularity="token"),
        config_of("span"),
        config_of("tova"),
        config_of("chunkkv"),
        config_of("knorm"),
        config_of("h2o"),
        config_of("h2o", granularity="token", recent=0.0, normalize=True),
        config_of("expected-attention"),
        config_of("expected-attention", granularity="token", num_sinks=9),
    ],
    ids=lambda config: f"{config.method}_{config.granularity}",
)
def test_queries_in_chunks_are_as_good_as_all_at_once(config, cuts):
    whole, chunked = (make_prompt(config, 70) for _ in range(2))
    assert_scores_close(scores_of(config, chunked, cuts), scores_of(config, whole))
    whole, chunked = (make_prompt(config, 70) for _ in range(2))
    expected = compact(config, whole)
    actual = compact(config, chunked, cuts)
    assert torch.equal(actual.num_pages, expected.num_pages)
    assert torch.equal(actual.indices, expected.indices)
    assert torch.equal(bits(chunked.pool), bits(whole.pool))


@pytest.mark.parametrize("method", ["snapkv", "h2o", "expected-attention", "ada-criticalkv"])
def test_tokens_after_the_compaction_point_have_no_say(method):
    config = config_of(method, suffix_tokens=9)
    prompt = make_prompt(config, 79)
    assert prompt.geometry.compact_len == 70
    # A resumed request's chunk may go on; its later tokens share the last block.
    prompt.write(70, 79)
    selection = compact(config, prompt, cuts=(30,))
    without = config_of(method)
    first_part = make_prompt(without, 79, geometry=without.geometry(SHAPE.block_size).of(70))
    expected = compact(without, first_part)
    assert torch.equal(selection.num_pages, expected.num_pages)
    assert torch.equal(selection.indices, expected.indices)


@pytest.mark.parametrize("method", ["snapkv", "ada-snapkv", "h2o", "expected-attention"])
def test_preempted_prompt_starts_again(method):
    config = config_of(method)
    prompt = make_prompt(config, 70)
    compactor, collected = make_compactor(config, prompt), collection_of(prompt)
    # Cut off after three of five window tokens, then computed again with other chunks.
    wrong = prompt.query.flip(1)
    for first, end in ((0, 40), (40, 67), (67, 68)):
        deliver_chunk(compactor, collected, prompt, first, end, wrong)
    deliver(compactor, collected, prompt, cuts=(9, 69))
    selection = finish(compactor, collected, prompt)
    assert torch.equal(selection.indices, expected_selection(config, prompt).indices)


@pytest.mark.parametrize("method", ["ada-snapkv", "h2o"])
def test_compacted_prompt_can_be_compacted_again_elsewhere(method):
    config = config_of(method)
    prompt = make_prompt(config, 70)
    compactor, collected = make_compactor(config, prompt), collection_of(prompt)
    deliver(compactor, collected, prompt)
    first = finish(compactor, collected, prompt)
    # Nothing large is held on to until then.
    assert collected.window_query is None
    assert collected.observed == [None] * SHAPE.num_layers
    assert collected.layer_scores == []
    content = prompt.pool[ops.region_page_ids(prompt.region, SHAPE.pages_per_block)]
    taken = {*prompt.blocks.tolist(), *prompt.region.tolist()}
    free = [block for block in range(NUM_BLOCKS) if block not in taken]
    prompt.region = torch.tensor(free[: len(prompt.region)])
    deliver(compactor, collected, prompt)
    second = finish(compactor, collected, prompt)
    assert torch.equal(first.indices, second.indices)
    again = prompt.pool[ops.region_page_ids(prompt.region, SHAPE.pages_per_block)]
    assert torch.equal(again, content)


@pytest.mark.parametrize("method", ["ada-pyramidkv", "kvc", "chunkkv", "expected-attention"])
def test_one_compactor_serves_interleaved_prompts(method):
    # Nothing of one request, not even its budget, may leak into the next.
    config = config_of(method)
    prompts = in_one_pool(
        [make_prompt(config, n, seed) for seed, n in enumerate((70, 118, 41, 70))]
    )
    compactor = make_compactor(config, prompts[0])
    collected = [collection_of(prompt) for prompt in prompts]
    for prompt, one in zip(prompts, collected, strict=True):
        deliver_chunk(compactor, one, prompt, 0, prompt.geometry.compact_len - 2)
    for prompt, one in zip(prompts, collected, strict=True):
        deliver_chunk(
            compactor, one, prompt, prompt.geometry.compact_len - 2, prompt.geometry.compact_len
        )
    # Three end in one step, the fourth in another that runs beside it.
    batches = [
        (batch_of(compactor, collected[part], prompts[part]), prompts[part])
        for part in (slice(3), slice(3, 4))
    ]
    for layer in range(SHAPE.num_layers):
        for batch, own in batches:
            score_layer(compactor, batch, own, layer)
    for batch, own in batches:
        for prompt, *result in zip(own, *compactor.compact(batch), strict=True):
            selection, expected = (
                selection_of(config, prompt, *result),
                expected_selection(config, prompt),
            )
            assert torch.equal(selection.num_pages, expected.num_pages)
            assert torch.equal(selection.indices, expected.indices)


@pytest.mark.parametrize("method", ["snapkv", "h2o"])
def test_scale_and_soft_cap_reach_the_scorer(method):
    config = config_of(method, **({"recent": 0.0, "normalize": True} if method == "h2o" else {}))

    def scores(scale, soft_cap):
        layers = [replace(x, scale=scale, logits_soft_cap=soft_cap) for x in LAYERS]
        prompt = make_prompt(config, 70)
        compactor, collected = make_compactor(config, prompt, layers), collection_of(prompt)
        deliver(compactor, collected, prompt)
        return batch_scores(score(compactor, collected, prompt))[1].first

    plain = scores(0.7, 0.0)
    assert plain.isfinite().all()
    # A cap far above the logits changes next to nothing; a cap far below flattens them.
    torch.testing.assert_close(scores(0.7, 1e4), plain, rtol=1e-3, atol=1e-6)
    flat = scores(1e-6, 0.0)
    torch.testing.assert_close(scores(0.7, 1e-5), flat, rtol=1e-3, atol=1e-6)
    assert (plain - flat).abs().max() > 0.1 * flat.mean()


@pytest.mark.parametrize("method", ["snapkv", "h2o", "expected-attention"])
def test_queries_are_kept_as_a_copy(method):
    config = config_of(method)
    prompt = make_prompt(config, 70)
    compactor, collected = make_compactor(config, prompt), collection_of(prompt)
    for first, end in ((0, 67), (67, 70)):
        given = prompt.query.clone()
        deliver_chunk(compactor, collected, prompt, first, end, given)
        given.fill_(float("nan"))
    selection = finish(compactor, collected, prompt)
    assert torch.equal(selection.indices, expected_selection(config, prompt).indices)


def test_missing_window_queries_are_noticed():
    config = config_of("snapkv")
    prompt = make_prompt(config, 70)
    compactor, collected = make_compactor(config, prompt), collection_of(prompt)
    deliver_chunk(compactor, collected, prompt, 0, 67)
    with pytest.raises(AssertionError, match="of layer 0 arrive at 3, expected 2"):
        deliver_chunk(compactor, collected, prompt, 68, 70)
    with pytest.raises(AssertionError):
        score(compactor, collected, prompt)


@pytest.mark.parametrize("method", ["h2o", "expected-attention"])
def test_missing_queries_are_noticed_by_scorers_that_need_all(method):
    config = config_of(method)
    prompt = make_prompt(config, 70)
    compactor, collected = make_compactor(config, prompt), collection_of(prompt)
    with pytest.raises(AssertionError, match="of layer 0 arrive at 12, expected 0"):
        deliver_chunk(compactor, collected, prompt, 12, 70)
    deliver_chunk(compactor, collected, prompt, 0, 20)
    with pytest.raises(AssertionError, match="of layer 0 arrive at 21, expected 20"):
        deliver_chunk(compactor, collected, prompt, 21, 70)
    deliver_chunk(compactor, collected, prompt, 20, 69)
    with pytest.raises(AssertionError):
        score(compactor, collected, prompt)


@pytest.mark.parametrize("layer", [1, 2])
def test_layers_scored_out_of_order_are_noticed(layer):
    config = config_of("chunkkv")
    prompt = make_prompt(config, 70)
    compactor, collected = make_compactor(config, prompt), collection_of(prompt)
    deliver(compactor, collected, prompt)
    batch = batch_of(compactor, [collected], [prompt])
    with pytest.raises(AssertionError, match=f"layer {layer} is scored after 0 others"):
        score_layer(compactor, batch, [prompt], layer)
    score_layer(compactor, batch, [prompt], 0)
    with pytest.raises(AssertionError, match="layer 0 is scored after 1 others"):
        score_layer(compactor, batch, [prompt], 0)


@pytest.mark.parametrize("method", RECIPES)
def test_only_what_the_scorer_needs_is_stored(method):
    config = config_of(method)
    prompt = make_prompt(config, 70)
    compactor, collected = make_compactor(config, prompt), collection_of(prompt)
    deliver(compactor, collected, prompt)
    needs = compactor.scoring.scorer.needs
    assert (collected.window_query is None) == ("window_query" not in needs)
    observed = ["all_queries" in needs] * SHAPE.num_layers
    assert [x is not None for x in collected.observed] == observed
    # What a layer has observed is not needed once it is scored.
    score(compactor, collected, prompt)
    assert collected.observed == [None] * SHAPE.num_layers


@pytest.mark.parametrize("need", ["output_weight", "output_root", "rotary"])
@pytest.mark.parametrize("method", RECIPES)
def test_layer_without_what_the_scorer_needs_is_refused(method, need):
    config = config_of(method)
    prompt = make_prompt(config, 70)
    layers = [*LAYERS[:-1], replace(LAYERS[-1], **{need: None})]
    if need not in make_scorer(config).needs:
        make_compactor(config, prompt, layers)
        return
    with pytest.raises(ValueError, match=f"method '{method}' needs every layer's {need}"):
        make_compactor(config, prompt, layers)


def test_two_stages_by_hand():
    config = config_of("criticalkv", published=True)
    prompt = make_prompt(config, 70)
    kept = kept_tokens(compact(config, prompt))
    scores = expected_scores(config, prompt)
    num_tail = prompt.geometry.num_tail_tokens
    for stream, tokens in enumerate(kept):
        layer, head = divmod(stream, SHAPE.num_kv_heads)
        first, second = scores[layer].first[head].tolist(), scores[layer].second[head].tolist()
        num_first = (len(tokens) + num_tail) // 2 - num_tail
        assert 0 < num_first < len(tokens)
        by_first = sorted(range(len(first)), key=lambda t, s=first: -s[t])[:num_first]
        by_second = sorted(range(len(second)), key=lambda t, s=second: -s[t])
        rest = [t for t in by_second if t not in by_first][: len(tokens) - num_first]
        assert tokens == sorted(by_first + rest)
        # Neither stage alone would keep the same.
        assert tokens != sorted(by_second[: len(tokens)])
        assert tokens != sorted(range(len(first)), key=lambda t, s=first: -s[t])[: len(tokens)]


@pytest.mark.parametrize("method", ["kvc", "layer-defensivekv", "span"])
def test_joint_budget_follows_scores_over_layers(method):
    config = config_of(method, floor=0.0, granularity="page")
    prompt = make_prompt(config, 70)
    # Layer 1 looks where it looks much more sharply, so squared or largest attention is higher.
    prompt.query[1] *= 4
    selection = compact(config, prompt)
    mean = prompt.geometry.num_region_blocks
    assert int(selection.num_pages.sum()) == mean * SHAPE.pages_per_block
    assert selection.num_pages.min() >= 1
    per_layer = selection.num_pages.sum(dim=1).tolist()
    if method == "kvc":
        assert per_layer[1] == max(per_layer) > min(per_layer)
    counts = ops.joint_top_counts(
        torch.cat(
            [
                ops.page_scores(x.first, SHAPE.block_size, config.option("page_reduce"))
                for x in expected_scores(config, prompt)
            ]
        ),
        mean * SHAPE.pages_per_block,
        1,
    )
    assert selection.num_pages.flatten().tolist() == counts.tolist()


def test_chunkkv_layers_share_the_first_ones_choice():
    alone, shared, all_shared = (
        kept_tokens(compact(config, make_prompt(config, 70)))
        for config in (config_of("chunkkv", reuse_layers=n) for n in (1, 2, 3))
    )
    heads = SHAPE.num_kv_heads
    assert all_shared == 3 * alone[:heads]
    assert shared[heads : 2 * heads] == shared[:heads] == alone[:heads]
    assert shared[2 * heads :] == alone[2 * heads :]
    assert alone[heads : 2 * heads] != alone[:heads]


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
    key = ops.unpack_pages(prompt.pool, pages, prompt.order, "key")
    value = ops.unpack_pages(prompt.pool, pages, prompt.order, "value")
    return key[:num_tokens], value[:num_tokens]


def decode_attention(prompt, selection, layer, query):
    heads = range(SHAPE.num_kv_heads)
    outs = []
    for head in heads:
        key, value = stream_tokens(prompt, selection, layer * len(heads) + head)
        logits = query[head].double() @ key.double().T * LAYERS[layer].scale
        outs.append(logits.softmax(dim=-1) @ value.double())
    return torch.stack(outs)


def plain_attention(prompt, layer, query, keep_mask=None):
    key, value = prompt.key[layer].double(), prompt.value[layer].double()
    logits = torch.einsum("hgd,hnd->hgn", query.double(), key) * LAYERS[layer].scale
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
    num_pages = config.geometry(SHAPE.block_size).of(70).first_kept_block
    everything = RequestGeometry(70, SHAPE.block_size, num_pages, num_pages, 70)
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
