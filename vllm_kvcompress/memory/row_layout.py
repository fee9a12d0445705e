"""Where the blocks of a request stand in its block-table row, after any number of compactions.

A row only grows at its end. So the region of a compaction goes behind the blocks it was made
from, and what it replaces becomes null blocks::

    [prompt] [region 0] [tail 0] [region 1] [tail 1] ...

A token block of number j stands at column j plus the sizes of all regions whose compaction point
lies at or before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm_kvcompress.row_descriptor import RowDescriptor


class CompactionPoint(NamedTuple):
    """One compaction of a request.

    Attributes:
        boundary_block: token block from which on blocks lie behind this compaction's region.
        region_blocks: blocks of the region.
        first_kept_block: token block from which on tokens stay dense; those before it were
            evicted or are in the region.
    """

    boundary_block: int
    region_blocks: int
    first_kept_block: int


@dataclass(frozen=True)
class RowLayout:
    """Columns of one request's block-table row.

    Args:
        points: its compactions so far, in order; none for a dense row.

    Raises:
        ValueError: on points that are not in order, or that a row descriptor cannot tell apart:
            the dense blocks before a region must all lie behind the region before it.
    """

    points: tuple[CompactionPoint, ...] = ()

    def __post_init__(self) -> None:
        first_dense = 0
        for point in self.points:
            if point.region_blocks < 1:
                raise ValueError(f"a region has one block at least: {point}")
            if not first_dense <= point.first_kept_block <= point.boundary_block:
                raise ValueError(
                    f"dense blocks must start between block {first_dense} and the boundary: {point}"
                )
            first_dense = point.boundary_block

    @property
    def num_region_blocks(self) -> int:
        """Blocks of all regions."""
        return sum(point.region_blocks for point in self.points)

    def column_of(self, block: int) -> int:
        """Column of a token block, whether it is still there or not."""
        return block + sum(p.region_blocks for p in self.points if p.boundary_block <= block)

    @property
    def region_column(self) -> int:
        """First column of the newest region; 0 where there is none."""
        if not self.points:
            return 0
        newest = self.points[-1]
        return self.column_of(newest.boundary_block) - newest.region_blocks

    def descriptor(self, seq_len: int) -> RowDescriptor:
        """What kernels are told of the row when it has so many tokens."""
        if not self.points:
            return RowDescriptor(seq_len)
        newest = self.points[-1]
        return RowDescriptor(
            seq_len=seq_len,
            num_region_blocks=newest.region_blocks,
            region_column=self.region_column,
            boundary_block=newest.boundary_block,
            first_kept_block=newest.first_kept_block,
        )
