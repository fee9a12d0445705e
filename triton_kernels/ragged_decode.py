"""Decode attention where every (request, KV head) has its own number of kept tokens.

Persistent programs: `decode_work` says where each one's equal share of a layer's tiles begins. A
program goes through its share stream by stream. A stream that it has all of is written at once.
Of others it leaves a piece, and the last program to do so merges the stream's pieces, in their
order, so that the result does not depend on who was last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .decode_work import first_tile_of, num_working_programs, program_of, stream_extent
from .paging import (
    LOG2E,
    ROW_BOUNDARY_BLOCK,
    ROW_NUM_REGION_BLOCKS,
    ROW_REGION_COLUMN,
    ROW_WIDTH,
    cast,
    dot,
    squash,
    stream_page_ids,
)

# Elements of pieces that are merged at once, 32 per thread.
_MERGED_ELEMENTS = 4096


@triton.jit
def _with_sink(out, lse, sinks_ptr, heads, mask, HAS_SINKS: tl.constexpr):
    """Add a learned logit per head, that no value belongs to, to the softmax (base-2 lse)."""
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads, mask=mask, other=0.0).to(tl.float32) * LOG2E
        out = out / (1 + tl.exp2(sink - lse))[:, None]
    return out


@triton.jit
def _store_out(
    out_ptr,
    out,
    lse,
    sinks_ptr,
    m,
    head,
    query_start,
    query_len,
    stride_token,
    stride_head,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Write the results [m, TILE_D] of a KV head's query rows m."""
    mask = m // GROUP < query_len
    heads = head * GROUP + m % GROUP
    out = _with_sink(out, lse, sinks_ptr, heads, mask, HAS_SINKS)
    token = (query_start + m // GROUP).to(tl.int64)
    dim = tl.arange(0, TILE_D)
    ptrs = out_ptr + token[:, None] * stride_token + heads[:, None] * stride_head + dim[None, :]
    out_mask = mask[:, None] & (dim < HEAD_SIZE)[None, :]
    tl.store(ptrs, cast(out, out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _merge_pieces(
    pieces_ptr,
    lse_ptr,
    m,
    first_program,
    last_program,
    PIECE_ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE_D: tl.constexpr,
    NUM_MERGED: tl.constexpr,
):
    """([m, TILE_D] result, [m] base-2 lse) of the pieces that programs have left of a stream."""
    TILE_M: tl.constexpr = m.shape[0]
    dim = tl.arange(0, TILE_D)
    m_mask = m < PIECE_ROWS
    best = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, TILE_D], tl.float32)
    # Not to be pipelined: that would take shared memory from the loop over keys.
    for first in tl.range(first_program, last_program + 1, NUM_MERGED, num_stages=1):
        program = first + tl.arange(0, NUM_MERGED)
        place = 2 * program + tl.where(program == first_program, 1, 0)
        entry = place[:, None] * PIECE_ROWS + m[None, :]
        mask = (program <= last_program)[:, None] & m_mask[None, :]
        # From the L2 cache: other multiprocessors have written them.
        lse = tl.load(lse_ptr + entry, mask=mask, other=float("-inf"), cache_modifier=".cg")
        piece = tl.load(
            pieces_ptr + entry[:, :, None] * HEAD_SIZE + dim[None, None, :],
            mask=mask[:, :, None] & (dim < HEAD_SIZE)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_best = tl.maximum(best, tl.max(lse, axis=0))
        # A query may see none of a piece's tokens.
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(lse - base[None, :])
        decay = tl.exp2(best - base)
        total = total * decay + tl.sum(weights, axis=0)
        acc = acc * decay[:, None] + tl.sum(piece * weights[:, :, None], axis=0)
        best = new_best
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    return acc / total[:, None], tl.where(seen, best + tl.log2(total), float("-inf"))


@triton.jit(
    do_not_specialize=["layer", "num_programs", "offsets_stride", "table_stride", "starts_stride"],
    do_not_specialize_on_alignment=[
        "offsets_ptr",
        "query_start_ptr",
        "rows_ptr",
        "table_ptr",
    ],
)
def _ragged_decode_kernel(
    out_ptr,
    pieces_ptr,
    lse_ptr,
    tickets_ptr,
    tile_starts_ptr,
    num_tiles_ptr,
    first_streams_ptr,
    query_ptr,
    pool_ptr,
    rows_ptr,
    offsets_ptr,
    table_ptr,
    query_start_ptr,
    key_scale_ptr,
    value_scale_ptr,
    sinks_ptr,
    layer,
    scale,
    soft_cap,
    num_programs,
    out_stride_token,
    out_stride_head,
    query_stride_token,
    query_stride_head,
    offsets_stride,
    table_stride,
    starts_stride,
    NUM_KV_HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PIECE_ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_MERGED: tl.constexpr,
    NUM_MERGED: tl.constexpr,
):
    program = tl.program_id(0)
    num_tiles = tl.load(num_tiles_ptr + layer)
    stream = tl.load(first_streams_ptr + layer * num_programs + program)
    working = num_working_programs(num_tiles, num_programs, LEAST_TILES)
    if program >= working:
        return
    share = num_tiles // working
    extra = num_tiles % working
    tile = first_tile_of(program, share, extra)
    end_tile = first_tile_of(program + 1, share, extra)
    starts_ptr = tile_starts_ptr + layer.to(tl.int64) * starts_stride

    # Row m of a tile is query m // GROUP of the request, head m % GROUP of the group.
    m = tl.arange(0, TILE_M)
    query_token = m // GROUP
    dim = tl.arange(0, TILE_D)
    dim_mask = dim < HEAD_SIZE
    while tile < end_tile:
        first_tile = tl.load(starts_ptr + stream)
        stream_end = tl.load(starts_ptr + stream + 1)
        row = stream // NUM_KV_HEADS
        head = stream % NUM_KV_HEADS
        query_start = tl.load(query_start_ptr + row)
        query_len = tl.load(query_start_ptr + row + 1) - query_start
        row_ptr = rows_ptr + row * ROW_WIDTH
        layer_stream = layer * NUM_KV_HEADS + head
        num_region_tokens, num_tokens, first_page, first_tail_block = stream_extent(
            row_ptr,
            offsets_ptr + row.to(tl.int64) * offsets_stride,
            layer_stream,
            BLOCK_SIZE,
        )
        num_region_blocks = tl.load(row_ptr + ROW_NUM_REGION_BLOCKS)
        region_column = tl.load(row_ptr + ROW_REGION_COLUMN)
        boundary_block = tl.load(row_ptr + ROW_BOUNDARY_BLOCK)
        table_row_ptr = table_ptr + row.to(tl.int64) * table_stride
        m_mask = query_token < query_len
        query = tl.load(
            query_ptr
            + (query_start + query_token).to(tl.int64)[:, None] * query_stride_token
            + (head * GROUP + m % GROUP)[:, None] * query_stride_head
            + dim[None, :],
            mask=m_mask[:, None] & dim_mask[None, :],
            other=0.0,
        )
        factor = scale * LOG2E
        value_scale = 1.0
        if HAS_SCALES:
            factor *= tl.load(key_scale_ptr + layer_stream)
            value_scale = tl.load(value_scale_ptr + layer_stream)
        # Each query sees the tokens up to its own.
        limit = num_tokens - (query_len - 1 - query_token)
        segment_end = tl.minimum(end_tile, stream_end)
        first_key = (tile - first_tile) * TILE_N
        end_key = (segment_end - first_tile) * TILE_N

        best = tl.full([TILE_M], float("-inf"), tl.float32)
        total = tl.zeros([TILE_M], tl.float32)
        acc = tl.zeros([TILE_M, TILE_D], tl.float32)
        for first in range(first_key, end_key, TILE_N):
            n = first + tl.arange(0, TILE_N)
            n_mask = n < num_tokens
            pages = stream_page_ids(
                n,
                n_mask,
                table_row_ptr,
                layer_stream,
                num_region_tokens,
                first_page,
                num_region_blocks,
                region_column,
                boundary_block,
                first_tail_block,
                BLOCK_SIZE,
                PAGES_PER_BLOCK,
            )
            entry = (pages * BLOCK_SIZE + n % BLOCK_SIZE) * (2 * HEAD_SIZE)
            kv_mask = n_mask[:, None] & dim_mask[None, :]
            key_ptrs = pool_ptr + entry[:, None] + dim[None, :]
            key = tl.load(key_ptrs, mask=kv_mask, other=0.0).to(query.dtype)
            logits = dot(query, tl.trans(key)) * factor
            if HAS_SOFT_CAP:
                logits = squash(logits, soft_cap * LOG2E)
            visible = m_mask[:, None] & (n[None, :] < limit[:, None])
            logits = tl.where(visible, logits, float("-inf"))
            new_best = tl.maximum(best, tl.max(logits, axis=1))
            # A row that has seen nothing yet.
            base = tl.where(new_best == float("-inf"), 0.0, new_best)
            weights = tl.exp2(logits - base[:, None])
            decay = tl.exp2(best - base)
            total = total * decay + tl.sum(weights, axis=1)
            value = tl.load(key_ptrs + HEAD_SIZE, mask=kv_mask, other=0.0).to(query.dtype)
            acc = acc * decay[:, None] + dot(cast(weights, query.dtype), value)
            best = new_best

        seen = total > 0
        acc = acc * (value_scale / tl.where(seen, total, 1.0))[:, None]
        lse = tl.where(seen, best + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        if (tile == first_tile) & (segment_end == stream_end):
            _store_out(
                out_ptr,
                acc,
                lse,
                sinks_ptr,
                m,
                head,
                query_start,
                query_len,
                out_stride_token,
                out_stride_head,
                GROUP,
                HEAD_SIZE,
                HAS_SINKS,
                TILE_D,
            )
        else:
            # A program leaves at most two pieces: the end of a stream, and the start of one.
            place = 2 * program + tl.where(tile == first_tile, 1, 0)
            piece_row = place * PIECE_ROWS + m
            piece_ptrs = pieces_ptr + piece_row[:, None] * HEAD_SIZE + dim[None, :]
            tl.store(piece_ptrs, acc, mask=m_mask[:, None] & dim_mask[None, :])
            tl.store(lse_ptr + piece_row, lse, mask=m_mask)
            first_program = program_of(first_tile, share, extra)
            last_program = program_of(stream_end - 1, share, extra)
            # All threads have stored before one of them says so.
            tl.debug_barrier()
            ticket_ptr = tickets_ptr + first_program
            ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
            if ticket == last_program - first_program:
                # For the next layer.
                tl.store(ticket_ptr, 0)
                # A few rows at a time: all of them may be more than shared memory holds.
                for first_row in tl.range(0, PIECE_ROWS, TILE_MERGED, num_stages=1):
                    merged_m = first_row + tl.arange(0, TILE_MERGED)
                    out, merged_lse = _merge_pieces(
                        pieces_ptr,
                        lse_ptr,
                        merged_m,
                        first_program,
                        last_program,
                        PIECE_ROWS,
                        HEAD_SIZE,
                        TILE_D,
                        NUM_MERGED,
                    )
                    _store_out(
                        out_ptr,
                        out,
                        merged_lse,
                        sinks_ptr,
                        merged_m,
                        head,
                        query_start,
                        query_len,
                        out_stride_token,
                        out_stride_head,
                        GROUP,
                        HEAD_SIZE,
                        HAS_SINKS,
                        TILE_D,
                    )
        tile = segment_end
        stream += 1


@dataclass(frozen=True)
class DecodeTiles:
    """How a program works.

    Attributes:
        num_keys: tokens of a tile.
        num_warps: of a program.
        num_stages: of the loop over tiles. Loads of keys and values wait for one of the block
            table, which takes stages too: 5 give them two buffers, 7 give three.
        programs_per_sm: that a multiprocessor holds at once, by registers and shared memory.
        max_registers: per thread; None = as many as the compiler takes.
        least_tiles: of a program, so that small batches are not cut into crumbs.
    """

    num_keys: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    max_registers: int | None = None
    least_tiles: int = 4


def decode_tiles(piece_rows: int, tile_d: int, element_bytes: int) -> DecodeTiles:
    """Chosen by what compiles for sm_90 to several buffers, no stack and many programs per SM.

    Not measured on a GPU. Triton 3.6 takes up to half as many registers again as 3.9.

    Args:
        piece_rows: most query rows of a KV head, those of all its queries and query heads.
        tile_d: head size, padded to a power of two.
        element_bytes: of the pool.
    """
    if piece_rows > 16 or element_bytes > 2:
        # Rare rows of several tokens, and float32, which no engine on a GPU has.
        num_elements = triton.next_power_of_2(piece_rows) * tile_d
        if num_elements > 16384:
            # Bound by arithmetic; more stages would put the accumulator on the stack.
            return DecodeTiles(16, 8, 3, 1)
        num_keys = 32 if max(num_elements, 4096) * element_bytes <= 16384 else 16
        return DecodeTiles(num_keys, 8 if num_elements > 8192 else 4, 5, 1)
    if tile_d > 128:
        return DecodeTiles(16, 4, 7, 2, least_tiles=8)
    if piece_rows > 4 or element_bytes == 1:
        return DecodeTiles(32, 4, 7, 3, max_registers=168)
    return DecodeTiles(32, 4, 7, 4, max_registers=128)


def query_tile(max_query_len: int, group: int) -> int:
    """TILE_M: query rows of a program, at least what a matrix product takes."""
    return max(16, triton.next_power_of_2(max_query_len * group))


def ragged_decode(
    query: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    page_offsets: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    out: torch.Tensor,
    *,
    tile_starts: torch.Tensor,
    num_tiles: torch.Tensor,
    first_streams: torch.Tensor,
    pieces: torch.Tensor,
    piece_lse: torch.Tensor,
    tickets: torch.Tensor,
    tiles: DecodeTiles,
    layer: int,
    num_layers: int,
    num_kv_heads: int,
    scale: float,
    logits_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    """See `ops.ragged_decode`, and `ops.DecodeWork` for what the lists and pieces are."""
    num_heads, head_size = query.shape[1:]
    group = num_heads // num_kv_heads
    num_programs, piece_rows = first_streams.shape[1], pieces.shape[1]
    tile_d = triton.next_power_of_2(head_size)
    tile_merged = min(triton.next_power_of_2(piece_rows), _MERGED_ELEMENTS // tile_d)
    options = {} if tiles.max_registers is None else {"maxnreg": tiles.max_registers}
    _ragged_decode_kernel[(num_programs,)](
        out,
        pieces,
        piece_lse,
        tickets,
        tile_starts,
        num_tiles,
        first_streams,
        query,
        pool,
        rows,
        page_offsets,
        block_table,
        query_start_loc,
        # Any pointer will do where there are none.
        piece_lse if key_scale is None else key_scale,
        piece_lse if value_scale is None else value_scale,
        piece_lse if sinks is None else sinks,
        layer,
        scale,
        logits_soft_cap,
        num_programs,
        out.stride(0),
        out.stride(1),
        query.stride(0),
        query.stride(1),
        page_offsets.stride(0),
        block_table.stride(0),
        tile_starts.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        PAGES_PER_BLOCK=num_layers * num_kv_heads,
        GROUP=group,
        PIECE_ROWS=piece_rows,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=pool.shape[1],
        LEAST_TILES=tiles.least_tiles,
        HAS_SOFT_CAP=logits_soft_cap > 0,
        HAS_SCALES=key_scale is not None,
        HAS_SINKS=sinks is not None,
        TILE_M=query_tile(piece_rows // group, group),
        TILE_N=tiles.num_keys,
        TILE_D=tile_d,
        TILE_MERGED=tile_merged,
        NUM_MERGED=_MERGED_ELEMENTS // (tile_merged * tile_d),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **options,
    )
