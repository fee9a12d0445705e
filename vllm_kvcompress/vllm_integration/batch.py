"""Worker side: what a step's rows are to us, and the state of requests between steps."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_kvcompress import ops
from vllm_kvcompress.compaction import PromptCompaction
from vllm_kvcompress.memory import NULL_BLOCK, Geometry, RequestGeometry, cdiv
from vllm_kvcompress.policies.selection import Selection


@dataclass
class RequestState:
    """One compressed (or to be compressed) request on this worker.

    Attributes:
        prompt: what is collected until compaction.
        selection: what was kept; None before compaction.
    """

    prompt: PromptCompaction
    selection: Selection | None = None
    _table: torch.Tensor | None = None
    _table_key: tuple[int, ...] = ()

    def page_table(self, row: np.ndarray, num_tail_blocks: int) -> torch.Tensor:
        """[L * H, width] int32 page table over the region and `num_tail_blocks` tail blocks.

        Args:
            row: the request's block-table row.
            num_tail_blocks: blocks from `first_kept_block` on, in token order.
        """
        assert self.selection is not None
        geometry = self.prompt.geometry
        start, boundary = geometry.first_kept_block, geometry.boundary_block
        region_end = boundary + geometry.num_region_blocks
        region = row[boundary:region_end]
        num_generated = num_tail_blocks - (boundary - start)
        tail = np.concatenate([row[start:boundary], row[region_end : region_end + num_generated]])
        # The block ids are part of the key: a preempted request comes back with others.
        key = (*region.tolist(), *tail.tolist())
        if self._table is None or key != self._table_key:
            offsets = self.selection.page_offsets
            pages_per_block = offsets.numel() - 1
            longest = int(self.selection.num_pages.max()) + num_tail_blocks
            self._table = ops.ragged_page_table(
                ops.region_page_ids(torch.from_numpy(region), pages_per_block),
                offsets,
                torch.from_numpy(tail),
                longest,
            )
            self._table_key = key
        return self._table


class RequestStates:
    """The worker's requests, by request id."""

    def __init__(self, geometry: Geometry, num_layers: int) -> None:
        self.geometry = geometry
        self.num_layers = num_layers
        # Of the step at hand, those that are never compressed.
        self.whole_ids: Container[str] = ()
        self._states: dict[str, RequestState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def geometry_of(self, request_id: str, prompt_len: int) -> RequestGeometry:
        """Geometry of a request of the step at hand."""
        return self.geometry.of_request(prompt_len, request_id in self.whole_ids)

    def get_or_create(self, request_id: str, prompt_len: int) -> RequestState:
        """The state of a request, new if it is unknown or its prompt length has changed."""
        state = self._states.get(request_id)
        geometry = self.geometry_of(request_id, prompt_len)
        if state is None or state.prompt.geometry != geometry:
            state = RequestState(PromptCompaction(geometry, self.num_layers))
            self._states[request_id] = state
        return state

    def forget(self, request_id: str) -> None:
        """Drop a finished or preempted request; unknown ids are fine."""
        self._states.pop(request_id, None)


@dataclass(frozen=True)
class PrefillRow:
    """A row of this step whose queries have a say in what its prompt keeps.

    Attributes:
        request_id: vLLM's internal id.
        state: of the request; its prompt collects queries and scores.
        token_start, token_end: the tokens to collect, in the step's flat token order.
        first: position in the prompt of the token at `token_start`.
        finishes: whether the last token before the compaction point is among them.
        is_one_shot: whether `prompt_blocks` are of the step's scratch, not of the pool.
        prompt_blocks: [ceil(compact_len / block_size)] int64; entries past this step's last
            token mean nothing.
        region_blocks: [num_region_blocks] int64, only read when it finishes.
    """

    request_id: str
    state: RequestState
    token_start: int
    token_end: int
    first: int
    finishes: bool
    is_one_shot: bool
    prompt_blocks: torch.Tensor
    region_blocks: torch.Tensor


@dataclass
class StepRows:
    """How each row of a step is to be attended.

    Attributes:
        block_table: [R, width] int32; dense rows that own a region (a prompt that ends in this
            step) have it cut out, so that position p is at block p // block_size again.
        slot_mapping: [T] int64, cache slot of every token; -1 for one that gets none.
        dense_rows, one_shot_rows, compressed_rows: row numbers, together all rows.
        compressed_states: one per compressed row.
        scratch_starts: per one-shot row, its first block in the step's scratch; the others
            follow.
        num_scratch_blocks: blocks of the scratch in all.
        prefill_rows: rows with tokens to collect.
        finished_prompts: (request id, geometry) of all prompts that end here, compressed
            or not.
    """

    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    dense_rows: list[int] = field(default_factory=list)
    one_shot_rows: list[int] = field(default_factory=list)
    compressed_rows: list[int] = field(default_factory=list)
    compressed_states: list[RequestState] = field(default_factory=list)
    scratch_starts: list[int] = field(default_factory=list)
    num_scratch_blocks: int = 0
    prefill_rows: list[PrefillRow] = field(default_factory=list)
    finished_prompts: list[tuple[str, RequestGeometry]] = field(default_factory=list)


def classify_rows(
    states: RequestStates,
    window: int,
    request_ids: list[str],
    prompt_lens: np.ndarray,
    query_start_loc: np.ndarray,
    seq_lens: np.ndarray,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    collect_all: bool = False,
) -> StepRows:
    """Sort a step's rows into stock and compressed ones.

    Args:
        states: of the worker's requests; new ones are added.
        window: tokens of the scoring window.
        request_ids, prompt_lens: per row.
        query_start_loc: [R + 1] first token of each row.
        seq_lens: [R] tokens of each row after this step.
        block_table: [R, width] int32, vLLM's rows; not written to.
        slot_mapping: [T] int64, vLLM's, right for rows without a region; not written to.
        collect_all: collect all prompt tokens, not the window's only.

    Returns:
        The rows; `block_table` and `slot_mapping` are the given tensors where nothing had
        to change, else corrected copies.
    """
    rows = StepRows(block_table, slot_mapping)
    starts = query_start_loc.tolist()
    for i, request_id in enumerate(request_ids):
        prompt_len, seq_len = int(prompt_lens[i]), int(seq_lens[i])
        geometry = states.geometry_of(request_id, prompt_len)
        num_computed = seq_len - (starts[i + 1] - starts[i])
        compact_len = geometry.compact_len
        finishes = num_computed < compact_len <= seq_len
        if finishes:
            rows.finished_prompts.append((request_id, geometry))
        if not geometry.is_compressed:
            rows.dense_rows.append(i)
            continue
        row = block_table[i]
        _correct_slots(rows, slot_mapping, row, geometry, starts[i], num_computed, seq_len)
        if num_computed >= compact_len:
            state = states.get_or_create(request_id, prompt_len)
            assert state.selection is not None, (
                f"request {request_id} goes on at {num_computed} of {compact_len} tokens "
                "but was never compacted here"
            )
            rows.compressed_rows.append(i)
            rows.compressed_states.append(state)
            continue
        num_prompt_blocks = cdiv(compact_len, geometry.block_size)
        is_one_shot = finishes and num_computed == 0 and int(row[0]) == NULL_BLOCK
        if is_one_shot:
            evicted = slice(starts[i], starts[i] + geometry.num_candidate_tokens)
            _own_slots(rows, slot_mapping)[evicted] = -1
            prompt_blocks = _add_to_scratch(rows, i, cdiv(seq_len, geometry.block_size))
        else:
            rows.dense_rows.append(i)
            if geometry.num_row_blocks(seq_len) > cdiv(seq_len, geometry.block_size):
                _cut_region(rows, block_table, i, geometry)
            prompt_blocks = rows.block_table[i].long()
        first = num_computed if collect_all else max(num_computed, compact_len - window)
        last = min(seq_len, compact_len)
        if first < last:
            boundary = geometry.boundary_block
            rows.prefill_rows.append(
                PrefillRow(
                    request_id=request_id,
                    state=states.get_or_create(request_id, prompt_len),
                    token_start=starts[i] + first - num_computed,
                    token_end=starts[i] + last - num_computed,
                    first=first,
                    finishes=finishes,
                    is_one_shot=is_one_shot,
                    prompt_blocks=prompt_blocks[:num_prompt_blocks],
                    region_blocks=row[boundary : boundary + geometry.num_region_blocks].long(),
                )
            )
    return rows


def _correct_slots(
    rows: StepRows,
    stock_slots: torch.Tensor,
    row: torch.Tensor,
    geometry: RequestGeometry,
    row_start: int,
    num_computed: int,
    seq_len: int,
) -> None:
    # Tokens past the boundary lie behind the region in the row; vLLM does not know that.
    block_size = geometry.block_size
    first = max(num_computed, geometry.boundary_block * block_size)
    if first >= seq_len:
        return
    positions = torch.arange(first, seq_len)
    blocks = row[positions // block_size + geometry.num_region_blocks].long()
    start = row_start + first - num_computed
    slots = _own_slots(rows, stock_slots)
    slots[start : start + len(positions)] = blocks * block_size + positions % block_size


def _own_slots(rows: StepRows, stock_slots: torch.Tensor) -> torch.Tensor:
    """The step's slots, first made a copy if they are still vLLM's."""
    if rows.slot_mapping is stock_slots:
        rows.slot_mapping = stock_slots.clone()
    return rows.slot_mapping


def _add_to_scratch(rows: StepRows, row: int, num_blocks: int) -> torch.Tensor:
    """Give a one-shot row blocks in the scratch; returns their numbers."""
    start = rows.num_scratch_blocks
    rows.one_shot_rows.append(row)
    rows.scratch_starts.append(start)
    rows.num_scratch_blocks += num_blocks
    return torch.arange(start, rows.num_scratch_blocks)


def _cut_region(
    rows: StepRows, stock_table: torch.Tensor, row: int, geometry: RequestGeometry
) -> None:
    # A prompt that is being finished still attends to all of its dense blocks.
    if rows.block_table is stock_table:
        rows.block_table = stock_table.clone()
    boundary, region = geometry.boundary_block, geometry.num_region_blocks
    tail = stock_table[row, boundary + region :]
    rows.block_table[row, boundary : boundary + len(tail)] = tail
