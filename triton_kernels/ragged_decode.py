"""Decode attention where every (request, KV head) has its own number of kept tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .paging import (
    LOG2E,
    ROW_BOUNDARY_BLOCK,
    ROW_FIRST_KEPT_BLOCK,
    ROW_NUM_REGION_BLOCKS,
    ROW_SEQ_LEN,
    ROW_WIDTH,
    cast,
    dot,
    squash,
    stream_page_ids,
)

# Programs wanted for a full GPU, several waves of them, so that long streams even out.
_PROGRAMS_WANTED = 4096
# Pieces of a stream: at least so many may be made in any batch, which may have one long row.
_FEWEST_SPLITS, _MOST_SPLITS = 8, 64
# Tokens of a piece where there are streams enough for a GPU: its result is written and read again.
_PIECE_TOKENS, _SPLITS_FOR_FEW_STREAMS = 256, 32
# Of an accumulator, query rows x head size, beside a whole tile of keys.
_MAX_TILE_ELEMENTS = 8192


@triton.jit
def _stream_extent(
    row_ptr,
    offsets_ptr,
    stream,
    query_len,
    sliding_window,
    BLOCK_SIZE: tl.constexpr,
    HAS_SLIDING_WINDOW: tl.constexpr,
):
    """Where one stream's tokens lie.

    Returns:
        (tokens in its region pages, tokens in all, first virtual page, first tail block).
    """
    num_tokens = tl.load(row_ptr + ROW_SEQ_LEN)
    first_tail_block = tl.load(row_ptr + ROW_FIRST_KEPT_BLOCK)
    num_tail_tokens = num_tokens - first_tail_block * BLOCK_SIZE
    first_page = 0
    num_region_tokens = 0
    if tl.load(row_ptr + ROW_NUM_REGION_BLOCKS) > 0:
        first_page = tl.load(offsets_ptr + stream)
        num_region_tokens = (tl.load(offsets_ptr + stream + 1) - first_page) * BLOCK_SIZE
    if HAS_SLIDING_WINDOW:
        # Blocks of the tail that not even the first query sees.
        hidden = tl.maximum(num_tail_tokens - query_len + 1 - sliding_window, 0) // BLOCK_SIZE
        first_tail_block += hidden
        num_tail_tokens -= hidden * BLOCK_SIZE
    return num_region_tokens, num_region_tokens + num_tail_tokens, first_page, first_tail_block


@triton.jit
def _tiles_per_split(
    num_tokens, TILE_N: tl.constexpr, NUM_SPLITS: tl.constexpr, LEAST_TILES: tl.constexpr
):
    return tl.maximum(tl.cdiv(tl.cdiv(num_tokens, TILE_N), NUM_SPLITS), LEAST_TILES)


@triton.jit
def _with_sink(out, lse, sinks_ptr, heads, mask, HAS_SINKS: tl.constexpr):
    """Add a learned logit per head, that no value belongs to, to the softmax (base-2 lse)."""
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads, mask=mask, other=0.0).to(tl.float32) * LOG2E
        out = out / (1 + tl.exp2(sink - lse))[:, None]
    return out


@triton.jit(
    do_not_specialize=["layer", "num_query_tokens", "offsets_stride", "table_stride"],
    do_not_specialize_on_alignment=["offsets_ptr", "table_ptr"],
)
def _ragged_decode_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
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
    sliding_window,
    num_query_tokens,
    out_stride_token,
    out_stride_head,
    query_stride_token,
    query_stride_head,
    offsets_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SLIDING_WINDOW: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    query_start = tl.load(query_start_ptr + row)
    query_len = tl.load(query_start_ptr + row + 1) - query_start
    if query_len <= 0:
        return
    row_ptr = rows_ptr + row * ROW_WIDTH
    stream = layer * NUM_KV_HEADS + head
    num_region_tokens, num_tokens, first_page, first_tail_block = _stream_extent(
        row_ptr,
        offsets_ptr + row.to(tl.int64) * offsets_stride,
        stream,
        query_len,
        sliding_window,
        BLOCK_SIZE,
        HAS_SLIDING_WINDOW,
    )
    tiles = _tiles_per_split(num_tokens, TILE_N, NUM_SPLITS, LEAST_TILES)
    start = split * tiles * TILE_N
    if start >= num_tokens:
        return
    end = tl.minimum(start + tiles * TILE_N, num_tokens)
    num_region_blocks = tl.load(row_ptr + ROW_NUM_REGION_BLOCKS)
    boundary_block = tl.load(row_ptr + ROW_BOUNDARY_BLOCK)

    # Row m of the tile is query m // GROUP of this request, head m % GROUP of the group.
    m = tl.arange(0, TILE_M)
    query_token = m // GROUP
    m_mask = query_token < query_len
    heads = head * GROUP + m % GROUP
    token = query_start + query_token
    dim = tl.arange(0, TILE_D)
    dim_mask = dim < HEAD_SIZE
    query = tl.load(
        query_ptr
        + token.to(tl.int64)[:, None] * query_stride_token
        + heads[:, None] * query_stride_head
        + dim[None, :],
        mask=m_mask[:, None] & dim_mask[None, :],
        other=0.0,
    )
    key_scale = tl.load(key_scale_ptr + stream)
    value_scale = tl.load(value_scale_ptr + stream)
    # Each query sees the tokens up to its own.
    limit = num_tokens - (query_len - 1 - query_token)

    best = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, TILE_D], tl.float32)
    table_row_ptr = table_ptr + row.to(tl.int64) * table_stride
    for first in range(start, end, TILE_N):
        n = first + tl.arange(0, TILE_N)
        n_mask = n < end
        pages = stream_page_ids(
            n,
            n_mask,
            table_row_ptr,
            stream,
            num_region_tokens,
            first_page,
            num_region_blocks,
            boundary_block,
            first_tail_block,
            BLOCK_SIZE,
            PAGES_PER_BLOCK,
        )
        entry = (pages * BLOCK_SIZE + n % BLOCK_SIZE) * (2 * HEAD_SIZE)
        kv_mask = n_mask[:, None] & dim_mask[None, :]
        key_ptrs = pool_ptr + entry[:, None] + dim[None, :]
        key = tl.load(key_ptrs, mask=kv_mask, other=0.0).to(query.dtype)
        logits = dot(query, tl.trans(key)) * (scale * key_scale)
        if HAS_SOFT_CAP:
            logits = squash(logits, soft_cap)
        visible = m_mask[:, None] & n_mask[None, :] & (n[None, :] < limit[:, None])
        if HAS_SLIDING_WINDOW:
            is_near = n[None, :] >= limit[:, None] - sliding_window
            visible = visible & (is_near | (n[None, :] < num_region_tokens))
        logits = tl.where(visible, logits * LOG2E, float("-inf"))
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
    out_mask = m_mask[:, None] & dim_mask[None, :]
    if tiles * TILE_N >= num_tokens:
        acc = _with_sink(acc, lse, sinks_ptr, heads, m_mask, HAS_SINKS)
        out_ptrs = (
            out_ptr
            + token.to(tl.int64)[:, None] * out_stride_token
            + heads[:, None] * out_stride_head
            + dim[None, :]
        )
        tl.store(out_ptrs, cast(acc, out_ptr.dtype.element_ty), mask=out_mask)
    else:
        num_heads = NUM_KV_HEADS * GROUP
        entry = (split.to(tl.int64) * num_query_tokens + token) * num_heads + heads
        tl.store(partial_ptr + entry[:, None] * HEAD_SIZE + dim[None, :], acc, mask=out_mask)
        tl.store(lse_ptr + entry, lse, mask=m_mask)


@triton.jit(
    do_not_specialize=["layer", "num_query_tokens", "offsets_stride"],
    do_not_specialize_on_alignment=["offsets_ptr"],
)
def _merge_splits_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    rows_ptr,
    offsets_ptr,
    query_start_ptr,
    sinks_ptr,
    layer,
    sliding_window,
    num_query_tokens,
    out_stride_token,
    out_stride_head,
    offsets_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    LEAST_TILES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SLIDING_WINDOW: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    query_start = tl.load(query_start_ptr + row)
    query_len = tl.load(query_start_ptr + row + 1) - query_start
    if query_len <= 0:
        return
    _, num_tokens, _, _ = _stream_extent(
        rows_ptr + row * ROW_WIDTH,
        offsets_ptr + row.to(tl.int64) * offsets_stride,
        layer * NUM_KV_HEADS + head // GROUP,
        query_len,
        sliding_window,
        BLOCK_SIZE,
        HAS_SLIDING_WINDOW,
    )
    tiles = _tiles_per_split(num_tokens, TILE_N, NUM_SPLITS, LEAST_TILES)
    if tiles * TILE_N >= num_tokens:
        # One split, which has written the result.
        return
    split = tl.arange(0, NUM_SPLITS)
    is_used = split * tiles * TILE_N < num_tokens
    dim = tl.arange(0, TILE_D)
    dim_mask = dim < HEAD_SIZE
    heads = head + tl.zeros([1], tl.int32)
    for query_token in range(0, query_len):
        token = query_start + query_token
        entry = (split.to(tl.int64) * num_query_tokens + token) * (NUM_KV_HEADS * GROUP) + head
        lse = tl.load(lse_ptr + entry, mask=is_used, other=float("-inf"))
        partial = tl.load(
            partial_ptr + entry[:, None] * HEAD_SIZE + dim[None, :],
            mask=is_used[:, None] & dim_mask[None, :],
            other=0.0,
        )
        best = tl.max(lse, axis=0)
        weights = tl.exp2(lse - best)
        total = tl.sum(weights, axis=0)
        out = tl.sum(partial * weights[:, None], axis=0) / total
        merged_lse = best + tl.log2(total) + tl.zeros([1], tl.float32)
        out = _with_sink(out[None, :], merged_lse, sinks_ptr, heads, heads >= 0, HAS_SINKS)
        out_ptrs = (
            out_ptr + token.to(tl.int64) * out_stride_token + head * out_stride_head + dim[None, :]
        )
        tl.store(out_ptrs, cast(out, out_ptr.dtype.element_ty), mask=dim_mask[None, :])


@dataclass(frozen=True)
class DecodeTiles:
    """How a program works: keys at a time, warps, and loads ahead (`num_stages`)."""

    num_keys: int
    num_warps: int
    num_stages: int


def decode_tiles(tile_m: int, tile_d: int) -> DecodeTiles:
    """For `tile_m` query rows and a head size padded to `tile_d`; first guesses, not measured."""
    # Fewer keys for many query rows: 99 KB of shared memory are all that some GPUs have.
    num_keys = (64 if tile_d >= 128 else 128) // triton.cdiv(tile_m * tile_d, _MAX_TILE_ELEMENTS)
    return DecodeTiles(num_keys, 8 if tile_m * tile_d > _MAX_TILE_ELEMENTS else 4, 3)


def num_decode_splits(num_rows: int, num_kv_heads: int) -> int:
    """Most pieces that a stream is cut into: a power of two, more for smaller batches."""
    wanted = max(1, _PROGRAMS_WANTED // max(1, num_rows * num_kv_heads))
    return min(_MOST_SPLITS, max(_FEWEST_SPLITS, 1 << (wanted.bit_length() - 1)))


def ragged_decode(
    query: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    page_offsets: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    out: torch.Tensor,
    *,
    layer: int,
    num_layers: int,
    num_kv_heads: int,
    max_query_len: int,
    scale: float,
    logits_soft_cap: float = 0.0,
    sliding_window: int = 0,
    sinks: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> None:
    """See `ops.ragged_decode`."""
    num_tokens, num_heads, head_size = query.shape
    num_rows = rows.shape[0]
    block_size = pool.shape[1]
    group = num_heads // num_kv_heads
    if num_splits is None:
        num_splits = num_decode_splits(num_rows, num_kv_heads)
    is_split = num_splits > 1
    size = (num_splits, num_tokens, num_heads) if is_split else (1, 1, 1)
    partial = torch.empty(*size, head_size, dtype=torch.float32, device=query.device)
    lse = torch.empty(size, dtype=torch.float32, device=query.device)
    tile_d = triton.next_power_of_2(head_size)
    tile_m = max(16, triton.next_power_of_2(max_query_len * group))
    tiles = decode_tiles(tile_m, tile_d)
    # Told by the splits, so that batches which share them share the compiled kernel.
    has_few_streams = num_splits >= _SPLITS_FOR_FEW_STREAMS
    least_tiles = 1 if has_few_streams else triton.cdiv(_PIECE_TOKENS, tiles.num_keys)
    shape = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": block_size,
        "NUM_SPLITS": num_splits,
        "LEAST_TILES": least_tiles,
        "HAS_SINKS": sinks is not None,
        "HAS_SLIDING_WINDOW": sliding_window > 0,
        "TILE_N": tiles.num_keys,
        "TILE_D": tile_d,
    }
    # Any pointer will do where there are no sinks.
    sinks_or_any = lse if sinks is None else sinks
    _ragged_decode_kernel[(num_rows, num_kv_heads, num_splits)](
        out,
        partial,
        lse,
        query,
        pool,
        rows,
        page_offsets,
        block_table,
        query_start_loc,
        key_scale,
        value_scale,
        sinks_or_any,
        layer,
        scale,
        logits_soft_cap,
        sliding_window,
        num_tokens,
        out.stride(0),
        out.stride(1),
        query.stride(0),
        query.stride(1),
        page_offsets.stride(0),
        block_table.stride(0),
        PAGES_PER_BLOCK=num_layers * num_kv_heads,
        HAS_SOFT_CAP=logits_soft_cap > 0,
        TILE_M=tile_m,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **shape,
    )
    if is_split:
        _merge_splits_kernel[(num_rows, num_heads)](
            out,
            partial,
            lse,
            rows,
            page_offsets,
            query_start_loc,
            sinks_or_any,
            layer,
            sliding_window,
            num_tokens,
            out.stride(0),
            out.stride(1),
            page_offsets.stride(0),
            num_warps=8 if tile_d > 128 else 4,
            **shape,
        )
