"""Shares the tiles of a decode step equally among programs, for all layers at once.

A stream's tokens are cut into tiles. The streams of a layer lie one after another, in the order
`row * H + head`, and so do their tiles: T of them. Program p of P takes tiles
`[p * T / P, (p + 1) * T / P)`, whichever streams they belong to. So no program is empty, none is
much longer than another, and at most two of its streams are shared with other programs: the one
that it begins in the middle of and the one that it does not finish.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .paging import (
    ROW_FIRST_KEPT_BLOCK,
    ROW_NUM_REGION_BLOCKS,
    ROW_SEQ_LEN,
    ROW_WIDTH,
    StreamTokens,
)

# Streams, and programs, that are looked at together.
_TILE_STREAMS = 1024


@triton.jit
def stream_extent(row_ptr, offsets_ptr, stream, BLOCK_SIZE: tl.constexpr):
    """A stream's `StreamTokens`, of the shape of the pointers. No load waits for another."""
    seq_len = tl.load(row_ptr + ROW_SEQ_LEN)
    num_region_blocks = tl.load(row_ptr + ROW_NUM_REGION_BLOCKS)
    first_tail_block = tl.load(row_ptr + ROW_FIRST_KEPT_BLOCK)
    # Of a row without a region these may be anything.
    first_page = tl.load(offsets_ptr + stream)
    end_page = tl.load(offsets_ptr + stream + 1)
    num_region_tokens = tl.where(num_region_blocks > 0, (end_page - first_page) * BLOCK_SIZE, 0)
    num_tokens = num_region_tokens + seq_len - first_tail_block * BLOCK_SIZE
    return StreamTokens(num_region_tokens, num_tokens, first_page, first_tail_block)


@triton.jit
def num_working_programs(num_tiles, num_programs, LEAST_TILES: tl.constexpr):
    """Programs that get tiles: all, unless each would have fewer than `LEAST_TILES`."""
    return tl.minimum(num_programs, tl.cdiv(num_tiles, LEAST_TILES))


@triton.jit
def first_tile_of(program, share, extra):
    """First tile of a program, if each has `share` of them and the first `extra` one more."""
    return program * share + tl.minimum(program, extra)


@triton.jit
def program_of(tile, share, extra):
    """The program whose tiles a tile is among."""
    of_longer = extra * (share + 1)
    return tl.where(tile < of_longer, tile // (share + 1), extra + (tile - of_longer) // share)


@triton.jit(
    do_not_specialize=[
        "num_streams",
        "num_steps",
        "num_programs",
        "offsets_stride",
        "starts_stride",
    ],
    do_not_specialize_on_alignment=["offsets_ptr", "query_start_ptr", "rows_ptr"],
)
def _decode_work_kernel(
    tile_starts_ptr,
    num_tiles_ptr,
    first_streams_ptr,
    rows_ptr,
    offsets_ptr,
    query_start_ptr,
    num_streams,
    num_steps,
    num_programs,
    offsets_stride,
    starts_stride,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per layer.

    Args:
        num_streams: rows times KV heads.
        num_steps: of a binary search among them.
    """
    layer = tl.program_id(0)
    starts_ptr = tile_starts_ptr + layer.to(tl.int64) * starts_stride
    lane = tl.arange(0, TILE)
    total = tl.zeros([], tl.int32)
    for first in range(0, num_streams, TILE):
        index = first + lane
        mask = index < num_streams
        # A lane past the last stream looks at the first one again.
        index = tl.where(mask, index, 0)
        row = index // NUM_KV_HEADS
        query_start = tl.load(query_start_ptr + row)
        query_end = tl.load(query_start_ptr + row + 1)
        extent = stream_extent(
            rows_ptr + row * ROW_WIDTH,
            offsets_ptr + row.to(tl.int64) * offsets_stride,
            layer * NUM_KV_HEADS + index % NUM_KV_HEADS,
            BLOCK_SIZE,
        )
        # A captured graph has rows without a query.
        tiles = tl.where(mask & (query_end > query_start), tl.cdiv(extent.num_tokens, TILE_N), 0)
        ends = total + tl.cumsum(tiles, axis=0)
        tl.store(starts_ptr + index, ends - tiles, mask=mask)
        total += tl.sum(tiles, axis=0)
    tl.store(starts_ptr + num_streams, total)
    tl.store(num_tiles_ptr + layer, total)
    # What follows reads what other threads have written.
    tl.debug_barrier()
    working = num_working_programs(total, num_programs, LEAST_TILES)
    share = total // tl.maximum(working, 1)
    extra = total % tl.maximum(working, 1)
    for first in range(0, working, TILE):
        program = first + lane
        tile = first_tile_of(program, share, extra)
        # The last stream that starts at or before the tile; empty ones start where the next does.
        low = tl.zeros([TILE], tl.int32)
        high = tl.zeros([TILE], tl.int32) + num_streams
        for _ in range(num_steps):
            middle = (low + high) // 2
            is_before = tl.load(starts_ptr + middle) <= tile
            low = tl.where(is_before, middle, low)
            high = tl.where(is_before, high, middle)
        tl.store(first_streams_ptr + layer * num_programs + program, low, mask=program < working)


def decode_work(
    rows: torch.Tensor,
    page_offsets: torch.Tensor,
    query_start_loc: torch.Tensor,
    tile_starts: torch.Tensor,
    num_tiles: torch.Tensor,
    first_streams: torch.Tensor,
    *,
    num_kv_heads: int,
    block_size: int,
    tile_tokens: int,
    least_tiles: int,
) -> None:
    """See `ops.decode_work`."""
    num_streams = rows.shape[0] * num_kv_heads
    _decode_work_kernel[(num_tiles.shape[0],)](
        tile_starts,
        num_tiles,
        first_streams,
        rows,
        page_offsets,
        query_start_loc,
        num_streams,
        num_streams.bit_length(),
        first_streams.shape[1],
        page_offsets.stride(0),
        tile_starts.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=block_size,
        TILE_N=tile_tokens,
        LEAST_TILES=least_tiles,
        TILE=_TILE_STREAMS,
        num_warps=8,
    )
