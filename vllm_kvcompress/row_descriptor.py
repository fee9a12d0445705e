"""What a kernel is told of one row of a batch: the one place where fields and order are defined.

`triton_kernels/paging.py` and `csrc/row_fields.h` repeat the order; a test compares them. Imports
nothing, so that the scheduler and the ops may both use it.
"""

from __future__ import annotations

from typing import NamedTuple


class RowDescriptor(NamedTuple):
    """One row of a batch, as five int32 numbers in this order.

    A row that was compacted holds `[...][newest region][later blocks]`. Token blocks are numbered
    by position: block j holds tokens `[j * b, (j + 1) * b)`. All numbers but the first are 0 for a
    row without a region.

    Attributes:
        seq_len: tokens of the request, those that were evicted included.
        num_region_blocks: blocks of the newest region; 0 = there is none.
        region_column: its first column in the block-table row.
        boundary_block: token block from which on blocks lie behind the newest region.
        first_kept_block: token block from which on tokens are dense. Blocks from here up to
            `boundary_block` lie directly before the newest region.
    """

    seq_len: int
    num_region_blocks: int = 0
    region_column: int = 0
    boundary_block: int = 0
    first_kept_block: int = 0

    def column_of(self, block: int) -> int:
        """Column of a dense token block, `first_kept_block` or later."""
        column = block + self.region_column - self.boundary_block
        return column + self.num_region_blocks if block >= self.boundary_block else column


ROW_FIELDS = RowDescriptor._fields
