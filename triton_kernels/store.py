"""Where a step's new tokens go behind a region, and putting them there."""

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
    cast,
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
    # A token's row is the number of rows that end at or before it.
    row = tl.zeros([TILE], tl.int32)
    for first in range(0, num_rows, TILE_ROWS):
        r = first + tl.arange(0, TILE_ROWS)
        ends = tl.load(query_start_ptr + 1 + r, mask=r < num_rows, other=2147483647)
        row += tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), axis=1)
    is_used = (token < num_tokens) & (row < num_rows)
    row_ptr = rows_ptr + row * ROW_WIDTH
    seq_len = tl.load(row_ptr + ROW_SEQ_LEN, mask=is_used, other=0)
    num_region_blocks = tl.load(row_ptr + ROW_NUM_REGION_BLOCKS, mask=is_used, other=0)
    region_column = tl.load(row_ptr + ROW_REGION_COLUMN, mask=is_used, other=0)
    boundary_block = tl.load(row_ptr + ROW_BOUNDARY_BLOCK, mask=is_used, other=0)
    query_end = tl.load(query_start_ptr + 1 + row, mask=is_used, other=0)
    position = seq_len - (query_end - token)
    column = row_column(position // BLOCK_SIZE, num_region_blocks, region_column, boundary_block)
    entry = row.to(tl.int64) * table_stride + column
    block = tl.load(table_ptr + entry, mask=is_used, other=0).to(tl.int64)
    slot = tl.where(is_used, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(slots_ptr + token, slot, mask=token < num_tokens)


def token_slots(
    rows: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    block_size: int,
    slots: torch.Tensor,
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


@triton.jit(do_not_specialize=["layer"])
def _store_tokens_kernel(
    key_ptr,
    value_ptr,
    pool_ptr,
    slots_ptr,
    key_scale_ptr,
    value_scale_ptr,
    layer,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    head = tl.arange(0, TILE_H)
    dim = tl.arange(0, TILE_D)
    mask = (head < NUM_KV_HEADS)[:, None] & (dim < HEAD_SIZE)[None, :]
    stream = layer * NUM_KV_HEADS + head
    page = slot // BLOCK_SIZE * PAGES_PER_BLOCK + stream
    entry = (page * BLOCK_SIZE + slot % BLOCK_SIZE) * (2 * HEAD_SIZE)
    pool_ptrs = pool_ptr + entry[:, None] + dim[None, :]
    key_ptrs = key_ptr + token * key_stride_token + head[:, None] * key_stride_head + dim[None, :]
    value_ptrs = (
        value_ptr + token * value_stride_token + head[:, None] * value_stride_head + dim[None, :]
    )
    key = tl.load(key_ptrs, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(value_ptrs, mask=mask, other=0.0).to(tl.float32)
    key_scale = tl.load(key_scale_ptr + stream, mask=head < NUM_KV_HEADS, other=1.0)
    value_scale = tl.load(value_scale_ptr + stream, mask=head < NUM_KV_HEADS, other=1.0)
    # Rounded as IEEE says; `/` is not.
    key = tl.div_rn(key, key_scale[:, None])
    value = tl.div_rn(value, value_scale[:, None])
    if LARGEST > 0:
        key = tl.clamp(key, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        value = tl.clamp(value, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(pool_ptrs, cast(key, pool_ptr.dtype.element_ty), mask=mask)
    tl.store(pool_ptrs + HEAD_SIZE, cast(value, pool_ptr.dtype.element_ty), mask=mask)


def store_tokens(
    key: torch.Tensor,
    value: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    layer: int,
    num_layers: int,
) -> None:
    """See `ops.store_tokens`."""
    num_tokens, num_heads, head_size = key.shape
    if num_tokens == 0:
        return
    tile_h, tile_d = triton.next_power_of_2(num_heads), triton.next_power_of_2(head_size)
    _store_tokens_kernel[(num_tokens,)](
        key,
        value,
        pool,
        slots,
        key_scale,
        value_scale,
        layer,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        NUM_KV_HEADS=num_heads,
        PAGES_PER_BLOCK=num_layers * num_heads,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=pool.shape[1],
        LARGEST=torch.finfo(pool.dtype).max if pool.element_size() == 1 else 0.0,
        TILE_H=tile_h,
        TILE_D=tile_d,
        num_warps=4 if tile_h * tile_d > 512 else 1,
    )
