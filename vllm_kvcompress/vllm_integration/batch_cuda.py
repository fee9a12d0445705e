"""Worker side on a GPU: what a step's rows are to us, told on the host from host numbers alone."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_kvcompress.compaction import PromptCompaction
from vllm_kvcompress.memory import Geometry, RequestGeometry, cdiv

# Row of the page offsets that stands for "nothing kept yet".
EMPTY_SLOT = 0


@dataclass
class DeviceRequest:
    """One request that is, or is to be, compressed.

    Attributes:
        prompt: what is collected until compaction.
        slot: row of the worker's page offsets; `EMPTY_SLOT` before compaction.
    """

    prompt: PromptCompaction
    slot: int = EMPTY_SLOT

    @property
    def geometry(self) -> RequestGeometry:
        """Of the request."""
        return self.prompt.geometry


class DeviceRequests:
    """The worker's requests, by request id, and the rows that they have of its page offsets.

    Args:
        geometry: of all requests.
        num_layers: L.
        max_num_reqs: requests that can run at once; rows 1 to this number are given out.
    """

    def __init__(self, geometry: Geometry, num_layers: int, max_num_reqs: int) -> None:
        self.geometry = geometry
        self._num_layers = num_layers
        self._requests: dict[str, DeviceRequest] = {}
        self._free_slots = list(range(max_num_reqs, EMPTY_SLOT, -1))

    def __len__(self) -> int:
        return len(self._requests)

    def get_or_create(self, request_id: str, prompt_len: int) -> DeviceRequest:
        """A request, new if it is unknown or its prompt length has changed."""
        request = self._requests.get(request_id)
        geometry = self.geometry.of(prompt_len)
        if request is None or request.geometry != geometry:
            self.forget(request_id)
            request = DeviceRequest(PromptCompaction(geometry, self._num_layers))
            self._requests[request_id] = request
        return request

    def take_slot(self, request: DeviceRequest) -> int:
        """The request's row of the page offsets, from now on."""
        if request.slot == EMPTY_SLOT:
            request.slot = self._free_slots.pop()
        return request.slot

    def forget(self, request_id: str) -> None:
        """Drop a finished or preempted request; unknown ids are fine."""
        request = self._requests.pop(request_id, None)
        if request is not None and request.slot != EMPTY_SLOT:
            self._free_slots.append(request.slot)


@dataclass(frozen=True)
class PromptChunk:
    """Tokens of a step whose queries have a say in what their prompt keeps.

    Attributes:
        request_id: vLLM's internal id.
        request: its state; its prompt collects queries and scores.
        row: number of the row.
        token_start, token_end: the tokens to collect, in the step's flat token order.
        first: position in the prompt of the token at `token_start`.
        finishes: whether the last token before the compaction point is among them.
        is_one_shot: whether the prompt has no blocks for what it evicts; then this is all of it.
    """

    request_id: str
    request: DeviceRequest
    row: int
    token_start: int
    token_end: int
    first: int
    finishes: bool
    is_one_shot: bool = False

    def whole_window(self, window: int) -> slice | None:
        """Tokens of the scoring window, if the step has all of them."""
        start = self.token_end - window
        return slice(start, self.token_end) if start >= self.token_start else None


@dataclass(frozen=True)
class ExtendedRow:
    """A row of several tokens over a region: a suffix, or what a resumed request had generated.

    Attributes:
        row: its number.
        token_start: its first token.
        query_len, seq_len: tokens of this step, and in all.
    """

    row: int
    token_start: int
    query_len: int
    seq_len: int


@dataclass
class StepPlan:
    """How each row of a step is to be attended.

    Attributes:
        numbers: [4, R] int32: per row the region's blocks, the boundary block, the first kept
            block and the row of the page offsets; all 0 for a row without a region.
        num_single: rows at the front that have one token each.
        has_regions: whether any row owns a region.
        extended: rows behind those that are compressed.
        cut: rows behind those that are still dense but own a region already, with its geometry.
        one_shot: rows behind those whose prompts have no blocks for what they evict, with the
            tokens that get no slot.
        chunks: tokens to collect.
        finished_dense: (request id, prompt length) of prompts that end here and stay whole.
    """

    numbers: np.ndarray
    num_single: int = 0
    has_regions: bool = False
    extended: list[ExtendedRow] = field(default_factory=list)
    cut: list[tuple[int, int, RequestGeometry]] = field(default_factory=list)
    one_shot: dict[int, slice] = field(default_factory=dict)
    chunks: list[PromptChunk] = field(default_factory=list)
    finished_dense: list[tuple[str, int]] = field(default_factory=list)


def plan_step(
    requests: DeviceRequests,
    window: int,
    request_ids: Sequence[str],
    prompt_lens: np.ndarray,
    query_start_loc: np.ndarray,
    seq_lens: np.ndarray,
    collect_all: bool = False,
    one_shot_ids: Container[str] = (),
) -> StepPlan:
    """Tell the rows of a step apart.

    Args:
        requests: of the worker; new ones are added.
        window: tokens of the scoring window.
        request_ids, prompt_lens: per row. A CUDA graph may have more rows, without a request.
        query_start_loc: [R + 1] first token of each row.
        seq_lens: [R] tokens of each row after this step.
        collect_all: collect all prompt tokens, not the window's only.
        one_shot_ids: requests that begin in this step and have no blocks for what they evict.

    Raises:
        RuntimeError: if a row goes on behind a compaction that has not happened here, a token
            to collect is alone in its step, or a one-shot prompt is not whole.
    """
    num_rows = len(query_start_loc) - 1
    plan = StepPlan(np.zeros((4, num_rows), np.int32))
    starts = query_start_loc.tolist()
    query_lens = np.diff(query_start_loc)
    longer = np.flatnonzero(query_lens > 1)
    plan.num_single = int(longer[0]) if len(longer) else num_rows
    for row, request_id in enumerate(request_ids):
        prompt_len, seq_len = int(prompt_lens[row]), int(seq_lens[row])
        geometry = requests.geometry.of(prompt_len)
        compact_len = geometry.compact_len
        num_computed = seq_len - (starts[row + 1] - starts[row])
        finishes = num_computed < compact_len <= seq_len
        if not geometry.is_compressed:
            if finishes:
                plan.finished_dense.append((request_id, prompt_len))
            continue
        request = requests.get_or_create(request_id, prompt_len)
        is_compacted = num_computed >= compact_len
        if is_compacted and request.slot == EMPTY_SLOT:
            raise RuntimeError(
                f"request {request_id} goes on at {num_computed} of {compact_len} tokens "
                "but was never compacted here"
            )
        if geometry.num_row_blocks(seq_len) > cdiv(seq_len, geometry.block_size):
            plan.has_regions = True
            plan.numbers[:, row] = (
                geometry.num_region_blocks,
                geometry.boundary_block,
                geometry.first_kept_block if is_compacted else 0,
                request.slot,
            )
            if row >= plan.num_single and not is_compacted and request_id not in one_shot_ids:
                plan.cut.append((row, seq_len, geometry))
        if is_compacted:
            if row >= plan.num_single:
                length = starts[row + 1] - starts[row]
                plan.extended.append(ExtendedRow(row, starts[row], length, seq_len))
            continue
        is_one_shot = request_id in one_shot_ids
        if is_one_shot:
            if num_computed or seq_len != compact_len:
                raise RuntimeError(
                    f"request {request_id} has no blocks for what it evicts, but computes tokens "
                    f"{num_computed} to {seq_len} of {compact_len}"
                )
            evicted = geometry.num_candidate_tokens
            plan.one_shot[row] = slice(starts[row], starts[row] + evicted)
        first = num_computed if collect_all else max(num_computed, compact_len - window)
        last = min(seq_len, compact_len)
        if first < last:
            if row < plan.num_single:
                # A captured graph would not show us its query.
                raise RuntimeError(
                    f"request {request_id} computes a single token of its scoring window, token "
                    f"{num_computed} of {compact_len}; the scheduler should not have cut it so"
                )
            offset = starts[row] - num_computed
            plan.chunks.append(
                PromptChunk(
                    request_id,
                    request,
                    row,
                    offset + first,
                    offset + last,
                    first,
                    finishes,
                    is_one_shot,
                )
            )
    return plan


def prompt_runs(plan: StepPlan) -> list[tuple[int, int, bool]]:
    """Rows of several tokens as (first row, end, whether they are one-shot), in order."""
    runs: list[tuple[int, int, bool]] = []
    for row in range(plan.num_single, plan.numbers.shape[1]):
        is_one_shot = row in plan.one_shot
        if runs and runs[-1][2] == is_one_shot:
            runs[-1] = (runs[-1][0], row + 1, is_one_shot)
        else:
            runs.append((row, row + 1, is_one_shot))
    return runs
