"""Worker side on a GPU: what a step's rows are to us, told on the host from host numbers alone."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_kvcompress.compaction import PromptCompaction
from vllm_kvcompress.memory import Geometry, RequestGeometry

# Row of the page offsets that stands for "nothing kept yet".
EMPTY_SLOT = 0

# What is kept of every request. The first four are a row's numbers in a `StepPlan`.
_REGION_BLOCKS, _BOUNDARY_BLOCK, _FIRST_KEPT_BLOCK, _SLOT = range(4)
_COMPACT_LEN, _REGION_FROM, _PROMPT_LEN, _NUM_FIELDS = range(4, 8)
# Tokens from which on a request that stays whole has a region.
_NEVER = np.iinfo(np.int32).max


@dataclass
class DeviceRequest:
    """One request that is, or is to be, compressed.

    Attributes:
        prompt: what is collected until compaction.
        place: its column of the arrays of all requests.
        slot: row of the worker's page offsets; `EMPTY_SLOT` before compaction.
    """

    prompt: PromptCompaction
    place: int
    slot: int = EMPTY_SLOT

    @property
    def geometry(self) -> RequestGeometry:
        """Of the request."""
        return self.prompt.geometry


class DeviceRequests:
    """The worker's requests, by request id, and the rows that they have of its page offsets.

    What a step must know of every row is constant as long as its request is known. It lies in
    arrays, so that a step gathers it for all rows at once.

    Args:
        geometry: of all requests.
        num_layers: L.
        max_num_reqs: requests that can run at once; rows 1 to this number are given out.
    """

    def __init__(self, geometry: Geometry, num_layers: int, max_num_reqs: int) -> None:
        self.geometry = geometry
        # Of the step at hand, those that are never compressed.
        self.whole_ids: Container[str] = ()
        self._num_layers = num_layers
        self._places: dict[str, int] = {}
        # By place. Requests that stay whole have none.
        self._requests: list[DeviceRequest | None] = [None] * max_num_reqs
        self._fields = np.zeros((_NUM_FIELDS, max_num_reqs), np.int32)
        self._free_places = list(range(max_num_reqs))
        self._free_slots = list(range(max_num_reqs, EMPTY_SLOT, -1))

    def __len__(self) -> int:
        return len(self._places)

    def gather(self, request_ids: Sequence[str], prompt_lens: np.ndarray) -> np.ndarray:
        """[fields, R] int32 of a step's requests, in the order of `_REGION_BLOCKS` and so on.

        A request is new if it is unknown or its prompt length has changed.
        """
        found = map(self._places.get, request_ids, itertools.repeat(-1))
        places = np.fromiter(found, np.intp, len(request_ids))
        is_new = (places < 0) | (self._fields[_PROMPT_LEN, places] != prompt_lens)
        for row in np.flatnonzero(is_new).tolist():
            places[row] = self._add(request_ids[row], int(prompt_lens[row]))
        return self._fields[:, places]

    def get_or_create(self, request_id: str, prompt_len: int) -> DeviceRequest:
        """A compressed request, new if it is unknown or its prompt length has changed."""
        place = self._places.get(request_id)
        if place is None or self._fields[_PROMPT_LEN, place] != prompt_len:
            place = self._add(request_id, prompt_len)
        request = self._requests[place]
        assert request is not None, f"request {request_id} of {prompt_len} tokens stays whole"
        return request

    def _add(self, request_id: str, prompt_len: int) -> int:
        """The place of a new request."""
        self.forget(request_id)
        if not self._free_places:
            self._grow()
        place = self._places[request_id] = self._free_places.pop()
        geometry = self.geometry.of_request(prompt_len, request_id in self.whole_ids)
        region_from = _NEVER
        if geometry.is_compressed:
            prompt = PromptCompaction(geometry, self._num_layers)
            self._requests[place] = DeviceRequest(prompt, place)
            region_from = geometry.region_from_tokens
        self._fields[:, place] = (
            geometry.num_region_blocks,
            geometry.boundary_block,
            geometry.first_kept_block,
            EMPTY_SLOT,
            geometry.compact_len,
            region_from,
            prompt_len,
        )
        return place

    def _grow(self) -> None:
        # Known requests may be more than those that run: vLLM tells late of some that have left.
        size = self._fields.shape[1]
        self._fields = np.concatenate([self._fields, np.zeros_like(self._fields)], axis=1)
        self._requests += [None] * size
        self._free_places += range(size, 2 * size)

    def take_slot(self, request: DeviceRequest) -> int:
        """The request's row of the page offsets, from now on."""
        if request.slot == EMPTY_SLOT:
            request.slot = self._free_slots.pop()
            self._fields[_SLOT, request.place] = request.slot
        return request.slot

    def forget(self, request_id: str) -> None:
        """Drop a finished or preempted request; unknown ids are fine."""
        place = self._places.pop(request_id, None)
        if place is None:
            return
        request, self._requests[place] = self._requests[place], None
        self._free_places.append(place)
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
        query_lens: [R] tokens of each row in this step.
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
    query_lens: np.ndarray
    num_single: int
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
    num_rows, num_named = len(query_start_loc) - 1, len(request_ids)
    query_lens = np.diff(query_start_loc)
    longer = np.flatnonzero(query_lens > 1)
    num_single = int(longer[0]) if len(longer) else num_rows
    plan = StepPlan(np.zeros((4, num_rows), np.int32), query_lens, num_single)
    if not num_named:
        return plan
    fields = requests.gather(request_ids, prompt_lens)
    compact_lens, seq_lens = fields[_COMPACT_LEN], seq_lens[:num_named]
    num_computed = seq_lens - query_lens[:num_named]
    is_compressed = fields[_REGION_BLOCKS] > 0
    is_past = num_computed >= compact_lens
    has_region = seq_lens >= fields[_REGION_FROM]
    plan.has_regions = bool(has_region.any())
    numbers = plan.numbers[:, :num_named]
    np.multiply(fields[:4], has_region, out=numbers)
    numbers[_FIRST_KEPT_BLOCK] *= is_past
    # All others decode, or wait for the rest of a prompt that stays whole.
    is_special = np.where(
        is_compressed,
        ~is_past | (fields[_SLOT] == EMPTY_SLOT),
        ~is_past & (seq_lens >= compact_lens),
    )
    is_special[num_single:] |= is_compressed[num_single:]
    for row in np.flatnonzero(is_special).tolist():
        request_id, prompt_len = request_ids[row], int(prompt_lens[row])
        if not is_compressed[row]:
            plan.finished_dense.append((request_id, prompt_len))
            continue
        request = requests.get_or_create(request_id, prompt_len)
        start, seq_len = int(query_start_loc[row]), int(seq_lens[row])
        if is_past[row]:
            _plan_compacted(plan, request_id, request, row, start, seq_len)
            continue
        is_one_shot = request_id in one_shot_ids
        if has_region[row] and row >= num_single and not is_one_shot:
            plan.cut.append((row, seq_len, request.geometry))
        first = 0 if collect_all else request.geometry.compact_len - window
        _plan_prompt(plan, request_id, request, row, start, seq_len, first, is_one_shot)
    return plan


def _plan_compacted(
    plan: StepPlan, request_id: str, request: DeviceRequest, row: int, start: int, seq_len: int
) -> None:
    """A row behind its compaction point, unless it is a single token of a compacted request."""
    query_len = int(plan.query_lens[row])
    if request.slot == EMPTY_SLOT:
        raise RuntimeError(
            f"request {request_id} goes on at {seq_len - query_len} of "
            f"{request.geometry.compact_len} tokens but was never compacted here"
        )
    plan.extended.append(ExtendedRow(row, start, query_len, seq_len))


def _plan_prompt(
    plan: StepPlan,
    request_id: str,
    request: DeviceRequest,
    row: int,
    start: int,
    seq_len: int,
    first_collected: int,
    is_one_shot: bool,
) -> None:
    """A row before its compaction point: what of it is to be collected, and what gets no slot."""
    compact_len = request.geometry.compact_len
    num_computed = seq_len - int(plan.query_lens[row])
    if is_one_shot:
        if num_computed or seq_len != compact_len:
            raise RuntimeError(
                f"request {request_id} has no blocks for what it evicts, but computes tokens "
                f"{num_computed} to {seq_len} of {compact_len}"
            )
        plan.one_shot[row] = slice(start, start + request.geometry.num_candidate_tokens)
    first, last = max(num_computed, first_collected), min(seq_len, compact_len)
    if first >= last:
        return
    if row < plan.num_single:
        # A captured graph would not show us its query.
        raise RuntimeError(
            f"request {request_id} computes a single token of its scoring window, token "
            f"{num_computed} of {compact_len}; the scheduler should not have cut it so"
        )
    offset = start - num_computed
    plan.chunks.append(
        PromptChunk(
            request_id,
            request,
            row,
            offset + first,
            offset + last,
            first,
            seq_len >= compact_len,
            is_one_shot,
        )
    )


def prompt_runs(plan: StepPlan) -> list[tuple[int, int, bool]]:
    """Rows that the stock backend attends as (first row, end, whether they are one-shot).

    They are those behind the single ones, in order, but for compressed ones.
    """
    runs: list[tuple[int, int, bool]] = []
    extended = {row.row for row in plan.extended}
    for row in range(plan.num_single, plan.numbers.shape[1]):
        if row in extended:
            continue
        is_one_shot = row in plan.one_shot
        if runs and runs[-1][1:] == (row, is_one_shot):
            runs[-1] = (runs[-1][0], row + 1, is_one_shot)
        else:
            runs.append((row, row + 1, is_one_shot))
    # Padding has no tokens.
    return [run for run in runs if plan.query_lens[run[0] : run[1]].any()]
