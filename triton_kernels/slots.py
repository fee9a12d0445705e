"""Where a step's new tokens go behind a region."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .paging import (
    ROW_BOUNDARY_BLOCK,
    ROW_NUM_REGION_BLOCKS,
    ROW_REGION_COLUMN,
    ROW_SEQ_LEN,
    ROW_WIDTH,
    Row,
    row_column,
)

_TOKENS_PER_PROGRAM = 128


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "table_stride"])
def _token_slots_kernel(
    slots_ptr,
    rows_ptr,
    table_ptr,
    query_start_ptr,
    num_rows,
    num_tokens,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    # A token's request is the number of those that end at or before it.
    request = tl.zeros([TILE], tl.int32)
    for first in range(0, num_rows, TILE_ROWS):
        r = first + tl.arange(0, TILE_ROWS)
        ends = tl.load(query_start_ptr + 1 + r, mask=r < num_rows, other=2147483647)
        request += tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), axis=1)
    is_used = (token < num_tokens) & (request < num_rows)
    row_ptr = rows_ptr + request * ROW_WIDTH
    row = Row(
        table_ptr + request.to(tl.int64) * table_stride,
        tl.load(row_ptr + ROW_SEQ_LEN, mask=is_used, other=0),
        tl.load(row_ptr + ROW_NUM_REGION_BLOCKS, mask=is_used, other=0),
        tl.load(row_ptr + ROW_REGION_COLUMN, mask=is_used, other=0),
        tl.load(row_ptr + ROW_BOUNDARY_BLOCK, mask=is_used, other=0),
    )
    query_end = tl.load(query_start_ptr + 1 + request, mask=is_used, other=0)
    position = row.seq_len - (query_end - token)
    column = row_column(position // BLOCK_SIZE, row)
    block = tl.load(row.table_ptr + column, mask=is_used, other=0).to(tl.int64)
    slot = tl.where(is_used, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(slots_ptr + token, slot, mask=token < num_tokens)


def token_slots(
    rows: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    slots: torch.Tensor,
    *,
    block_size: int,
) -> None:
    """See `ops.token_slots`."""
    num_tokens, num_rows = slots.shape[0], rows.shape[0]
    if num_tokens == 0:
        return
    _token_slots_kernel[(triton.cdiv(num_tokens, _TOKENS_PER_PROGRAM),)](
        slots,
        rows,
        block_table,
        query_start_loc,
        num_rows,
        num_tokens,
        block_table.stride(0),
        BLOCK_SIZE=block_size,
        TILE=_TOKENS_PER_PROGRAM,
        TILE_ROWS=32,
        num_warps=4,
    )
