"""What a CPU worker's engine prepares for a step: slots, dense tables, and page tables."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cache_shapes import cache_shape

pytest.importorskip("vllm")

from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import RequestGeometry
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.vllm_integration.platforms.cpu.engine import CPUEngine, HostStep
from vllm_kvcompress.vllm_integration.worker.engine import EngineParts
from vllm_kvcompress.vllm_integration.worker.metrics import CompressionStats

BLOCK_SIZE, WINDOW, WIDTH = 16, 8, 16
SHAPE = cache_shape(2, 2, 1, 8, BLOCK_SIZE)
SUFFIX = 30
# A prompt of 100: 5 candidate blocks, 2 region blocks at column 6, 4 tokens behind them.
CONFIGS = {
    suffix: KVCompressConfig(
        "snapkv", budget=64, window=WINDOW, options=(("suffix_tokens", suffix),)
    )
    for suffix in (0, SUFFIX)
}


@dataclass
class Row:
    """One request's part of a step. Its i-th token block is block `100 * id + i`.

    The last `suffix` tokens of its prompt are behind the compaction point. A one-shot request has
    vLLM's null block in place of those that it evicts.
    """

    id: int
    prompt_len: int
    num_computed: int
    seq_len: int
    suffix: int = 0
    is_one_shot: bool = False

    @property
    def name(self) -> str:
        return f"request-{self.id}"

    @property
    def geometry(self) -> RequestGeometry:
        return CONFIGS[self.suffix].geometry(BLOCK_SIZE).of(self.prompt_len)

    def token_blocks(self) -> list[int]:
        num_null = self.geometry.first_kept_block if self.is_one_shot else 0
        num_blocks = -(-self.seq_len // BLOCK_SIZE)
        return [0 if i < num_null else 100 * self.id + i for i in range(num_blocks)]

    @property
    def region(self) -> list[int]:
        return [100 * self.id + 50 + i for i in range(self.geometry.num_region_blocks)]

    @property
    def blocks(self) -> list[int]:
        """The block-table row as the scheduler lays it out."""
        tokens = self.token_blocks()
        if self.geometry.num_row_blocks(self.seq_len) == len(tokens):
            return tokens
        boundary = (self.prompt_len - self.suffix) // BLOCK_SIZE
        return tokens[:boundary] + self.region + tokens[boundary:]

    def slots(self, blocks: list[int]) -> list[int]:
        """Where each of the step's tokens goes, by these blocks; -1 for the null block."""
        return [
            blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE if blocks[p // BLOCK_SIZE] else -1
            for p in range(self.num_computed, self.seq_len)
        ]

    def stock_slots(self) -> list[int]:
        """Where vLLM would put them; the null block is one like others."""
        row = [*self.blocks, 1, 1, 1]
        return [
            row[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            for p in range(self.num_computed, self.seq_len)
        ]


@pytest.fixture(params=[0, SUFFIX], ids=["no suffix", "suffix"])
def suffix(request) -> int:
    return request.param


def engine_of(suffix: int = 0) -> CPUEngine:
    size = (700, SHAPE.num_layers, SHAPE.num_kv_heads, BLOCK_SIZE, 2 * SHAPE.head_size)
    pool = torch.zeros(size)
    parts = EngineParts(
        config=CONFIGS[suffix],
        shape=SHAPE,
        layer_views={f"layers.{i}": pool[:, i] for i in range(SHAPE.num_layers)},
        layers=[LayerParameters(0.5)] * SHAPE.num_layers,
        row_names=lambda common: common.names,
        max_num_reqs=8,
        stats=CompressionStats(log=False),
    )
    return CPUEngine(parts, PageOrder.plain(BLOCK_SIZE, SHAPE.head_size))


def prepare(engine: CPUEngine, *rows: Row, beyond: int = -7) -> HostStep:
    """A step of these rows, checked for what must hold in every one."""
    # Whoever reads past a row's end meets no block.
    table = torch.full((len(rows), WIDTH), beyond, dtype=torch.int32)
    for i, row in enumerate(rows):
        table[i, : len(row.blocks)] = torch.tensor(row.blocks, dtype=torch.int32)
    # As vLLM has them, which does not know of regions.
    slots = torch.tensor([slot for row in rows for slot in row.stock_slots()])
    starts = np.cumsum([0, *(row.seq_len - row.num_computed for row in rows)])
    common = SimpleNamespace(
        names=([row.name for row in rows], np.array([row.prompt_len for row in rows], np.int32)),
        num_reqs=len(rows),
        query_start_loc_cpu=torch.from_numpy(starts).int(),
        seq_lens=torch.tensor([row.seq_len for row in rows], dtype=torch.int32),
        block_table_tensor=table,
        slot_mapping=slots,
    )
    before = table.clone()
    with engine.scheduled_step({row.name for row in rows if row.is_one_shot}):
        step = engine.prepare(common)
    assert torch.equal(table, before)
    assert slots.tolist() == [slot for row in rows for slot in row.slots(row.token_blocks())]
    numbers = step.dense_rows + step.one_shot_rows + step.compacted_rows
    assert sorted(numbers) == list(range(len(rows)))
    for i in step.dense_rows:
        blocks = rows[i].token_blocks()
        assert step.dense_table[i, : len(blocks)].tolist() == blocks
    if not step.plan.cut:
        assert step.dense_table.data_ptr() == table.data_ptr()
    return step


def keep(engine: CPUEngine, row: Row, num_pages: list[int]) -> None:
    """Mark a request as compacted, with so many pages for each stream."""
    assert sum(num_pages) == row.geometry.num_region_blocks * SHAPE.pages_per_block
    request = engine.requests.get_or_create(row.name, row.prompt_len)
    slot = engine.requests.mark_compacted(request)
    engine.page_offsets[slot] = torch.tensor([0, *np.cumsum(num_pages)])


def expected_table(row: Row, num_pages: list[int]) -> list[list[int]]:
    """By loops: region pages in stream order, then this stream's page of each tail block."""
    streams = range(SHAPE.pages_per_block)
    region = iter(block * len(streams) + slot for block in row.region for slot in streams)
    tail = row.token_blocks()[row.geometry.first_kept_block :]
    return [
        [next(region) for _ in range(count)] + [block * len(streams) + stream for block in tail]
        for stream, count in enumerate(num_pages)
    ]


def test_geometry_that_the_cases_below_assume():
    geometry = Row(1, 100, 0, 100).geometry
    assert (geometry.first_kept_block, geometry.boundary_block) == (5, 6)
    assert geometry.num_region_blocks == 2
    assert Row(1, 100, 0, 100).blocks == [100, 101, 102, 103, 104, 105, 150, 151, 106]
    assert not Row(1, 64, 0, 64).geometry.is_compressed


def test_dense_rows_are_left_alone():
    rows = (Row(1, 64, 0, 64), Row(2, 40, 39, 40), Row(3, 40, 55, 56), Row(4, 100, 0, 64))
    step = prepare(engine_of(), *rows)
    assert step.dense_rows == [0, 1, 2, 3]
    assert not step.chunks and not step.endings


@pytest.mark.parametrize(
    ("row", "collected"),
    [
        (Row(1, 100, 0, 100), (92, 100, 92, True)),
        (Row(1, 96, 64, 96), (24, 32, 88, True)),
        # Ends one token into the window, inside the prompt's full blocks: no region yet.
        (Row(1, 100, 80, 93), (12, 13, 92, False)),
        (Row(1, 100, 80, 98), (12, 18, 92, False)),
        # Resumed, with tokens generated before.
        (Row(1, 100, 32, 130), (60, 68, 92, True)),
        (Row(1, 130, 64, 100, SUFFIX), (28, 36, 92, True)),
        (Row(1, 130, 64, 140, SUFFIX), (28, 36, 92, True)),
        (Row(1, 126, 80, 96, SUFFIX), (8, 16, 88, True)),
    ],
    ids=str,
)
def test_prompts_are_dense_until_they_are_compacted(row, collected):
    step = prepare(engine_of(row.suffix), row)
    assert step.dense_rows == [0]
    (chunk,) = step.chunks
    assert (chunk.token_start, chunk.token_end, chunk.first, chunk.finishes) == collected
    assert len(step.endings) == chunk.finishes


def test_one_shot_rows_get_a_buffer_in_their_order():
    rows = (
        Row(1, 100, 0, 100, is_one_shot=True),
        Row(2, 40, 0, 40),
        Row(3, 96, 0, 96, is_one_shot=True),
    )
    engine = engine_of()
    step = prepare(engine, *rows)
    assert (step.dense_rows, step.one_shot_rows) == ([1], [0, 2])
    table, slots = engine.staged_places(step, 0, 2)
    assert table.tolist() == [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 0]]
    assert slots.tolist() == [*range(100), *range(7 * BLOCK_SIZE, 7 * BLOCK_SIZE + 96)]


@pytest.mark.parametrize("num_pages", [[3, 1, 1, 3], [5, 1, 1, 1]])
def test_page_tables_of_compacted_rows(suffix, num_pages):
    engine = engine_of(suffix)
    prompt_len = 100 + suffix
    keep(engine, Row(1, prompt_len, 0, 100, suffix), num_pages)
    for seq_len in (101, 112, 113, 150):
        row = Row(1, prompt_len, seq_len - 1, seq_len, suffix)
        step = prepare(engine, Row(2, 40, 50, 51, suffix), row)
        assert (step.dense_rows, step.compacted_rows) == ([0], [1])
        assert step.page_counts.tolist() == [num_pages]
        expected, (table,) = expected_table(row, num_pages), step.page_tables
        assert table.shape == (SHAPE.pages_per_block, max(map(len, expected)))
        for actual, pages in zip(table.tolist(), expected, strict=True):
            assert actual[: len(pages)] == pages


def test_a_page_table_is_made_once_per_set_of_blocks():
    engine = engine_of()
    keep(engine, Row(1, 100, 0, 100), [3, 1, 1, 3])
    (first,) = prepare(engine, Row(1, 100, 100, 101)).page_tables
    # What lies behind the row's end is not read.
    (again,) = prepare(engine, Row(1, 100, 111, 112), beyond=99).page_tables
    assert again is first
    (longer,) = prepare(engine, Row(1, 100, 112, 113)).page_tables
    assert longer.shape[1] == first.shape[1] + 1


@pytest.mark.parametrize("part", ["region", "tail"])
def test_a_page_table_follows_other_blocks(monkeypatch, part):
    engine, row = engine_of(), Row(1, 100, 100, 101)
    keep(engine, row, [3, 1, 1, 3])
    (before,) = prepare(engine, row).page_tables
    known = set(before.flatten().tolist())
    if part == "region":
        monkeypatch.setattr(Row, "region", [150, 77])
    else:
        blocks = row.token_blocks()
        monkeypatch.setattr(Row, "token_blocks", lambda self: [*blocks[:-1], 77])
    (after,) = prepare(engine, row).page_tables
    pages = set(range(77 * 4, 78 * 4))
    assert not pages & known
    assert pages <= set(after.flatten().tolist())


def test_a_request_that_comes_back_has_a_table_of_its_own():
    engine, row = engine_of(), Row(1, 100, 100, 101)
    keep(engine, row, [3, 1, 1, 3])
    (before,) = prepare(engine, row).page_tables
    engine.forget([row.name])
    with pytest.raises(RuntimeError, match="at 100 of 100 tokens but was never compacted here"):
        prepare(engine, row)
    engine.forget([row.name])
    # The same blocks, shared otherwise.
    keep(engine, row, [2, 2, 2, 2])
    (after,) = prepare(engine, row).page_tables
    assert not torch.equal(before, after)
