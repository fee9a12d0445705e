"""Prompts in a small pool, as the compaction tests see them: random element order, shuffled
blocks, NaN everywhere else.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from cache_shapes import cache_shape
from compiled_ops import need_compiled_ops
from plain_selection import Selection, select

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.compactor import Compactor
from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.compaction.prompts import LayerPages, PromptCompaction
from vllm_kvcompress.compaction.scoring import Backends
from vllm_kvcompress.memory import RequestGeometry, cdiv
from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.base import ChunkInputs, LayerScores, Rotary, ScoreInputs
from vllm_kvcompress.policies.entries import entry_scores

SHAPE = cache_shape(num_layers=3, num_kv_heads=2, num_queries_per_kv=3, head_size=6, block_size=4)
WINDOW = 5
NUM_BLOCKS = 60
HIDDEN_SIZE = 7
# A block id of no pool: whoever reads through it fails.
NO_BLOCK = 10**9


def bits(tensor):
    return tensor.view(torch.int32)


def make_layers():
    """Parameters that no two layers, heads or query heads share."""
    generator = torch.Generator().manual_seed(5)
    heads = (SHAPE.num_kv_heads, SHAPE.num_queries_per_kv)
    layers = []
    for layer in range(SHAPE.num_layers):
        weight = torch.randn(*heads, SHAPE.head_size, HIDDEN_SIZE, generator=generator)
        weight *= torch.rand(*heads, 1, 1, generator=generator) * 4
        angles = torch.arange(600)[:, None] * torch.rand(2, generator=generator)
        rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=-1), is_neox_style=True)
        layers.append(
            LayerParameters(
                scale=0.5 + 0.2 * layer,
                output_weight=weight,
                output_root=ops.output_root(weight),
                rotary=rotary,
            )
        )
    return layers


LAYERS = make_layers()


@dataclass
class Prompt:
    """One prompt's tensors in token order, and the pool that `write` puts them into."""

    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor
    pool: torch.Tensor
    order: ops.PageOrder
    blocks: torch.Tensor
    region: torch.Tensor
    geometry: RequestGeometry

    def write(self, first, end):
        """Store K and V of some tokens, as a step does before its queries are collected."""
        tokens = torch.arange(first, end)
        blocks, slots = self.blocks[tokens // SHAPE.block_size], tokens % SHAPE.block_size
        for layer in range(SHAPE.num_layers):
            for head in range(SHAPE.num_kv_heads):
                pages = (blocks * SHAPE.num_layers + layer) * SHAPE.num_kv_heads + head
                where = (pages[:, None], self.order.key_offsets[slots])
                self.pool[where] = self.key[layer, head, first:end]
                where = (pages[:, None], self.order.value_offsets[slots])
                self.pool[where] = self.value[layer, head, first:end]

    def query_heads(self, layer, first, end):
        """[H, g, m, d] queries of some tokens."""
        size = (-1, SHAPE.num_kv_heads, SHAPE.num_queries_per_kv, SHAPE.head_size)
        return self.query[layer, first:end].view(size).permute(1, 2, 0, 3)


def make_prompt(config, prompt_len, seed=0, geometry=None):
    generator = torch.Generator().manual_seed(seed)
    num_layers, num_heads, head_size = SHAPE.num_layers, SHAPE.num_kv_heads, SHAPE.head_size
    block_size = SHAPE.block_size
    key, value = torch.randn(2, num_layers, num_heads, prompt_len, head_size, generator=generator)
    # Values of very different sizes, so that weighing by them moves many tokens.
    value *= torch.rand(num_layers, num_heads, prompt_len, 1, generator=generator) * 4
    num_query_heads = num_heads * SHAPE.num_queries_per_kv
    query = torch.randn(num_layers, prompt_len, num_query_heads, head_size, generator=generator)
    page_elements = 2 * block_size * head_size
    # The element order is the kernel's, the same for every prompt.
    permutation = torch.randperm(page_elements, generator=torch.Generator().manual_seed(77))
    order = ops.PageOrder(*permutation.view(2, block_size, head_size))
    geometry = geometry or config.geometry(block_size).of(prompt_len)
    ids = torch.randperm(NUM_BLOCKS, generator=generator)
    num_prompt_blocks = cdiv(prompt_len, block_size)
    blocks, ids = ids[:num_prompt_blocks], ids[num_prompt_blocks:]
    # Other requests' pages, and the rest of our last block, stay NaN.
    pool = torch.full((NUM_BLOCKS * SHAPE.pages_per_block, page_elements), float("nan"))
    region = ids[: geometry.num_region_blocks]
    return Prompt(key, value, query, pool, order, blocks, region, geometry)


def in_one_pool(prompts):
    """The same prompts, one after another in one pool."""
    pool = torch.cat([prompt.pool for prompt in prompts])
    for i, prompt in enumerate(prompts):
        prompt.pool = pool
        prompt.blocks, prompt.region = (
            prompt.blocks + i * NUM_BLOCKS,
            prompt.region + i * NUM_BLOCKS,
        )
    return prompts


# Of every compactor that is made here; see `on_backend`.
_BACKEND = "torch"


@contextmanager
def on_backend(backend):
    """Compactors made here use these ops."""
    global _BACKEND
    if backend == "native":
        need_compiled_ops()
    before, _BACKEND = _BACKEND, backend
    yield backend
    _BACKEND = before


def make_compactor(config, prompt, layers=LAYERS):
    pool = prompt.pool.view(-1, SHAPE.block_size, 2 * SHAPE.head_size)
    backends = Backends.all(_BACKEND)
    return Compactor(config, SHAPE, pool, prompt.order, layers, backends)


def collection_of(prompt):
    return PromptCompaction(prompt.geometry, SHAPE.num_layers)


def deliver_chunk(compactor, collected, prompt, first, end, query=None):
    """One step: its K and V are stored, then each layer's queries are collected."""
    prompt.write(first, end)
    blocks = compaction_blocks(prompt).clone()
    blocks[cdiv(end, SHAPE.block_size) :] = NO_BLOCK
    query = prompt.query if query is None else query
    for layer in range(SHAPE.num_layers):
        pages = LayerPages.of_pool(prompt.pool, SHAPE, layer, blocks)
        compactor.scoring.collect(collected, layer, query[layer, first:end], first, pages)


def deliver(compactor, collected, prompt, cuts=()):
    """All tokens up to the compaction point, in chunks that end at `cuts` and there."""
    first = 0
    for end in (*cuts, prompt.geometry.compact_len):
        deliver_chunk(compactor, collected, prompt, first, end)
        first = end


def compaction_blocks(prompt):
    return prompt.blocks[: cdiv(prompt.geometry.compact_len, SHAPE.block_size)]


def compaction_pages(prompt, layer):
    return LayerPages.of_pool(prompt.pool, SHAPE, layer, compaction_blocks(prompt))


def block_row(prompt):
    """The prompt's block-table row, its region among its blocks."""
    boundary = prompt.geometry.boundary_block
    parts = (prompt.blocks[:boundary], prompt.region, prompt.blocks[boundary:])
    return torch.cat(parts).int()


def batch_of(compactor, collected, prompts):
    """Prompts in one pool, ready to be scored."""
    rows = [block_row(prompt) for prompt in prompts]
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-7)
    return compactor.batch(collected, table)


def score_layer(compactor, batch, prompts, layer):
    pages = [compaction_pages(prompt, layer) for prompt in prompts]
    compactor.score_layer(batch, layer, [None] * len(prompts), pages)


def score(compactor, collected, prompt):
    """A batch of one prompt, all its layers scored."""
    batch = batch_of(compactor, [collected], [prompt])
    for layer in range(SHAPE.num_layers):
        score_layer(compactor, batch, [prompt], layer)
    return batch


def finish(compactor, collected, prompt):
    batch = score(compactor, collected, prompt)
    num_pages, page_offsets = compactor.compact(batch)
    return selection_of(compactor.config, prompt, num_pages[0], page_offsets[0])


def selection_of(config, prompt, num_pages, page_offsets):
    """What a region holds, found by its keys, which no two tokens of a head share."""
    assert torch.equal(page_offsets.diff(), num_pages) and int(page_offsets[0]) == 0
    ids = ops.region_page_ids(prompt.region, SHAPE.pages_per_block)
    assert int(page_offsets[-1]) == len(ids)
    keys = ops.unpack_pages(prompt.pool, ids[:, None], prompt.order, "key")
    indices = []
    for stream, pages in enumerate(keys.split(num_pages.tolist())):
        layer, head = divmod(stream, SHAPE.num_kv_heads)
        is_same = (pages.flatten(0, 1)[:, None] == prompt.key[layer, head]).all(dim=-1)
        assert (is_same.sum(dim=1) == 1).all(), "a place in the region holds no token's key"
        tokens = is_same.int().argmax(dim=1)
        if config.granularity == "page":
            first = tokens[:: SHAPE.block_size]
            slots = torch.arange(SHAPE.block_size)
            assert torch.equal(tokens, (first[:, None] + slots).flatten())
            tokens = first // SHAPE.block_size
        indices.append(tokens)
    shape = (SHAPE.num_layers, SHAPE.num_kv_heads)
    return Selection(num_pages.view(shape).long(), torch.cat(indices), config.granularity)


def compact(config, prompt, cuts=()):
    compactor = make_compactor(config, prompt)
    collected = collection_of(prompt)
    deliver(compactor, collected, prompt, cuts)
    return finish(compactor, collected, prompt)


def scores_of(config, prompt, cuts=()):
    """Per layer the scores of its entries."""
    compactor = make_compactor(config, prompt)
    collected = collection_of(prompt)
    deliver(compactor, collected, prompt, cuts)
    return batch_scores(score(compactor, collected, prompt))


def batch_scores(batch):
    """Per layer the scores of a batch's only prompt."""
    num_entries = int(batch.num_entries[0])
    parts = [
        None if kind is None else kind[0, :, :num_entries].unflatten(0, (SHAPE.num_layers, -1))
        for kind in (batch.first, batch.second)
    ]
    return [
        LayerScores(parts[0][layer], None if parts[1] is None else parts[1][layer])
        for layer in range(SHAPE.num_layers)
    ]


def expected_scores(config, prompt):
    """What the scorer says of the plain tensors, without pool, page order or chunks."""
    scorer, geometry = make_scorer(config), prompt.geometry
    num_tokens = geometry.compact_len
    scores: list[LayerScores] = []
    for layer, parameters in enumerate(LAYERS):
        observed = None
        if "all_queries" in scorer.needs:
            chunk = ChunkInputs(
                query=prompt.query_heads(layer, 0, num_tokens),
                key=prompt.key[layer, :, :num_tokens],
                first=0,
                scale=parameters.scale,
                rotary=parameters.rotary,
            )
            observed = scorer.observe(chunk, None)
        inputs = ScoreInputs(
            key=prompt.key[layer, :, :num_tokens],
            num_candidates=geometry.num_candidate_tokens,
            budget_tokens=geometry.num_region_blocks * SHAPE.block_size,
            scale=parameters.scale,
            layer=layer,
            earlier_scores=list(scores),
            window_query=prompt.query_heads(layer, num_tokens - WINDOW, num_tokens),
            value=prompt.value[layer, :, :num_tokens],
            output_weight=parameters.output_weight,
            output_root=parameters.output_root,
            observed=observed,
            rotary=parameters.rotary,
        )
        scores.append(scorer.score(inputs))
    return scores


def expected_entry_scores(config, prompt):
    """The same of what is chosen from: pages, or tokens."""
    return [
        entry_scores(layer, config, SHAPE.block_size) for layer in expected_scores(config, prompt)
    ]


def expected_selection(config, prompt):
    geometry = prompt.geometry
    return select(
        expected_scores(config, prompt),
        config,
        geometry.num_region_blocks,
        geometry.block_size,
        geometry.compact_len - geometry.first_kept_block * geometry.block_size,
    )


def assert_scores_close(actual, expected):
    assert len(actual) == len(expected) == SHAPE.num_layers
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.first, other.first)
        assert (one.second is None) == (other.second is None)
        if one.second is not None:
            torch.testing.assert_close(one.second, other.second)


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
