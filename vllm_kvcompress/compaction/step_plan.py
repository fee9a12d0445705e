"""What each row of a step is, told on the host from host numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_kvcompress.compaction.requests import (
    COMPACT_LEN,
    FIRST_KEPT_BLOCK,
    NO_OFFSETS,
    OFFSETS_ROW,
    REGION_BLOCKS,
    REGION_FROM,
    CompressedRequest,
    Requests,
)
from vllm_kvcompress.memory import RequestGeometry


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
    request: CompressedRequest
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
        request_ids: of the rows; a CUDA graph's padding has none.
        numbers: [5, R] int32: per row its `RowDescriptor` without the length, and the row of the
            page offsets; all 0 for a row without a region.
        query_lens: [R] tokens of each row in this step.
        is_compacted: [R] whether a row's prompt has been compacted before this step.
        num_single: rows at the front that have one token each.
        has_regions: whether any row owns a region.
        extended: rows behind those that are compacted.
        cut: rows that are still dense but own a region already: number, tokens, geometry.
        one_shot: rows whose prompts have no blocks for what they evict, with the tokens that get
            no slot.
        chunks: tokens to collect.
        finished_whole: (request id, prompt length) of prompts that end here and stay whole.
    """

    request_ids: Sequence[str]
    numbers: np.ndarray
    query_lens: np.ndarray
    is_compacted: np.ndarray
    num_single: int
    has_regions: bool = False
    extended: list[ExtendedRow] = field(default_factory=list)
    cut: list[tuple[int, int, RequestGeometry]] = field(default_factory=list)
    one_shot: dict[int, slice] = field(default_factory=dict)
    chunks: list[PromptChunk] = field(default_factory=list)
    finished_whole: list[tuple[str, int]] = field(default_factory=list)


def plan_step(
    requests: Requests,
    window: int,
    request_ids: Sequence[str],
    prompt_lens: np.ndarray,
    query_start_loc: np.ndarray,
    seq_lens: np.ndarray,
    collect_all: bool = False,
    shows_single: bool = False,
) -> StepPlan:
    """Tell the rows of a step apart.

    Args:
        requests: of the worker; new ones are added.
        window: tokens of the scoring window.
        request_ids, prompt_lens: per row. A CUDA graph may have more rows, without a request.
        query_start_loc: [R + 1] first token of each row.
        seq_lens: [R] tokens of each row after this step.
        collect_all: collect all prompt tokens, not the window's only.
        shows_single: whether queries of single rows can be collected, which a captured graph
            would not show.

    Raises:
        RuntimeError: if a row goes on behind a compaction that has not happened here, a token
            to collect is in a single row that does not show it, or a one-shot prompt is not whole.
    """
    num_rows, num_named = len(query_start_loc) - 1, len(request_ids)
    query_lens = np.diff(query_start_loc)
    longer = np.flatnonzero(query_lens > 1)
    num_single = int(longer[0]) if len(longer) else num_rows
    plan = StepPlan(
        request_ids,
        np.zeros((5, num_rows), np.int32),
        query_lens,
        np.zeros(num_rows, bool),
        num_single,
    )
    if not num_named:
        return plan
    fields = requests.gather(request_ids, prompt_lens)
    compact_lens, seq_lens = fields[COMPACT_LEN], seq_lens[:num_named]
    num_computed = seq_lens - query_lens[:num_named]
    is_compressed = fields[REGION_BLOCKS] > 0
    is_past = num_computed >= compact_lens
    has_region = seq_lens >= fields[REGION_FROM]
    plan.has_regions = bool(has_region.any())
    np.logical_and(is_compressed, is_past, out=plan.is_compacted[:num_named])
    numbers = plan.numbers[:, :num_named]
    np.multiply(fields[:5], has_region, out=numbers)
    numbers[FIRST_KEPT_BLOCK] *= is_past
    # All others decode, or wait for the rest of a prompt that stays whole.
    is_special = np.where(
        is_compressed,
        ~is_past | (fields[OFFSETS_ROW] == NO_OFFSETS),
        ~is_past & (seq_lens >= compact_lens),
    )
    is_special[num_single:] |= is_compressed[num_single:]
    for row in np.flatnonzero(is_special).tolist():
        request_id, prompt_len = request_ids[row], int(prompt_lens[row])
        if not is_compressed[row]:
            plan.finished_whole.append((request_id, prompt_len))
            continue
        request = requests.get_or_create(request_id, prompt_len)
        start, seq_len = int(query_start_loc[row]), int(seq_lens[row])
        if is_past[row]:
            _plan_compacted(plan, request_id, request, row, start, seq_len)
            continue
        is_one_shot = request.row.is_one_shot
        if has_region[row] and not is_one_shot:
            plan.cut.append((row, seq_len, request.geometry))
        chunk = _plan_prompt(
            plan,
            request_id,
            request,
            row,
            start,
            seq_len,
            first_collected=0 if collect_all else request.geometry.compact_len - window,
            is_one_shot=is_one_shot,
        )
        if chunk is not None and row < num_single and not shows_single:
            raise RuntimeError(
                f"request {request_id} computes a single token of its scoring window, token "
                f"{chunk.first} of {request.geometry.compact_len}; the scheduler should not have "
                "cut it so"
            )
    return plan


def _plan_compacted(
    plan: StepPlan, request_id: str, request: CompressedRequest, row: int, start: int, seq_len: int
) -> None:
    """A row behind its compaction point, unless it is a single token of a compacted request."""
    query_len = int(plan.query_lens[row])
    if request.offsets_row == NO_OFFSETS:
        raise RuntimeError(
            f"request {request_id} goes on at {seq_len - query_len} of "
            f"{request.geometry.compact_len} tokens but was never compacted here"
        )
    plan.extended.append(ExtendedRow(row, start, query_len, seq_len))


def _plan_prompt(
    plan: StepPlan,
    request_id: str,
    request: CompressedRequest,
    row: int,
    start: int,
    seq_len: int,
    first_collected: int,
    is_one_shot: bool,
) -> PromptChunk | None:
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
        return None
    offset = start - num_computed
    chunk = PromptChunk(
        request_id,
        request,
        row,
        offset + first,
        offset + last,
        first,
        seq_len >= compact_len,
        is_one_shot,
    )
    plan.chunks.append(chunk)
    return chunk


def prompt_runs(plan: StepPlan) -> list[tuple[int, int, bool]]:
    """Rows that the stock backend attends as (first row, end, whether they are one-shot).

    They are those behind the single ones, in order, but for compacted ones.
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
