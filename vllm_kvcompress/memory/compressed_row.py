"""The state of one request's row in full: for scheduler, worker, and whoever asks from outside."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_kvcompress.memory.geometry import RequestGeometry
from vllm_kvcompress.memory.row_layout import CompactionPoint, RowLayout

VERSION = 1
_KEYS = {"version", "prompt_len", "block_size", "state", "points", "page_counts"}


class RowState(enum.Enum):
    """What has become of a row. Values are those of `CompressedRow.to_dict`."""

    # It is never compacted, and exactly stock vLLM's.
    WHOLE = "whole"
    # It is to be compacted, and has blocks for all of its tokens.
    DENSE = "dense"
    # It is to be compacted, and has null blocks for what it will evict.
    ONE_SHOT = "one-shot"
    # It has been compacted once or more.
    COMPACTED = "compacted"


@dataclass(frozen=True)
class CompressedRow:
    """The state of one request's row. It does not change; what happens to it gives another one.

    Attributes:
        prompt_len: tokens in the prompt.
        block_size: tokens per block (= per page).
        state: what has become of it.
        layout: its compactions so far.
        page_counts: pages of every stream in the newest region, in the order of layers, then KV
            heads of one rank; None = not known here.

    Raises:
        ValueError: if the parts contradict each other.
    """

    prompt_len: int
    block_size: int
    state: RowState
    layout: RowLayout = field(default_factory=RowLayout)
    page_counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.prompt_len < 1 or self.block_size < 1:
            raise ValueError(
                f"a row has at least one token and blocks of one: prompt_len {self.prompt_len}, "
                f"block_size {self.block_size}"
            )
        if self.is_compacted != bool(self.layout.points):
            raise ValueError(
                f"a row of {len(self.layout.points)} compactions cannot be {self.state.value!r}"
            )
        if self.page_counts is None:
            return
        if not self.is_compacted:
            raise ValueError(f"a row that is {self.state.value!r} has no pages of streams")
        num_pages = self.layout.points[-1].region_blocks * len(self.page_counts)
        if min(self.page_counts, default=-1) < 0 or sum(self.page_counts) != num_pages:
            raise ValueError(
                f"{len(self.page_counts)} streams fill a region of "
                f"{self.layout.points[-1].region_blocks} blocks with {num_pages} pages, not with "
                f"{sum(self.page_counts)}; least of a stream {min(self.page_counts, default=None)}"
            )

    @classmethod
    def begin(cls, geometry: RequestGeometry, is_one_shot: bool = False) -> CompressedRow:
        """The row of a request that has not been compacted yet.

        Args:
            geometry: of the request.
            is_one_shot: whether it has no blocks for what it will evict.

        Raises:
            ValueError: if it is one-shot but nothing of it is evicted.
        """
        state = RowState.ONE_SHOT if is_one_shot else RowState.DENSE
        if not geometry.is_compressed:
            if is_one_shot:
                raise ValueError(f"a prompt of {geometry.prompt_len} tokens evicts nothing")
            state = RowState.WHOLE
        return cls(geometry.prompt_len, geometry.block_size, state)

    @property
    def is_one_shot(self) -> bool:
        """Whether it waits for its compaction with null blocks for what it will evict."""
        return self.state is RowState.ONE_SHOT

    @property
    def is_compacted(self) -> bool:
        """Whether it has a region that is filled."""
        return self.state is RowState.COMPACTED

    def compacted(self, point: CompactionPoint) -> CompressedRow:
        """The row after one more compaction, whose pages are not known yet.

        Raises:
            ValueError: if the row stays whole, or the point is not behind the others.
        """
        if self.state is RowState.WHOLE:
            raise ValueError("a row that stays whole is never compacted")
        layout = RowLayout((*self.layout.points, point))
        return replace(self, state=RowState.COMPACTED, layout=layout, page_counts=None)

    def with_page_counts(self, page_counts: Sequence[int]) -> CompressedRow:
        """The row with the pages of every stream in its newest region.

        Raises:
            ValueError: if they do not fill the region.
        """
        return replace(self, page_counts=tuple(page_counts))

    def to_dict(self) -> dict[str, Any]:
        """The state in plain JSON types, which `from_dict` reads back to an equal object."""
        return {
            "version": VERSION,
            "prompt_len": self.prompt_len,
            "block_size": self.block_size,
            "state": self.state.value,
            "points": [point._asdict() for point in self.layout.points],
            "page_counts": None if self.page_counts is None else list(self.page_counts),
        }

    @classmethod
    def from_dict(cls, raw: Any) -> CompressedRow:
        """The state that `to_dict` wrote.

        Raises:
            ValueError: if it is of another version, not complete, of wrong types, or contradicts
                itself.
        """
        # The keys of another version mean nothing here.
        version = raw.get("version") if isinstance(raw, Mapping) else VERSION
        if version != VERSION or isinstance(version, bool):
            raise ValueError(f"a row of version {version!r}; only {VERSION} can be read")
        fields = _fields(raw, _KEYS, "a row")
        names = [state.value for state in RowState]
        if fields["state"] not in names:
            raise ValueError(f"a row is one of {', '.join(names)}, not {fields['state']!r}")
        points, counts = fields["points"], fields["page_counts"]
        if not isinstance(points, list) or not isinstance(counts, list | None):
            raise ValueError(f"points and page_counts are lists, not {points!r} and {counts!r}")
        return cls(
            _number(fields["prompt_len"]),
            _number(fields["block_size"]),
            RowState(fields["state"]),
            RowLayout(tuple(map(_point, points))),
            None if counts is None else tuple(map(_number, counts)),
        )


def _fields(raw: Any, keys: set[str], what: str) -> Mapping[str, Any]:
    """A mapping with just these keys."""
    if not isinstance(raw, Mapping):
        raise ValueError(f"{what} is a mapping, not {raw!r}")
    if set(raw) != keys:
        raise ValueError(f"{what} has {', '.join(sorted(keys))}, not {sorted(map(str, raw))}")
    return raw


def _point(raw: Any) -> CompactionPoint:
    fields = _fields(raw, set(CompactionPoint._fields), "a compaction point")
    return CompactionPoint(**{name: _number(value) for name, value in fields.items()})


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"a row's numbers are whole, not {value!r}")
    return value
