"""The worker's requests, and what a step must know of every one, in arrays."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_kvcompress.compaction.prompts import PromptCompaction
from vllm_kvcompress.memory import CompressedRow, Geometry, RequestGeometry

# Row of the page offsets that stands for "nothing kept yet".
NO_OFFSETS = 0

# What is kept of every request. The first five are a row's numbers in a `StepPlan`; the first four
# are those of a `RowDescriptor`, in its order, without the length.
REGION_BLOCKS, REGION_COLUMN, BOUNDARY_BLOCK, FIRST_KEPT_BLOCK, OFFSETS_ROW = range(5)
COMPACT_LEN, REGION_FROM, PROMPT_LEN, _NUM_FIELDS = range(5, 9)
# Tokens from which on a request that stays whole has a region.
_NEVER = np.iinfo(np.int32).max


@dataclass(eq=False)
class CompressedRequest:
    """One request that is, or is to be, compressed.

    Attributes:
        prompt: what is collected until compaction.
        place: its column of the arrays of all requests.
        row: state of its row, without pages of streams.
        offsets_row: of the worker's page offsets; `NO_OFFSETS` before compaction.
        attention: what a platform's attention has made of its row, to be used again.
    """

    prompt: PromptCompaction
    place: int
    row: CompressedRow
    offsets_row: int = NO_OFFSETS
    attention: Any = None

    @property
    def geometry(self) -> RequestGeometry:
        """Of the request."""
        return self.prompt.geometry


class Requests:
    """The worker's requests, by request id, and the rows that they have of its page offsets.

    What a step must know of every row follows from its geometry, but for its offsets row. It lies
    in arrays, so that a step gathers it for all rows at once.

    Args:
        geometry: of all requests.
        num_layers: L.
        max_num_reqs: requests that can run at once; rows 1 to this number are given out.
    """

    def __init__(self, geometry: Geometry, num_layers: int, max_num_reqs: int) -> None:
        self.geometry = geometry
        self._num_layers = num_layers
        self._places: dict[str, int] = {}
        self._whole_ids: Container[str] = ()
        self._one_shot_ids: Container[str] = ()
        # By place, as are the fields. Requests that stay whole have none.
        self._requests: list[CompressedRequest | None] = [None] * max_num_reqs
        self._fields = np.zeros((_NUM_FIELDS, max_num_reqs), np.int32)
        self._free_places = list(range(max_num_reqs))
        self._free_offsets_rows = list(range(max_num_reqs, NO_OFFSETS, -1))

    def __len__(self) -> int:
        return len(self._places)

    def expect(self, whole_ids: Container[str] = (), one_shot_ids: Container[str] = ()) -> None:
        """Say what the scheduler tells of the next step's requests; by default, nothing.

        Args:
            whole_ids: those that are never compressed.
            one_shot_ids: those that begin and have no blocks for what they evict.
        """
        self._whole_ids, self._one_shot_ids = whole_ids, one_shot_ids

    def gather(self, request_ids: Sequence[str], prompt_lens: np.ndarray) -> np.ndarray:
        """[fields, R] int32 of a step's requests, in the order of `REGION_BLOCKS` and so on.

        A request is new if it is unknown or its prompt length has changed.
        """
        found = map(self._places.get, request_ids, itertools.repeat(-1))
        places = np.fromiter(found, np.intp, len(request_ids))
        is_new = (places < 0) | (self._fields[PROMPT_LEN, places] != prompt_lens)
        for row in np.flatnonzero(is_new).tolist():
            places[row] = self._add(request_ids[row], int(prompt_lens[row]))
        return self._fields[:, places]

    def get_or_create(self, request_id: str, prompt_len: int) -> CompressedRequest:
        """A compressed request, new if it is unknown or its prompt length has changed."""
        place = self._places.get(request_id)
        if place is None or self._fields[PROMPT_LEN, place] != prompt_len:
            place = self._add(request_id, prompt_len)
        request = self._requests[place]
        assert request is not None, f"request {request_id} of {prompt_len} tokens stays whole"
        return request

    def get(self, request_id: str) -> CompressedRequest:
        """A known request that is compressed."""
        request = self._requests[self._places[request_id]]
        assert request is not None, f"request {request_id} stays whole"
        return request

    def row(self, request_id: str) -> CompressedRow:
        """State of a known request's row, without pages of streams."""
        place = self._places[request_id]
        request = self._requests[place]
        if request is not None:
            return request.row
        prompt_len = int(self._fields[PROMPT_LEN, place])
        return CompressedRow.begin(self.geometry.of_request(prompt_len, is_whole=True))

    def ids(self) -> list[str]:
        """Of all known requests."""
        return list(self._places)

    def _add(self, request_id: str, prompt_len: int) -> int:
        """The place of a new request."""
        self.forget(request_id)
        if not self._free_places:
            self._grow()
        place = self._places[request_id] = self._free_places.pop()
        geometry = self.geometry.of_request(prompt_len, request_id in self._whole_ids)
        row = CompressedRow.begin(geometry, request_id in self._one_shot_ids)
        region_from = _NEVER
        if geometry.is_compressed:
            prompt = PromptCompaction(geometry, self._num_layers)
            self._requests[place] = CompressedRequest(prompt, place, row)
            region_from = geometry.region_from_tokens
        self._fields[:, place] = (
            # Its row has the region before it is filled.
            *geometry.layout.descriptor(0)[1:],
            NO_OFFSETS,
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

    def mark_compacted(self, request: CompressedRequest) -> int:
        """Note that a request's region is filled; gives its row of the page offsets."""
        if not request.row.is_compacted:
            if not self._free_offsets_rows:
                raise RuntimeError(f"more than {len(self)} requests are compacted at once")
            request.row = request.row.compacted(request.geometry.point)
            request.offsets_row = self._free_offsets_rows.pop()
            self._fields[OFFSETS_ROW, request.place] = request.offsets_row
        return request.offsets_row

    def forget(self, request_id: str) -> None:
        """Drop a finished or preempted request; unknown ids are fine."""
        place = self._places.pop(request_id, None)
        if place is None:
            return
        request, self._requests[place] = self._requests[place], None
        self._free_places.append(place)
        if request is not None and request.offsets_row != NO_OFFSETS:
            self._free_offsets_rows.append(request.offsets_row)
