"""Attention of a prompt's last queries to all its keys, read from pages, reduced to scores."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .defensive_score import defensive_scores
from .paging import (
    ROW_BOUNDARY_BLOCK,
    ROW_NUM_REGION_BLOCKS,
    ROW_REGION_COLUMN,
    ROW_SEQ_LEN,
    ROW_WIDTH,
)
from .window_sums import merged_sums, num_splits, window_sums
from .window_tiles import (
    TILE_N,
    UNALIGNED_PARAMETERS,
    UNSPECIALIZED,
    load_keys,
    load_lse,
    load_queries,
    load_sinks,
    num_stages,
    rated_weights,
    split_rows,
    tiles_per_program,
    window_logits,
    window_tiles,
)

# Reductions over the window, as the kernel knows them; 'defensive' has a kernel of its own.
_REDUCE = {"mean": 0, "sum": 1, "max": 2}


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
    HAS_KEY_SCALE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    REDUCTION: tl.constexpr,
    POWER: tl.constexpr,
    POOL_KERNEL: tl.constexpr,
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
    layer_index = scored_stream // NUM_KV_HEADS
    row_ptr = rows_ptr + request * ROW_WIDTH
    table_row_ptr = table_ptr + request.to(tl.int64) * table_stride
    stream = first_stream + scored_stream
    num_keys = tl.load(row_ptr + ROW_SEQ_LEN)
    # Loaded here: a chain of three loads inside the loop would keep it from being pipelined.
    num_region_blocks = tl.load(row_ptr + ROW_NUM_REGION_BLOCKS)
    region_column = tl.load(row_ptr + ROW_REGION_COLUMN)
    boundary_block = tl.load(row_ptr + ROW_BOUNDARY_BLOCK)
    factor = tl.load(scale_ptr + layer_index)
    if HAS_KEY_SCALE:
        factor *= tl.load(key_scale_ptr + stream)
    soft_cap = 0.0
    if HAS_SOFT_CAP:
        soft_cap = tl.load(soft_cap_ptr + layer_index)
    rows, group_head, place, row_mask = split_rows(m_tile, GROUP, WINDOW, TILE_M, TILE_W)
    query_head = scored_stream % NUM_KV_HEADS * GROUP + group_head
    query_ptr += request.to(tl.int64) * query_stride_request
    query_ptr += layer_index.to(tl.int64) * query_stride_layer
    query = load_queries(
        query_ptr,
        query_head,
        place,
        row_mask,
        query_stride_token,
        query_stride_head,
        HEAD_SIZE,
        TILE_D,
    )
    lse_ptr += request.to(tl.int64) * lse_stride_request
    lse_ptr += layer_index.to(tl.int64) * lse_stride_layer
    if HAS_LSE:
        lse = load_lse(lse_ptr, query_head, place, row_mask, NUM_KV_HEADS * GROUP)
    else:
        sink = load_sinks(
            sinks_ptr, layer_index, query_head, row_mask, HAS_SINKS, NUM_KV_HEADS * GROUP, TILE_M
        )
        lse, _ = merged_sums(
            sums_ptr,
            request,
            scored_stream,
            rows,
            sink,
            sink,
            False,
            HAS_SINKS,
            NUM_SPLITS,
            NUM_M_TILES * TILE_M,
        )
    scores_ptr += request.to(tl.int64) * scores_stride_request
    scores_ptr += scored_stream.to(tl.int64) * scores_stride_stream
    group_head = m_tile * (TILE_M // TILE_W) + tl.arange(0, TILE_M // TILE_W)
    for first in range(start, end, TILE_N):
        tokens = first + tl.arange(0, TILE_N)
        key = load_keys(
            tokens,
            num_keys,
            pool_ptr,
            table_row_ptr,
            stream,
            num_region_blocks,
            region_column,
            boundary_block,
            PAGES_PER_BLOCK,
            BLOCK_SIZE,
            HEAD_SIZE,
            TILE_D,
        )
        logits = window_logits(query, key, factor, soft_cap, HAS_SOFT_CAP)
        weights = rated_weights(
            logits, lse, place, row_mask, tokens, num_keys, num_rated, near_tokens, WINDOW
        )
        if POWER == 2:
            weights = weights * weights
        by_head = tl.reshape(weights, [TILE_M // TILE_W, TILE_W, TILE_N])
        if REDUCTION == 2:
            score = tl.max(by_head, axis=1)
        else:
            score = tl.sum(by_head, axis=1)
            if REDUCTION == 0:
                score = score / WINDOW
        tl.store(
            scores_ptr + group_head[:, None].to(tl.int64) * scores_stride_group + tokens[None, :],
            score,
            mask=(group_head < GROUP)[:, None] & (tokens < num_rated)[None, :],
        )


def num_score_groups(group: int, reduce: str) -> int:
    """Third size of the scores: query heads, of which 'defensive' has taken the maximum."""
    return 1 if reduce == "defensive" else group


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
    num_requests, num_scored, window, num_heads, head_size = query.shape
    group = num_heads // num_kv_heads
    max_rated = scores.shape[-1]
    if num_requests == 0 or max_rated == 0:
        return
    tiles = window_tiles(group, window)
    is_defensive = reduce == "defensive"
    num_streams = num_scored * num_kv_heads
    tile_bytes = TILE_N * triton.next_power_of_2(head_size) * pool.element_size()
    # Any pointer will do where a part is left out.
    arguments = (
        query,
        pool,
        rows,
        block_table,
        num_rated,
        scale if lse is None else lse,
        scale if key_scale is None else key_scale,
        scale,
        scale if logits_soft_cap is None else logits_soft_cap,
        layer * num_kv_heads,
        near_tokens,
        *query.stride()[:4],
        *((0, 0) if lse is None else lse.stride()[:2]),
        block_table.stride(0),
    )
    shape: dict[str, Any] = {
        "NUM_KV_HEADS": num_kv_heads,
        "PAGES_PER_BLOCK": num_layers * num_kv_heads,
        "GROUP": group,
        "WINDOW": window,
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": pool.shape[1],
        "HAS_KEY_SCALE": key_scale is not None,
        "HAS_SOFT_CAP": logits_soft_cap is not None,
        "HAS_LSE": lse is not None,
        "POOL_KERNEL": pool_kernel if is_defensive else 1,
        "NUM_SPLITS": num_splits(lse is not None),
        "NUM_M_TILES": tiles.num_m_tiles,
        "TILE_M": tiles.tile_m,
        "TILE_N": TILE_N,
        "TILE_W": tiles.tile_w,
        "TILE_D": triton.next_power_of_2(head_size),
        "num_warps": tiles.num_warps,
        "num_stages": num_stages(tile_bytes),
    }
    # Two programs of eight warps fit a multiprocessor of sm_90, without a stack.
    is_limited = tiles.num_warps == 8 and shape["TILE_D"] <= 128
    limited = shape | {"maxnreg": 128} if is_limited else shape
    sums = scale
    if lse is None or is_defensive:
        sums = window_sums((num_streams, num_requests), tiles.num_rows, arguments, limited)
    leading = (scores, sums, scale if sinks is None else sinks)
    has_sinks = {"HAS_SINKS": sinks is not None}
    if is_defensive:
        # Bound by arithmetic where there are many query rows; fewer registers would not do.
        defensive_scores(leading, part_sums, arguments, shape | has_sinks)
        return
    num_tiles = triton.cdiv(max_rated, TILE_N)
    per_program = tiles_per_program(num_tiles * tiles.num_m_tiles * num_streams * num_requests)
    num_programs = triton.cdiv(num_tiles, per_program) * tiles.num_m_tiles
    _window_scores_kernel[(num_programs, num_streams, num_requests)](
        *leading,
        *arguments,
        per_program,
        *scores.stride()[:3],
        REDUCTION=_REDUCE[reduce],
        POWER=power,
        **limited,
        **has_sinks,
    )
