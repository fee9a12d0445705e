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

from .decode_pieces import (
    DecodeShape,
    Output,
    Pieces,
    is_last_piece,
    leave_piece,
    load_request,
    query_mask,
    query_ptrs,
    store_merged,
    store_out,
)
from .decode_work import first_tile_of, num_working_programs, program_of, stream_extent
from .paging import LOG2E, ROW_WIDTH, cast, dot, load_row, squash, stream_page_ids

# Elements of pieces that are merged at once, 32 per thread.
_MERGED_ELEMENTS = 4096


@triton.jit
def _attend(
    query,
    m,
    request,
    first_key,
    end_key,
    pool_ptr,
    row,
    stream,
    extent,
    factor,
    soft_cap,
    shape: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Attention of query rows m, [TILE_M, TILE_D], to keys [first_key, end_key) of a stream.

    Returns:
        ([TILE_M, TILE_D] sums of values, [TILE_M] greatest logit, [TILE_M] sum of weights).
    """
    TILE_M: tl.constexpr = query.shape[0]
    TILE_D: tl.constexpr = query.shape[1]
    dim = tl.arange(0, TILE_D)
    query_token = m // shape.GROUP
    is_query = query_token < request.num_queries
    # Each query sees the tokens up to its own.
    limit = extent.num_tokens - (request.num_queries - 1 - query_token)
    best = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, TILE_D], tl.float32)
    for first in range(first_key, end_key, TILE_N):
        n = first + tl.arange(0, TILE_N)
        n_mask = n < extent.num_tokens
        pages = stream_page_ids(
            n, n_mask, row, stream, extent, shape.BLOCK_SIZE, shape.PAGES_PER_BLOCK
        )
        entry = (pages * shape.BLOCK_SIZE + n % shape.BLOCK_SIZE) * (2 * shape.HEAD_SIZE)
        kv_mask = n_mask[:, None] & (dim < shape.HEAD_SIZE)[None, :]
        key_ptrs = pool_ptr + entry[:, None] + dim[None, :]
        key = tl.load(key_ptrs, mask=kv_mask, other=0.0).to(query.dtype)
        logits = dot(query, tl.trans(key)) * factor
        if soft_cap is not None:
            logits = squash(logits, soft_cap * LOG2E)
        visible = is_query[:, None] & (n[None, :] < limit[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, axis=1))
        # A row that has seen nothing yet.
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(logits - base[:, None])
        decay = tl.exp2(best - base)
        total = total * decay + tl.sum(weights, axis=1)
        value = tl.load(key_ptrs + shape.HEAD_SIZE, mask=kv_mask, other=0.0).to(query.dtype)
        acc = acc * decay[:, None] + dot(cast(weights, query.dtype), value)
        best = new_best
    return acc, best, total


@triton.jit
def _divided(acc, best, total, value_scale):
    """([TILE_M, TILE_D] result, [TILE_M] base-2 lse) of sums relative to the greatest logit."""
    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    lse = tl.where(seen, best + tl.log2(divisor), float("-inf"))
    return acc * (value_scale / divisor)[:, None], lse


# One function: a third of it names arguments, and the rest is one loop over a program's streams.
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
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_MERGED: tl.constexpr,
    NUM_MERGED: tl.constexpr,
):
    """All of one program's share of a layer's tiles, stream by stream."""
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
    pieces = Pieces(pieces_ptr, lse_ptr, tickets_ptr)
    output = Output(out_ptr, out_stride_token, out_stride_head, sinks_ptr)
    shape: tl.constexpr = DecodeShape(PAGES_PER_BLOCK, BLOCK_SIZE, HEAD_SIZE, GROUP, PIECE_ROWS)
    m = tl.arange(0, TILE_M)
    while tile < end_tile:
        first_tile = tl.load(starts_ptr + stream)
        stream_end = tl.load(starts_ptr + stream + 1)
        index = stream // NUM_KV_HEADS
        head = stream % NUM_KV_HEADS
        layer_stream = layer * NUM_KV_HEADS + head
        request = load_request(query_start_ptr, index, head, GROUP)
        row_offsets_ptr = offsets_ptr + index.to(tl.int64) * offsets_stride
        extent = stream_extent(
            rows_ptr + index * ROW_WIDTH, row_offsets_ptr, layer_stream, BLOCK_SIZE
        )
        row = load_row(rows_ptr, table_ptr, index, table_stride)
        ptrs = query_ptrs(
            query_ptr, m, request, query_stride_token, query_stride_head, GROUP, TILE_D
        )
        query = tl.load(ptrs, mask=query_mask(m, request, shape, TILE_D), other=0.0)
        factor = scale * LOG2E
        value_scale = 1.0
        if key_scale_ptr is not None:
            factor *= tl.load(key_scale_ptr + layer_stream)
            value_scale = tl.load(value_scale_ptr + layer_stream)
        segment_end = tl.minimum(end_tile, stream_end)
        first_key = (tile - first_tile) * TILE_N
        end_key = (segment_end - first_tile) * TILE_N
        acc, best, total = _attend(
            query,
            m,
            request,
            first_key,
            end_key,
            pool_ptr,
            row,
            layer_stream,
            extent,
            factor,
            soft_cap,
            shape,
            TILE_N,
        )
        out, lse = _divided(acc, best, total, value_scale)
        if (tile == first_tile) & (segment_end == stream_end):
            store_out(output, out, lse, m, request, shape)
        else:
            place = 2 * program + tl.where(tile == first_tile, 1, 0)
            leave_piece(pieces, out, lse, place, m, request, shape)
            first_program = program_of(first_tile, share, extra)
            last_program = program_of(stream_end - 1, share, extra)
            if is_last_piece(pieces, first_program, last_program):
                store_merged(
                    pieces,
                    output,
                    request,
                    first_program,
                    last_program,
                    shape,
                    TILE_MERGED,
                    TILE_D,
                    NUM_MERGED,
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
        key_scale,
        value_scale,
        sinks,
        layer,
        scale,
        logits_soft_cap if logits_soft_cap > 0 else None,
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
        TILE_M=query_tile(piece_rows // group, group),
        TILE_N=tiles.num_keys,
        TILE_D=tile_d,
        TILE_MERGED=tile_merged,
        NUM_MERGED=_MERGED_ELEMENTS // (tile_merged * tile_d),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **options,
    )
