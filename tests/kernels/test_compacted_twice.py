"""Rows with two compaction points: `[prompt][region 0][tail 0][region 1][tail 1]`.

The rows here grow as vLLM's do, block by block, and remember on their own what they hold.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from compiled_ops import need_compiled_ops
from csrc_cases import in_several_orders
from paged_pool import DEVICE, Request, Shape, make_batch, nan_pool, random_like

from vllm_kvcompress import ops
from vllm_kvcompress.memory.row_layout import CompactionPoint, RowLayout

SHAPE = Shape(num_layers=2, num_kv_heads=2, group=2, head_size=64)
SCALE = 0.3
# vLLM's, for what a row has no block for.
NULL_BLOCK = 0
TOLERANCE = 1e-5 if SHAPE.dtype == torch.float32 else 2e-2


@dataclass
class Cache:
    """A pool that hands out its blocks in some order."""

    num_blocks: int
    pool: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.pool = nan_pool(SHAPE, self.num_blocks, DEVICE)
        self._free = list(range(1, self.num_blocks))
        random.Random(0).shuffle(self._free)
        self._generator = torch.Generator(DEVICE).manual_seed(0)

    def take(self) -> int:
        return self._free.pop()

    def fill(self, block: int, slot: int, num_slots: int = 1) -> torch.Tensor:
        """[num_slots, 2 d] new numbers of one page."""
        size = (num_slots, 2 * SHAPE.head_size)
        entries = random_like(size, self.pool.dtype, self._generator)
        self.pool[block, slot : slot + num_slots] = entries
        return entries


class Life:
    """One request: its row, and what is alive of every stream."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.row, self.length = cache, [], 0
        self.regions = [[] for _ in range(SHAPE.num_streams)]
        # (column, slot, entries of all streams) of dense tokens, in order.
        self.dense: list[tuple[int, int, list[torch.Tensor]]] = []
        self.points: list[CompactionPoint] = []
        self.pages = [0] * SHAPE.num_streams
        self.column = -1

    def compute(self, num_tokens: int) -> None:
        b, num_streams = SHAPE.block_size, SHAPE.num_streams
        for position in range(self.length, self.length + num_tokens):
            if position % b == 0:
                self.column = len(self.row)
                self.row.append(self.cache.take())
            first = self.row[self.column] * num_streams
            entries = [self.cache.fill(first + s, position % b) for s in range(num_streams)]
            self.dense.append((self.column, position % b, entries))
        self.length += num_tokens

    def compact(self, pages: list[int], recent_blocks: int) -> None:
        """Keep new numbers in a region of so many pages per stream, and the newest blocks."""
        b, num_streams = SHAPE.block_size, SHAPE.num_streams
        assert self.length % b == 0 and sum(pages) % num_streams == 0
        boundary = self.length // b
        first_kept = boundary - recent_blocks
        kept_columns = sorted({column for column, _, _ in self.dense})[-recent_blocks:]
        for column in range(kept_columns[0]):
            self.row[column] = NULL_BLOCK
        self.dense = [token for token in self.dense if token[0] in kept_columns]
        region = [self.cache.take() for _ in range(sum(pages) // num_streams)]
        self.row += region
        page_ids = [block * num_streams + s for block in region for s in range(num_streams)]
        self.regions = [[self.cache.fill(page_ids.pop(0), 0, b) for _ in range(n)] for n in pages]
        self.pages = pages
        self.points.append(CompactionPoint(boundary, len(region), first_kept))

    def alive(self, stream: int) -> torch.Tensor:
        """[n, 2 d]"""
        dense = [entries[stream] for _, _, entries in self.dense]
        return torch.cat([*self.regions[stream], *dense])

    def slots(self, num_tokens: int) -> list[int]:
        """Of its newest tokens."""
        newest = self.dense[len(self.dense) - num_tokens :]
        return [self.row[column] * SHAPE.block_size + slot for column, slot, _ in newest]

    def descriptor(self) -> ops.RowDescriptor:
        return RowLayout(tuple(self.points)).descriptor(self.length)


QUERY_LENS = (1, 3, 2, 1, 1)


@pytest.fixture
def lives() -> list[Life]:
    """Compacted twice, twice with a tail at its end's edge, once, twice just now, and never."""
    b = SHAPE.block_size
    cache = Cache(80)
    twice, edge, once, fresh, dense = (Life(cache) for _ in range(5))
    twice.compute(6 * b)
    twice.compact([3, 1, 0, 4], recent_blocks=1)
    twice.compute(4 * b)
    twice.compact([0, 2, 5, 1], recent_blocks=2)
    twice.compute(b + 5)
    edge.compute(5 * b)
    edge.compact([2, 2, 2, 2], recent_blocks=2)
    edge.compute(3 * b)
    edge.compact([1, 0, 2, 1], recent_blocks=1)
    edge.compute(2 * b)
    once.compute(7 * b)
    once.compact([4, 1, 1, 2], recent_blocks=2)
    once.compute(3)
    fresh.compute(4 * b)
    fresh.compact([1, 1, 1, 1], recent_blocks=1)
    fresh.compute(2 * b)
    fresh.compact([3, 0, 4, 1], recent_blocks=1)
    dense.compute(2 * b + 7)
    return [twice, edge, once, fresh, dense]


@dataclass
class Step:
    rows: torch.Tensor
    page_offsets: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    query: torch.Tensor


@pytest.fixture
def step(lives) -> Step:
    ints = {"dtype": torch.int32, "device": DEVICE}
    width = max(len(life.row) for life in lives)
    table = [life.row + [NULL_BLOCK] * (width - len(life.row)) for life in lives]
    offsets = [[sum(life.pages[:s]) for s in range(SHAPE.num_streams + 1)] for life in lives]
    starts = [sum(QUERY_LENS[:r]) for r in range(len(lives) + 1)]
    generator = torch.Generator(DEVICE).manual_seed(1)
    return Step(
        rows=torch.tensor([life.descriptor() for life in lives], **ints),
        page_offsets=torch.tensor(offsets, **ints),
        block_table=torch.tensor(table, **ints),
        query_start_loc=torch.tensor(starts, **ints),
        query=random_like((starts[-1], SHAPE.num_heads, SHAPE.head_size), SHAPE.dtype, generator),
    )


def plain_attention(query: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """[d] float64, of one query over what it sees."""
    keys, values = entries.double().chunk(2, dim=1)
    return (keys @ query.double() * SCALE).softmax(dim=0) @ values


def expected_attention(lives, query, layer) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    token = 0
    for life, query_len in zip(lives, QUERY_LENS, strict=True):
        for i in range(query_len):
            for head in range(SHAPE.num_heads):
                entries = life.alive(layer * SHAPE.num_kv_heads + head // SHAPE.group)
                seen = entries[: len(entries) - (query_len - 1 - i)]
                out[token, head] = plain_attention(query[token, head], seen)
            token += 1
    return out


def forgotten_shift(rows: torch.Tensor) -> torch.Tensor:
    """As if there had been no region before the newest one."""
    wrong = rows.clone()
    column, boundary = map(ops.ROW_FIELDS.index, ("region_column", "boundary_block"))
    wrong[:, column] = wrong[:, boundary]
    return wrong


def test_rows_are_what_the_layouts_say(lives):
    assert [tuple(life.descriptor()) for life in lives] == [
        (181, 2, 12, 10, 8),
        (160, 1, 10, 8, 7),
        (115, 2, 7, 7, 5),
        (96, 2, 7, 6, 5),
        (39, 0, 0, 0, 0),
    ]
    twice = lives[0]
    assert [block == NULL_BLOCK for block in twice.row] == [True] * 10 + [False] * 6


def decode(lives, step, rows, layer, backend):
    return ops.ragged_decode(
        step.query,
        ops.Pool(lives[0].cache.pool, SHAPE.num_layers, SHAPE.num_kv_heads),
        ops.Rows(rows, step.block_table, step.page_offsets, step.query_start_loc),
        layer,
        ops.Logits(SCALE),
        max_query_len=max(QUERY_LENS),
        backend=backend,
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("layer", range(SHAPE.num_layers))
def test_attention_reads_what_is_alive(lives, step, backend, layer):
    expected = expected_attention(lives, step.query, layer)
    found = decode(lives, step, step.rows, layer, backend)
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_forgotten_shift_is_noticed(lives, step, backend):
    expected = expected_attention(lives, step.query, 0)
    wrong = decode(lives, step, forgotten_shift(step.rows), 0, backend)
    is_right = [
        bool(torch.allclose(mine.double(), its, atol=1e-2))
        for mine, its in zip(
            wrong.split(list(QUERY_LENS)), expected.split(list(QUERY_LENS)), strict=True
        )
    ]
    assert is_right == [False, False, True, False, True]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_new_tokens_go_behind_the_newest_region(lives, step, backend):
    num_tokens = sum(QUERY_LENS)

    def slots_of(rows):
        rows = ops.Rows(rows, step.block_table, None, step.query_start_loc)
        return ops.token_slots(rows, num_tokens, SHAPE.block_size, backend=backend)

    slots = slots_of(step.rows)
    expected = [life.slots(n) for life, n in zip(lives, QUERY_LENS, strict=True)]
    assert slots.tolist() == [slot for part in expected for slot in part]
    wrong = slots_of(forgotten_shift(step.rows))
    assert wrong.tolist() != slots.tolist()


def test_page_tables_of_the_cpu_hold_what_is_alive(lives):
    for life in lives[:4]:
        layout, newest = RowLayout(tuple(life.points)), life.points[-1]
        region = life.row[layout.region_column :][: newest.region_blocks]
        num_blocks = -(-life.length // SHAPE.block_size)
        columns = [layout.column_of(j) for j in range(newest.first_kept_block, num_blocks)]
        offsets = torch.tensor([0, *life.pages]).cumsum(0)
        longest = max(life.pages) + len(columns)
        table = ops.ragged_page_table(
            ops.region_page_ids(torch.tensor(region), SHAPE.num_streams),
            offsets,
            torch.tensor([life.row[c] for c in columns]),
            longest,
        )
        for stream in range(SHAPE.num_streams):
            entries = life.alive(stream)
            pages = table[stream, : -(-len(entries) // SHAPE.block_size)].long().to(DEVICE)
            read = life.cache.pool[pages].flatten(0, 1)[: len(entries)]
            assert torch.equal(read, entries)


@pytest.fixture
def prompt():
    """A prompt behind an older region of three blocks, and the same without that region."""
    b = SHAPE.block_size
    plain = Request(6 * b + 5, num_region_blocks=2, boundary_block=6)
    batch = make_batch(SHAPE, [plain], DEVICE)
    (row,) = batch.rows.tolist()
    descriptor = ops.RowDescriptor(*row)._replace(region_column=9)
    rows = torch.tensor([descriptor], dtype=torch.int32, device=DEVICE)
    older = batch.block_table.new_zeros(1, 3)
    return batch, rows, torch.cat([older, batch.block_table], dim=1)


@pytest.mark.parametrize("backend", ["reference", "triton", "native"])
def test_scores_of_a_prompt_behind_an_older_region(prompt, backend):
    if backend == "native":
        need_compiled_ops()
    batch, rows, block_table = prompt
    generator = torch.Generator(DEVICE).manual_seed(2)
    size = (1, 1, 8, SHAPE.num_heads, SHAPE.head_size)
    query = random_like(size, SHAPE.dtype, generator)
    root = random_like((1, 2, SHAPE.head_size, SHAPE.head_size), SHAPE.dtype, generator)
    rated = torch.tensor([6 * SHAPE.block_size], dtype=torch.int32, device=DEVICE)

    def read(rows, block_table):
        prompts = ops.Prompts(ops.Rows(rows, block_table), rated, rated, int(rated), int(rated))
        where = (batch.paged(), prompts, 1)
        for reduce in ("mean", "defensive"):
            how = (ops.Logits(SCALE), ops.WindowPlan(reduce=reduce))
            yield ops.window_scores(query, *where, *how, backend=backend).amax(dim=2)
        yield ops.paged_value_effect(root, *where, backend=backend)

    wanted = list(read(batch.rows, batch.block_table))
    assert all(torch.isfinite(w).all() for w in wanted)
    for mine, its in zip(read(rows, block_table), wanted, strict=True):
        assert torch.equal(mine, its)
    shifted = read(forgotten_shift(rows), block_table)
    assert not any(torch.equal(a, b) for a, b in zip(shifted, wanted, strict=True))


def copied_region(prompt, target_column, compact):
    """[pages, b, 2 d] of the region's blocks after pages were copied there, and where from."""
    batch, _, block_table = prompt
    pool = batch.pool.clone()
    # Sources are columns of token blocks, so that older columns have to be a prompt's.
    b, num_streams = SHAPE.block_size, SHAPE.num_streams
    row = ops.RowDescriptor(6 * b, 2, target_column, 6)
    rows = torch.tensor([row], dtype=torch.int32, device=pool.device)
    table = block_table[:, 3:].clone()
    offsets = torch.tensor([[0, 2, 4, 6, 8]], dtype=torch.int32, device=pool.device)
    indices = torch.tensor([[0, 5, 1, 4, 2, 3, 0, 2]], dtype=torch.int32, device=pool.device)
    compact(pool, rows, table, offsets, indices, max_region_blocks=2)
    ids = table[0, target_column : target_column + 2].tolist()
    target = [pool[x * num_streams : (x + 1) * num_streams] for x in ids]
    sources = [
        batch.pool[int(table[0, index]) * num_streams + i // 2]
        for i, index in enumerate(indices[0].tolist())
    ]
    return torch.cat(target), torch.stack(sources)


@pytest.mark.parametrize("column", [6, 7])
@pytest.mark.parametrize("backend", ["reference", "triton", "native", "torch"])
def test_a_region_is_written_at_its_own_column(prompt, backend, column):
    if backend == "native":
        need_compiled_ops()

    def compact(pool, rows, block_table, *selection, **options):
        rows = ops.Rows(rows, block_table)
        ops.compact(prompt[0].paged(pool), rows, *selection, **options, backend=backend)

    found, expected = copied_region(prompt, column, compact)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("column", [6, 7])
def test_cuda_writes_a_region_at_its_own_column(target, column):
    kernels, device = target
    batch = make_batch(SHAPE, [Request(6 * 16 + 5, 1, 2, 6)], device)
    older = batch.block_table.new_zeros(1, 3)
    prompt = batch, batch.rows, torch.cat([older, batch.block_table], dim=1)
    for _ in in_several_orders(kernels):
        found, expected = copied_region(prompt, column, kernels.compact)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
