"""Sums of the window's attention weights, by pieces of the keys, and what they say of a query."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .paging import load_row
from .window_tiles import (
    NUM_SPLITS,
    UNALIGNED_PARAMETERS,
    UNSPECIALIZED,
    PageShape,
    PromptKeys,
    WindowShape,
    at_layer,
    load_keys,
    load_logit_scale,
    load_lse,
    load_queries,
    query_rows,
    window_logits,
)

# With a given lse: the first keys, and the last ones.
NUM_ENDS = 2


@triton.jit
def _keys_of_split(split, num_keys, NUM_SPLITS: tl.constexpr, TILE_N: tl.constexpr):
    """(first key, end) of a split, of as many whole tiles as the others."""
    tiles = tl.cdiv(tl.cdiv(num_keys, TILE_N), NUM_SPLITS)
    start = split * tiles * TILE_N
    return start, tl.minimum(start + tiles * TILE_N, num_keys)


@triton.jit
def _keys_at_ends(split, keys, WINDOW: tl.constexpr, EDGE: tl.constexpr, TILE_N: tl.constexpr):
    """(first key, end): of split 0 the first keys, of split 1 all that may be near or not rated.

    Pooling loses something of the EDGE keys at either end.
    """
    num_keys = keys.row.seq_len
    tail = tl.minimum(keys.num_rated - EDGE, num_keys - WINDOW + 1 - keys.near_tokens)
    tail = tl.maximum(tail, 0) // TILE_N * TILE_N
    start = tl.where(split == 0, 0, tl.maximum(tail, TILE_N))
    return start, tl.where(split == 0, tl.minimum(num_keys, TILE_N), num_keys)


@triton.jit
def _pooled_share(tokens, num_rated, POOL_KERNEL: tl.constexpr):
    """[TILE_N] part of each key that counts: of its windows of the pooling, those all inside."""
    before = tl.minimum(tokens, POOL_KERNEL // 2)
    after = tl.minimum(num_rated - 1 - tokens, POOL_KERNEL // 2)
    return (before + after + 1).to(tl.float32) / POOL_KERNEL


@triton.jit
def _with_tile(best, total, rated, pooled, logits, is_rated, share):
    """[TILE_M] greatest logit, and sums relative to it, once a tile of keys is added to them."""
    new_best = tl.maximum(best, tl.max(logits, axis=1))
    # A row that has seen nothing yet.
    base = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(logits - base[:, None])
    decay = tl.exp2(best - base)
    in_rated = tl.where(is_rated, weights, 0.0)
    total = total * decay + tl.sum(weights, axis=1)
    rated = rated * decay + tl.sum(in_rated, axis=1)
    pooled = pooled * decay + tl.sum(in_rated * share[None, :], axis=1)
    return new_best, total, rated, pooled


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED_PARAMETERS)
def _window_sums_kernel(
    sums_ptr,
    query_ptr,
    pool_ptr,
    rows_ptr,
    table_ptr,
    num_rated_ptr,
    lse_ptr,
    key_scale_ptr,
    scale_ptr,
    soft_cap_ptr,
    first_stream,
    near_tokens,
    query_stride_request,
    query_stride_layer,
    query_stride_token,
    query_stride_head,
    lse_stride_request,
    lse_stride_layer,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    POOL_KERNEL: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_M_TILES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Per query row and split of the keys: greatest logit, and three sums of exponentials.

    Without a given lse, relative to the greatest logit: over all keys, over the rated ones, and
    over these as they count after a mean pooling of POOL_KERNEL. Of a key near an end, pooling
    spreads a part to places outside, and that part counts for nothing.
    With it, relative to the lse: over keys that are not rated, and what the pooling loses; only
    the first and the last keys are read, since no others contribute.
    """
    m_tile = tl.program_id(0) % NUM_M_TILES
    split = tl.program_id(0) // NUM_M_TILES
    scored_stream = tl.program_id(1)
    request = tl.program_id(2)
    pages: tl.constexpr = PageShape(PAGES_PER_BLOCK, BLOCK_SIZE, HEAD_SIZE, TILE_D)
    shape: tl.constexpr = WindowShape(NUM_KV_HEADS, GROUP, WINDOW, TILE_M, TILE_W, NUM_M_TILES)
    layer_index = scored_stream // NUM_KV_HEADS
    row = load_row(rows_ptr, table_ptr, request, table_stride)
    num_rated = tl.load(num_rated_ptr + request)
    keys = PromptKeys(row, first_stream + scored_stream, num_rated, near_tokens)
    rows = query_rows(m_tile, scored_stream, shape)
    query_ptr = at_layer(query_ptr, request, layer_index, query_stride_request, query_stride_layer)
    query = load_queries(query_ptr, rows, query_stride_token, query_stride_head, pages)
    scale = load_logit_scale(scale_ptr, key_scale_ptr, soft_cap_ptr, layer_index, keys.stream)
    if lse_ptr is not None:
        start, end = _keys_at_ends(split, keys, WINDOW, POOL_KERNEL // 2, TILE_N)
        lse_ptr = at_layer(lse_ptr, request, layer_index, lse_stride_request, lse_stride_layer)
        best = load_lse(lse_ptr, rows, shape)
    else:
        start, end = _keys_of_split(split, row.seq_len, NUM_SPLITS, TILE_N)
        best = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    rated = tl.zeros([TILE_M], tl.float32)
    pooled = tl.zeros([TILE_M], tl.float32)
    for first in range(start, end, TILE_N):
        tokens = first + tl.arange(0, TILE_N)
        key = load_keys(tokens, keys, pool_ptr, pages)
        logits = window_logits(query, key, scale, soft_cap_ptr is not None)
        age = (row.seq_len - WINDOW + rows.place)[:, None] - tokens[None, :]
        logits = tl.where((age >= 0) & rows.mask[:, None], logits, float("-inf"))
        is_rated = (age >= near_tokens) & (tokens < num_rated)[None, :]
        share = _pooled_share(tokens, num_rated, POOL_KERNEL)
        if lse_ptr is not None:
            weights = tl.exp2(logits - best[:, None])
            total += tl.sum(tl.where(is_rated, 0.0, weights), axis=1)
            pooled += tl.sum(tl.where(is_rated, weights * (1 - share)[None, :], 0.0), axis=1)
        else:
            best, total, rated, pooled = _with_tile(
                best, total, rated, pooled, logits, is_rated, share
            )
    out_ptr, num_sums = first_sum(sums_ptr, request, scored_stream, NUM_M_TILES * TILE_M)
    out_ptr += split * 4 * num_sums + rows.index
    tl.store(out_ptr, best)
    tl.store(out_ptr + num_sums, total)
    tl.store(out_ptr + 2 * num_sums, rated)
    tl.store(out_ptr + 3 * num_sums, pooled)


@triton.jit
def first_sum(sums_ptr, request, scored_stream, NUM_ROWS: tl.constexpr):
    """Where a stream's sums begin in [splits, 4, R, streams, rows], and how many one kind has."""
    num_streams = tl.num_programs(1).to(tl.int64)
    num_sums = tl.num_programs(2) * num_streams * NUM_ROWS
    return sums_ptr + (request * num_streams + scored_stream) * NUM_ROWS, num_sums


@triton.jit
def _sum_ptrs(
    sums_ptr, request, scored_stream, rows, NUM_SPLITS: tl.constexpr, shape: tl.constexpr
):
    """([splits, TILE_M] pointers to the first kind of sums, how many one kind has)."""
    row_ptr, num_sums = first_sum(
        sums_ptr, request, scored_stream, shape.NUM_M_TILES * shape.TILE_M
    )
    split = tl.arange(0, NUM_SPLITS)
    ptrs = row_ptr + split[:, None].to(tl.int64) * 4 * num_sums + rows.index[None, :]
    return ptrs, num_sums


@triton.jit
def _gain(old_sum, new_sum):
    """What pooled weights are multiplied by, so that they sum to what they did before."""
    return tl.where(new_sum > 0, old_sum / tl.where(new_sum > 0, new_sum, 1.0), 0.0)


@triton.jit
def merged_sums(
    sums_ptr, request, scored_stream, rows, sink, NUM_SPLITS: tl.constexpr, shape: tl.constexpr
):
    """What splits over all keys say together of a tile of rows.

    Returns:
        [TILE_M] base-2 lse, and what pooled weights are multiplied by.
    """
    ptrs, num_sums = _sum_ptrs(sums_ptr, request, scored_stream, rows, NUM_SPLITS, shape)
    total = tl.load(ptrs + num_sums)
    pooled = tl.load(ptrs + 3 * num_sums)
    best = tl.load(ptrs)
    rated = tl.load(ptrs + 2 * num_sums)
    greatest = tl.maximum(tl.max(best, axis=0), sink)
    base = tl.where(greatest == float("-inf"), 0.0, greatest)
    decay = tl.exp2(best - base[None, :])
    all_keys = tl.sum(total * decay, axis=0) + tl.exp2(sink - base)
    old_sum = tl.sum(rated * decay, axis=0)
    new_sum = tl.sum(pooled * decay, axis=0)
    lse = base + tl.log2(tl.where(all_keys > 0, all_keys, 1.0))
    return lse, _gain(old_sum, new_sum)


@triton.jit
def gain_by_lse(
    sums_ptr,
    request,
    scored_stream,
    rows,
    lse,
    sink,
    HAS_SINKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    shape: tl.constexpr,
):
    """[TILE_M] what pooled weights are multiplied by, of the sums at both ends with a given lse."""
    ptrs, num_sums = _sum_ptrs(sums_ptr, request, scored_stream, rows, NUM_SPLITS, shape)
    total = tl.load(ptrs + num_sums)
    pooled = tl.load(ptrs + 3 * num_sums)
    # Weights of keys and sink sum to one.
    all_rated = 1 - tl.sum(total, axis=0)
    if HAS_SINKS:
        all_rated -= tl.exp2(sink - lse)
    old_sum = tl.maximum(all_rated, 0.0)
    return _gain(old_sum, old_sum - tl.sum(pooled, axis=0))


def window_sums(
    grid: tuple[int, int], num_rows: int, arguments: tuple[Any, ...], shape: dict[str, Any]
) -> torch.Tensor:
    """[splits, 4, R, streams, rows] float32 of the kernel.

    Args:
        grid: streams to score, and requests.
        num_rows: query rows of a stream, whole tiles.
        arguments: the kernel's behind the first.
        shape: its constants.
    """
    num_streams, num_requests = grid
    num_splits = shape["NUM_SPLITS"]
    sums = torch.empty(
        num_splits,
        4,
        num_requests,
        num_streams,
        num_rows,
        dtype=torch.float32,
        device=arguments[0].device,
    )
    _window_sums_kernel[(num_splits * shape["NUM_M_TILES"], num_streams, num_requests)](
        sums, *arguments, **shape
    )
    return sums


def num_splits(has_lse: bool) -> int:
    """Pieces that the keys are cut into for their sums."""
    return NUM_ENDS if has_lse else NUM_SPLITS
