"""classify_rows on hand-made steps, and the page tables of decoding requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import Geometry
from vllm_kvcompress.policies.selection import Selection
from vllm_kvcompress.vllm_integration.batch import RequestStates, classify_rows

BLOCK_SIZE = 16
WINDOW = 8
NUM_LAYERS = 2
NUM_HEADS = 2
WIDTH = 16
# A prompt of 100: 5 candidate blocks, 2 region blocks at row index 6, 4 tokens behind them.
CONFIG = KVCompressConfig("snapkv", budget=64, window=WINDOW)
SUFFIX = 30
SUFFIX_CONFIG = KVCompressConfig(
    "snapkv", budget=64, window=WINDOW, options=(("suffix_tokens", SUFFIX),)
)


@pytest.fixture
def states():
    return RequestStates(Geometry(CONFIG, BLOCK_SIZE), NUM_LAYERS)


@pytest.fixture
def suffix_states():
    return RequestStates(Geometry(SUFFIX_CONFIG, BLOCK_SIZE), NUM_LAYERS)


@dataclass
class Row:
    """One request's part of a step. Its i-th token block is block `100 * id + i`.

    The last `suffix` tokens of its prompt are behind the compaction point. A one-shot request
    has vLLM's null block in place of those that it evicts.
    """

    id: int
    prompt_len: int
    num_computed: int
    seq_len: int
    suffix: int = 0
    is_one_shot: bool = False

    @property
    def name(self):
        return f"request-{self.id}"

    @property
    def geometry(self):
        config = SUFFIX_CONFIG if self.suffix else CONFIG
        return Geometry(config, BLOCK_SIZE).of(self.prompt_len)

    def token_blocks(self, num_blocks):
        num_null = self.geometry.first_kept_block if self.is_one_shot else 0
        return [0 if i < num_null else 100 * self.id + i for i in range(num_blocks)]

    @property
    def region(self):
        return [100 * self.id + 50 + i for i in range(self.geometry.num_region_blocks)]

    @property
    def blocks(self):
        """The block-table row as the scheduler lays it out."""
        num_blocks = -(-self.seq_len // BLOCK_SIZE)
        length = self.geometry.num_row_blocks(self.seq_len)
        tokens = self.token_blocks(num_blocks)
        if length == num_blocks:
            return tokens
        boundary = (self.prompt_len - self.suffix) // BLOCK_SIZE
        return tokens[:boundary] + self.region + tokens[boundary:]

    @property
    def slots(self):
        """Where each of the step's tokens really goes."""
        blocks = self.token_blocks(-(-self.seq_len // BLOCK_SIZE))
        positions = range(self.num_computed, self.seq_len)
        return [
            blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE if blocks[p // BLOCK_SIZE] else -1
            for p in positions
        ]

    @property
    def stock_slots(self):
        """Where vLLM, which does not know the region, would put them."""
        row = self.blocks + [-1] * WIDTH
        positions = range(self.num_computed, self.seq_len)
        return [row[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]


class Step:
    """One classified step, checked for what must hold in every one."""

    def __init__(self, states, *rows, collect_all=False):
        self.table = torch.full((len(rows), WIDTH), -7, dtype=torch.int32)
        for i, row in enumerate(rows):
            self.table[i, : len(row.blocks)] = torch.tensor(row.blocks, dtype=torch.int32)
        self.slots = torch.tensor([slot for row in rows for slot in row.stock_slots])
        lens = [row.seq_len - row.num_computed for row in rows]
        table_before, slots_before = self.table.clone(), self.slots.clone()
        self.result = classify_rows(
            states,
            WINDOW,
            [row.name for row in rows],
            np.array([row.prompt_len for row in rows], dtype=np.int32),
            np.cumsum([0, *lens]).astype(np.int32),
            np.array([row.seq_len for row in rows], dtype=np.int32),
            self.table,
            self.slots,
            collect_all,
        )
        assert torch.equal(self.table, table_before)
        assert torch.equal(self.slots, slots_before)
        assert self.result.slot_mapping.dtype == torch.int64
        assert self.result.slot_mapping.tolist() == [slot for row in rows for slot in row.slots]
        numbers = self.result.dense_rows + self.result.one_shot_rows + self.result.compressed_rows
        assert sorted(numbers) == list(range(len(rows)))
        for i in self.result.dense_rows:
            blocks = rows[i].token_blocks(-(-rows[i].seq_len // BLOCK_SIZE))
            assert self.result.block_table[i, : len(blocks)].tolist() == blocks
        for i in self.result.compressed_rows:
            assert self.result.block_table[i, : len(rows[i].blocks)].tolist() == rows[i].blocks

    @property
    def collected(self):
        """(request, first token, past the last token, position of the first, finishes)."""
        return [
            (row.request_id, row.token_start, row.token_end, row.first, row.finishes)
            for row in self.result.prefill_rows
        ]

    @property
    def keeps_block_table(self):
        return self.result.block_table is self.table

    @property
    def keeps_slot_mapping(self):
        return self.result.slot_mapping is self.slots


def keep(states, row, num_pages=None, seed=0):
    """Mark a request as compacted; pages per (layer, head) default to a ragged choice."""
    state = states.get_or_create(row.name, row.prompt_len)
    num_pages = num_pages or [[3, 1], [1, 3]]
    total = row.geometry.num_region_blocks * NUM_LAYERS * NUM_HEADS
    assert sum(map(sum, num_pages)) == total
    generator = torch.Generator().manual_seed(seed)
    candidates = row.geometry.first_kept_block
    chosen = [
        torch.randperm(candidates, generator=generator)[:count].sort().values
        for layer in num_pages
        for count in layer
    ]
    state.selection = Selection(torch.tensor(num_pages), torch.cat(chosen), "page")
    return state


def test_geometry_that_the_cases_below_assume():
    geometry = Row(1, 100, 0, 100).geometry
    assert (geometry.first_kept_block, geometry.boundary_block) == (5, 6)
    assert geometry.num_region_blocks == 2
    assert Row(1, 100, 0, 100).blocks == [100, 101, 102, 103, 104, 105, 150, 151, 106]
    geometry = Row(1, 96, 0, 96).geometry
    assert (geometry.first_kept_block, geometry.boundary_block) == (5, 6)
    assert geometry.num_region_blocks == 3
    assert not Row(1, 64, 0, 64).geometry.is_compressed


def test_dense_rows_get_the_given_tensors_back(states):
    step = Step(states, Row(1, 64, 0, 64), Row(2, 40, 39, 40), Row(3, 40, 55, 56))
    assert step.keeps_block_table
    assert step.keeps_slot_mapping
    assert step.result.dense_rows == [0, 1, 2]
    assert step.result.prefill_rows == []
    assert step.result.compressed_states == []
    assert [name for name, _ in step.result.finished_prompts] == ["request-1", "request-2"]
    assert not any(geometry.is_compressed for _, geometry in step.result.finished_prompts)
    assert len(states) == 0


def test_early_chunk_of_a_long_prompt_is_left_alone(states):
    step = Step(states, Row(1, 100, 0, 64), Row(2, 300, 128, 192))
    assert step.keeps_block_table
    assert step.keeps_slot_mapping
    assert step.result.dense_rows == [0, 1]
    assert step.result.prefill_rows == []
    assert step.result.finished_prompts == []
    assert len(states) == 0


def test_whole_prompt_in_one_step(states):
    row = Row(1, 100, 0, 100)
    step = Step(states, row)
    assert not step.keeps_block_table
    assert not step.keeps_slot_mapping
    assert step.result.dense_rows == [0]
    assert step.result.finished_prompts == [("request-1", row.geometry)]
    (prefill,) = step.result.prefill_rows
    assert step.collected == [("request-1", 92, 100, 92, True)]
    assert prefill.prompt_blocks.dtype == prefill.region_blocks.dtype == torch.int64
    assert prefill.prompt_blocks.tolist() == [100, 101, 102, 103, 104, 105, 106]
    assert prefill.region_blocks.tolist() == [150, 151]
    assert prefill.state is states.get_or_create("request-1", 100)
    assert prefill.state.prompt.geometry == row.geometry
    assert prefill.state.selection is None


def test_prompt_of_whole_blocks(states):
    row = Row(1, 96, 64, 96)
    step = Step(states, row)
    # No prompt token lies behind the region.
    assert step.keeps_slot_mapping
    assert step.result.dense_rows == [0]
    assert step.collected == [("request-1", 24, 32, 88, True)]
    (prefill,) = step.result.prefill_rows
    assert prefill.prompt_blocks.tolist() == [100, 101, 102, 103, 104, 105]
    assert prefill.region_blocks.tolist() == [150, 151, 152]

    keep(states, row, [[4, 2], [3, 3]])
    decode = Step(states, Row(1, 96, 96, 97))
    assert decode.result.compressed_rows == [0]
    assert decode.result.slot_mapping.tolist() == [106 * BLOCK_SIZE]
    assert decode.keeps_block_table


def test_one_shot_rows_get_blocks_of_the_scratch(states):
    first, other = Row(1, 100, 0, 100, is_one_shot=True), Row(2, 40, 0, 40)
    second = Row(3, 96, 0, 96, is_one_shot=True)
    step = Step(states, first, other, second)
    assert step.keeps_block_table
    assert step.result.dense_rows == [1]
    assert step.result.one_shot_rows == [0, 2]
    assert step.result.scratch_starts == [0, 7]
    assert step.result.num_scratch_blocks == 7 + 6
    assert step.collected == [
        ("request-1", 92, 100, 92, True),
        ("request-3", 228, 236, 88, True),
    ]
    one, two = step.result.prefill_rows
    assert one.is_one_shot and two.is_one_shot
    assert one.prompt_blocks.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert two.prompt_blocks.tolist() == [7, 8, 9, 10, 11, 12]
    # What is kept goes to real blocks.
    assert one.region_blocks.tolist() == [150, 151]
    assert two.region_blocks.tolist() == [350, 351, 352]


def test_one_shot_rows_decode_as_all_others(states):
    row = Row(1, 100, 100, 101, is_one_shot=True)
    state = keep(states, row)
    step = Step(states, row)
    assert step.result.compressed_rows == [0]
    assert step.result.one_shot_rows == []
    assert step.result.compressed_states == [state]


def test_resumed_one_shot_row_runs_past_the_end_of_its_prompt(states):
    row = Row(1, 100, 0, 120, is_one_shot=True)
    step = Step(states, row, collect_all=True)
    assert step.result.one_shot_rows == [0]
    assert step.result.num_scratch_blocks == 8
    assert step.collected == [("request-1", 0, 100, 0, True)]
    (prefill,) = step.result.prefill_rows
    assert prefill.prompt_blocks.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_window_chunk_before_the_last_partial_block(states):
    # Ends one token into the window, inside the prompt's full blocks: no region yet.
    step = Step(states, Row(1, 100, 80, 93))
    assert step.keeps_block_table
    assert step.keeps_slot_mapping
    assert step.collected == [("request-1", 12, 13, 92, False)]


def test_chunks_inside_the_last_partial_block(states):
    step = Step(states, Row(1, 100, 80, 98))
    assert not step.keeps_block_table
    assert not step.keeps_slot_mapping
    assert step.result.finished_prompts == []
    assert step.collected == [("request-1", 12, 18, 92, False)]
    state = step.result.prefill_rows[0].state

    # The last chunk is shorter than the window and belongs to the same request.
    step = Step(states, Row(1, 100, 98, 100))
    assert step.result.dense_rows == [0]
    assert step.collected == [("request-1", 0, 2, 98, True)]
    (prefill,) = step.result.prefill_rows
    assert prefill.prompt_blocks.tolist() == [100, 101, 102, 103, 104, 105, 106]
    assert prefill.region_blocks.tolist() == [150, 151]
    assert prefill.state is state


def test_resumed_request_runs_past_the_end_of_its_prompt(states):
    step = Step(states, Row(1, 100, 32, 130))
    assert step.result.dense_rows == [0]
    assert [name for name, _ in step.result.finished_prompts] == ["request-1"]
    # The tokens behind the prompt's end are no part of it.
    assert step.collected == [("request-1", 60, 68, 92, True)]
    (prefill,) = step.result.prefill_rows
    assert prefill.prompt_blocks.tolist() == [100, 101, 102, 103, 104, 105, 106]
    assert prefill.region_blocks.tolist() == [150, 151]


def test_decode_rows_among_all_others(states):
    first, second = Row(3, 100, 117, 118), Row(5, 96, 130, 131)
    first_state = keep(states, first)
    second_state = keep(states, second, [[3, 3], [3, 3]])
    finishing = Row(4, 100, 90, 100)
    step = Step(
        states,
        Row(1, 40, 50, 51),
        Row(2, 300, 0, 64),
        first,
        finishing,
        second,
        Row(6, 64, 60, 64),
    )
    result = step.result
    assert result.dense_rows == [0, 1, 3, 5]
    assert result.compressed_rows == [2, 4]
    found_first, found_second = result.compressed_states
    assert found_first is first_state
    assert found_second is second_state
    assert result.finished_prompts == [
        ("request-4", finishing.geometry),
        ("request-6", Row(6, 64, 60, 64).geometry),
    ]
    # Behind 1 + 64 + 1 tokens of the rows before it, two before the window.
    assert step.collected == [("request-4", 68, 76, 92, True)]
    (prefill,) = result.prefill_rows
    assert prefill.prompt_blocks.tolist() == [400, 401, 402, 403, 404, 405, 406]
    assert prefill.region_blocks.tolist() == [450, 451]


def test_decode_in_the_prompts_last_partial_block(states):
    keep(states, Row(1, 100, 0, 100))
    step = Step(states, Row(1, 100, 100, 101))
    assert step.result.slot_mapping.tolist() == [106 * BLOCK_SIZE + 4]
    assert step.result.compressed_rows == [0]
    assert step.keeps_block_table


def test_decode_of_a_request_that_was_never_compacted_is_noticed(states):
    with pytest.raises(AssertionError, match="request-1 goes on at 100 of 100 tokens"):
        Step(states, Row(1, 100, 100, 101))


def test_all_tokens_are_collected_for_scorers_that_need_them(states):
    other = keep(states, Row(3, 100, 100, 101))
    step = Step(
        states,
        Row(1, 100, 0, 40),
        Row(2, 64, 0, 64),
        Row(3, 100, 100, 101),
        Row(4, 96, 0, 96),
        collect_all=True,
    )
    # Neither a prompt that stays dense nor one that is compacted has a say.
    assert step.collected == [
        ("request-1", 0, 40, 0, False),
        ("request-4", 105, 201, 0, True),
    ]
    assert step.result.compressed_states == [other]
    state = states.get_or_create("request-1", 100)
    # A chunk that begins before the window, then the rest with a token generated before.
    step = Step(states, Row(1, 100, 40, 97), collect_all=True)
    assert step.collected == [("request-1", 0, 57, 40, False)]
    assert step.result.prefill_rows[0].prompt_blocks.tolist() == list(range(100, 107))
    step = Step(states, Row(2, 64, 64, 65), Row(1, 100, 97, 101), collect_all=True)
    assert step.collected == [("request-1", 1, 4, 97, True)]
    assert step.result.prefill_rows[0].prompt_blocks.tolist() == list(range(100, 107))
    assert all(row.state is state for row in step.result.prefill_rows)


# With the suffix, a prompt of 130 is compacted at 100 as a prompt of 100 is without.
def test_chunk_that_ends_at_the_compaction_point(suffix_states):
    row = Row(1, 130, 64, 100, SUFFIX)
    assert row.geometry.compact_len == 100
    step = Step(suffix_states, row)
    assert step.result.dense_rows == [0]
    assert step.result.finished_prompts == [("request-1", row.geometry)]
    assert step.collected == [("request-1", 28, 36, 92, True)]
    (prefill,) = step.result.prefill_rows
    assert prefill.prompt_blocks.tolist() == [100, 101, 102, 103, 104, 105, 106]
    assert prefill.region_blocks.tolist() == [150, 151]


def test_suffix_is_attended_over_the_region(suffix_states):
    state = keep(suffix_states, Row(1, 130, 64, 100, SUFFIX))
    # Two chunks of the suffix, then the first generated token.
    for num_computed, seq_len in ((100, 125), (125, 130), (130, 131)):
        row = Row(1, 130, num_computed, seq_len, SUFFIX)
        for collect_all in (False, True):
            step = Step(suffix_states, Row(2, 40, 50, 51), row, collect_all=collect_all)
            assert step.result.compressed_rows == [1]
            assert step.result.compressed_states == [state]
            assert step.collected == []
            assert step.result.finished_prompts == []
            assert step.keeps_block_table


def test_suffix_of_a_request_that_was_never_compacted_is_noticed(suffix_states):
    with pytest.raises(AssertionError, match="request-1 goes on at 100 of 100 tokens"):
        Step(suffix_states, Row(1, 130, 100, 130, SUFFIX))


def test_window_ends_at_the_compaction_point(suffix_states):
    step = Step(suffix_states, Row(1, 130, 60, 95, SUFFIX), Row(2, 130, 0, 92, SUFFIX))
    assert step.collected == [("request-1", 32, 35, 92, False)]
    assert step.result.finished_prompts == []
    assert len(suffix_states) == 1
    step = Step(suffix_states, Row(1, 130, 60, 95, SUFFIX), collect_all=True)
    assert step.collected == [("request-1", 0, 35, 60, False)]


@pytest.mark.parametrize("seq_len", [101, 112, 113, 130, 140])
def test_chunk_across_the_compaction_point_attends_densely(suffix_states, seq_len):
    # vLLM's own scheduler ends chunks anywhere; what is collected ends at the compaction point.
    row = Row(1, 130, 64, seq_len, SUFFIX)
    for collect_all, token_start, first in ((False, 28, 92), (True, 0, 64)):
        step = Step(suffix_states, row, collect_all=collect_all)
        assert step.result.dense_rows == [0]
        assert step.result.finished_prompts == [("request-1", row.geometry)]
        assert step.collected == [("request-1", token_start, 36, first, True)]
        (prefill,) = step.result.prefill_rows
        assert prefill.prompt_blocks.tolist() == [100, 101, 102, 103, 104, 105, 106]
        assert prefill.region_blocks.tolist() == [150, 151]


def test_suffix_behind_a_compaction_point_between_two_blocks(suffix_states):
    row = Row(1, 126, 80, 96, SUFFIX)
    step = Step(suffix_states, row)
    assert step.keeps_slot_mapping
    assert step.collected == [("request-1", 8, 16, 88, True)]
    assert step.result.prefill_rows[0].region_blocks.tolist() == [150, 151, 152]
    keep(suffix_states, row, [[4, 2], [3, 3]])
    step = Step(suffix_states, Row(1, 126, 96, 126, SUFFIX))
    assert step.result.compressed_rows == [0]
    assert step.result.slot_mapping.tolist() == list(range(106 * BLOCK_SIZE, 106 * BLOCK_SIZE + 30))


def test_prompt_shorter_than_suffix_and_window_stays_dense(suffix_states):
    row = Row(1, SUFFIX + WINDOW, 0, SUFFIX + WINDOW)
    step = Step(suffix_states, row, collect_all=True)
    assert step.keeps_block_table
    assert step.collected == []
    ((name, geometry),) = step.result.finished_prompts
    assert (name, geometry.is_compressed) == ("request-1", False)
    assert len(suffix_states) == 0


def test_states_are_kept_by_id_and_prompt_length(states):
    state = states.get_or_create("a", 100)
    assert states.get_or_create("a", 100) is state
    assert states.get_or_create("b", 100) is not state
    assert len(states) == 2
    renewed = states.get_or_create("a", 200)
    assert renewed is not state
    assert renewed.prompt.geometry.prompt_len == 200
    assert len(states) == 2
    states.forget("a")
    states.forget("a")
    states.forget("never seen")
    assert len(states) == 1
    assert states.get_or_create("a", 200) is not renewed


def decode_row(row):
    return np.array(row.blocks + [-7] * (WIDTH - len(row.blocks)), dtype=np.int32)


def expected_table(row, num_pages):
    """By loops: region pages in stream order, then this stream's page of each tail block."""
    pages_per_block = NUM_LAYERS * NUM_HEADS
    region = iter(
        block * pages_per_block + slot for block in row.region for slot in range(pages_per_block)
    )
    num_blocks = -(-row.seq_len // BLOCK_SIZE)
    tail = row.token_blocks(num_blocks)[row.geometry.first_kept_block :]
    table = []
    for stream, count in enumerate(np.array(num_pages).flatten()):
        pages = [next(region) for _ in range(count)]
        table.append(pages + [block * pages_per_block + stream for block in tail])
    return table


@pytest.mark.parametrize(
    ("prompt_len", "num_pages", "suffix"),
    [
        (100, [[3, 1], [1, 3]], 0),
        (96, [[5, 1], [2, 4]], 0),
        (130, [[3, 1], [1, 3]], SUFFIX),
        (126, [[5, 1], [2, 4]], SUFFIX),
    ],
    ids=["partial_last_block", "whole_blocks", "suffix", "suffix_after_whole_blocks"],
)
def test_page_table_of_a_decoding_request(states, suffix_states, prompt_len, num_pages, suffix):
    states = suffix_states if suffix else states
    compact_len = prompt_len - suffix
    state = keep(states, Row(1, prompt_len, 0, compact_len, suffix), num_pages)
    for seq_len in (compact_len, compact_len + 1, 112, 113, 150):
        row = Row(1, prompt_len, seq_len - 1, seq_len, suffix)
        expected = expected_table(row, num_pages)
        num_tail_blocks = -(-seq_len // BLOCK_SIZE) - row.geometry.first_kept_block
        table = state.page_table(decode_row(row), num_tail_blocks)
        assert table.dtype == torch.int32
        assert table.shape == (NUM_LAYERS * NUM_HEADS, max(map(len, expected)))
        for actual, pages in zip(table.tolist(), expected, strict=True):
            assert actual[: len(pages)] == pages


def test_page_table_is_made_once_per_set_of_blocks(states):
    row = Row(1, 100, 100, 101)
    state = keep(states, row)
    table = state.page_table(decode_row(row), 2)
    same_blocks = decode_row(Row(1, 100, 111, 112))
    # What lies behind the row's end is not read.
    same_blocks[9:] = 99
    assert state.page_table(same_blocks, 2) is table

    longer = state.page_table(decode_row(Row(1, 100, 112, 113)), 3)
    assert longer is not table
    assert longer.shape[1] == table.shape[1] + 1


@pytest.mark.parametrize("index", [5, 6, 7, 8], ids=["dense", "region_0", "region_1", "tail"])
def test_page_table_follows_other_blocks(states, index):
    row = Row(1, 100, 100, 101)
    state = keep(states, row)
    before = state.page_table(decode_row(row), 2).clone()
    moved = decode_row(row)
    moved[index] = 77
    after = state.page_table(moved, 2)
    pages = set(range(77 * 4, 78 * 4))
    assert not pages & set(before.flatten().tolist())
    assert pages <= set(after.flatten().tolist())
