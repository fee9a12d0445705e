"""Attention of a prompt's last queries to all its keys, read from pages, reduced to scores."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .defensive_score import defensive_scores
from .paging import load_row
from .window_sums import merged_sums, num_splits, window_sums
from .window_tiles import (
    TILE_N,
    UNALIGNED_PARAMETERS,
    UNSPECIALIZED,
    PageShape,
    PromptKeys,
    WindowShape,
    WindowTiles,
    at_layer,
    load_keys,
    load_logit_scale,
    load_lse,
    load_queries,
    load_sinks,
    num_stages,
    query_rows,
    rated_weights,
    tiles_per_program,
    window_logits,
    window_tiles,
)

# Reductions over the window, as the kernel knows them; 'defensive' has a kernel of its own.
_REDUCE = {"mean": 0, "sum": 1, "max": 2}


@triton.jit
def _reduced(weights, WINDOW: tl.constexpr, REDUCTION: tl.constexpr, TILE_W: tl.constexpr):
    """[TILE_M, TILE_N] weights to [TILE_M / TILE_W, TILE_N], over the queries of each head."""
    TILE_M: tl.constexpr = weights.shape[0]
    by_head = tl.reshape(weights, [TILE_M // TILE_W, TILE_W, weights.shape[1]])
    if REDUCTION == 2:
        return tl.max(by_head, axis=1)
    total = tl.sum(by_head, axis=1)
    return total / WINDOW if REDUCTION == 0 else total


@triton.jit(
    do_not_specialize=[*UNSPECIALIZED, "tiles_per_program"],
    do_not_specialize_on_alignment=UNALIGNED_PARAMETERS,
)
def _window_scores_kernel(
    scores_ptr,
    sums_ptr,
    sinks_ptr,
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
    tiles_per_program,
    scores_stride_request,
    scores_stride_stream,
    scores_stride_group,
    NUM_KV_HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    REDUCTION: tl.constexpr,
    POWER: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_M_TILES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """One score per query head and rated key."""
    m_tile = tl.program_id(0) % NUM_M_TILES
    scored_stream = tl.program_id(1)
    request = tl.program_id(2)
    num_rated = tl.load(num_rated_ptr + request)
    start = tl.program_id(0) // NUM_M_TILES * tiles_per_program * TILE_N
    if start >= num_rated:
        return
    end = tl.minimum(start + tiles_per_program * TILE_N, num_rated)
    pages: tl.constexpr = PageShape(PAGES_PER_BLOCK, BLOCK_SIZE, HEAD_SIZE, TILE_D)
    shape: tl.constexpr = WindowShape(NUM_KV_HEADS, GROUP, WINDOW, TILE_M, TILE_W, NUM_M_TILES)
    layer_index = scored_stream // NUM_KV_HEADS
    row = load_row(rows_ptr, table_ptr, request, table_stride)
    keys = PromptKeys(row, first_stream + scored_stream, num_rated, near_tokens)
    scale = load_logit_scale(scale_ptr, key_scale_ptr, soft_cap_ptr, layer_index, keys.stream)
    rows = query_rows(m_tile, scored_stream, shape)
    query_ptr = at_layer(query_ptr, request, layer_index, query_stride_request, query_stride_layer)
    query = load_queries(query_ptr, rows, query_stride_token, query_stride_head, pages)
    if lse_ptr is not None:
        lse_ptr = at_layer(lse_ptr, request, layer_index, lse_stride_request, lse_stride_layer)
        lse = load_lse(lse_ptr, rows, shape)
    else:
        sink = load_sinks(sinks_ptr, layer_index, rows, shape)
        lse, _ = merged_sums(sums_ptr, request, scored_stream, rows, sink, NUM_SPLITS, shape)
    scores_ptr = at_layer(
        scores_ptr, request, scored_stream, scores_stride_request, scores_stride_stream
    )
    head = m_tile * (TILE_M // TILE_W) + tl.arange(0, TILE_M // TILE_W)
    for first in range(start, end, TILE_N):
        tokens = first + tl.arange(0, TILE_N)
        key = load_keys(tokens, keys, pool_ptr, pages)
        logits = window_logits(query, key, scale, soft_cap_ptr is not None)
        weights = rated_weights(logits, lse, rows, tokens, keys, WINDOW)
        if POWER == 2:
            weights = weights * weights
        tl.store(
            scores_ptr + head[:, None].to(tl.int64) * scores_stride_group + tokens[None, :],
            _reduced(weights, WINDOW, REDUCTION, TILE_W),
            mask=(head < GROUP)[:, None] & (tokens < num_rated)[None, :],
        )


def num_score_groups(group: int, reduce: str) -> int:
    """Third size of the scores: query heads, of which 'defensive' has taken the maximum."""
    return 1 if reduce == "defensive" else group


def _constants(
    query: torch.Tensor, pool: torch.Tensor, tiles: WindowTiles, num_layers: int, num_kv_heads: int
) -> dict[str, Any]:
    """Constants and options that all kernels that score are launched with."""
    *_, window, num_heads, head_size = query.shape
    tile_d = triton.next_power_of_2(head_size)
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "PAGES_PER_BLOCK": num_layers * num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "WINDOW": window,
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": pool.shape[1],
        "NUM_M_TILES": tiles.num_m_tiles,
        "TILE_M": tiles.tile_m,
        "TILE_N": TILE_N,
        "TILE_W": tiles.tile_w,
        "TILE_D": tile_d,
        "num_warps": tiles.num_warps,
        "num_stages": num_stages(TILE_N * tile_d * pool.element_size()),
    }


def window_scores(
    query: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    num_rated: torch.Tensor,
    key_scale: torch.Tensor | None,
    scores: torch.Tensor,
    *,
    layer: int,
    num_layers: int,
    num_kv_heads: int,
    scale: torch.Tensor,
    logits_soft_cap: torch.Tensor | None,
    reduce: str,
    power: int,
    near_tokens: int,
    pool_kernel: int,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    part_sums: torch.Tensor | None,
) -> None:
    """See `ops.window_scores`; query and lse have the dimension of layers."""
    num_requests, num_scored, window, num_heads, _ = query.shape
    num_streams, max_rated = num_scored * num_kv_heads, scores.shape[-1]
    if num_requests == 0 or max_rated == 0:
        return
    tiles = window_tiles(num_heads // num_kv_heads, window)
    arguments = (
        query,
        pool,
        rows,
        block_table,
        num_rated,
        lse,
        key_scale,
        scale,
        logits_soft_cap,
        layer * num_kv_heads,
        near_tokens,
        *query.stride()[:4],
        *((0, 0) if lse is None else lse.stride()[:2]),
        block_table.stride(0),
    )
    shape = _constants(query, pool, tiles, num_layers, num_kv_heads)
    shape["NUM_SPLITS"] = num_splits(lse is not None)
    # Two programs of eight warps fit a multiprocessor of sm_90, without a stack.
    is_limited = tiles.num_warps == 8 and shape["TILE_D"] <= 128
    limited = shape | {"maxnreg": 128} if is_limited else shape
    grid = (num_streams, num_requests)
    if reduce == "defensive":
        pooling = {"POOL_KERNEL": pool_kernel}
        sums = window_sums(grid, tiles.num_rows, arguments, limited | pooling)
        # Bound by arithmetic where there are many query rows; fewer registers would not do.
        defensive_scores((scores, sums, sinks), part_sums, arguments, shape | pooling)
        return
    sums = None
    if lse is None:
        sums = window_sums(grid, tiles.num_rows, arguments, limited | {"POOL_KERNEL": 1})
    num_tiles = triton.cdiv(max_rated, TILE_N)
    per_program = tiles_per_program(num_tiles * tiles.num_m_tiles * num_streams * num_requests)
    _window_scores_kernel[(triton.cdiv(num_tiles, per_program) * tiles.num_m_tiles, *grid)](
        scores,
        sums,
        sinks,
        *arguments,
        per_program,
        *scores.stride()[:3],
        REDUCTION=_REDUCE[reduce],
        POWER=power,
        **limited,
    )
