"""DefensiveKV's reduction over the window: the worst case of pooled weights (arXiv 2510.13334)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .paging import (
    INTERPRETED,
    ROW_BOUNDARY_BLOCK,
    ROW_NUM_REGION_BLOCKS,
    ROW_REGION_COLUMN,
    ROW_SEQ_LEN,
    ROW_WIDTH,
    dot,
)
from .window_sums import merged_sums
from .window_tiles import (
    TILE_N,
    UNALIGNED_PARAMETERS,
    UNSPECIALIZED,
    load_keys,
    load_lse,
    load_queries,
    load_sinks,
    rated_weights,
    split_rows,
    tiles_per_program,
    window_logits,
)


@triton.jit
def _sums_of_near(weights, near):
    """[M, N] float32 times an [N, N] matrix of ones and zeros, in float32."""
    if INTERPRETED:
        return dot(weights, near.to(tl.float32))
    # Three bfloat16 numbers hold a float32, and ones are exact.
    ones = near.to(tl.bfloat16)
    high = weights.to(tl.bfloat16)
    rest = weights - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(high, ones, tl.dot(middle, ones, tl.dot(low, ones)))


@triton.jit
def _query_rows(
    m_tile,
    sums_ptr,
    sinks_ptr,
    query_ptr,
    lse_ptr,
    request,
    scored_stream,
    num_rated,
    query_stride_token,
    query_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    POOL_KERNEL: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_M_TILES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """A tile of query rows: places, mask, queries, lse, and the factor on pooled weights."""
    rows, group_head, place, row_mask = split_rows(m_tile, GROUP, WINDOW, TILE_M, TILE_W)
    query_head = scored_stream % NUM_KV_HEADS * GROUP + group_head
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
    sink = load_sinks(
        sinks_ptr,
        scored_stream // NUM_KV_HEADS,
        query_head,
        row_mask,
        HAS_SINKS,
        NUM_KV_HEADS * GROUP,
        TILE_M,
    )
    lse = sink
    if HAS_LSE:
        lse = load_lse(lse_ptr, query_head, place, row_mask, NUM_KV_HEADS * GROUP)
    lse, gain = merged_sums(
        sums_ptr,
        request,
        scored_stream,
        rows,
        lse,
        sink,
        HAS_LSE,
        HAS_SINKS,
        NUM_SPLITS,
        NUM_M_TILES * TILE_M,
    )
    gain /= POOL_KERNEL
    if HAS_LSE:
        # Pooling keeps this part of any key's weight at least. Where nearly all attention is on
        # keys that are not rated, sums by the lse are differences of rounded numbers.
        least_kept = tl.minimum(POOL_KERNEL // 2 + 1, num_rated).to(tl.float32)
        gain = tl.minimum(gain, 1 / least_kept)
    return place, row_mask, query, lse, gain


@triton.jit
def _worst_case(
    place,
    row_mask,
    query,
    lse,
    gain,
    key,
    near,
    tokens,
    num_keys,
    num_rated,
    near_tokens,
    factor,
    soft_cap,
    WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    """[TILE_N] greatest pooled weight of any query row."""
    logits = window_logits(query, key, factor, soft_cap, HAS_SOFT_CAP)
    weights = rated_weights(
        logits, lse, place, row_mask, tokens, num_keys, num_rated, near_tokens, WINDOW
    )
    return tl.max(_sums_of_near(weights, near) * gain[:, None], axis=0)


@triton.jit(
    do_not_specialize=[*UNSPECIALIZED, "num_parts", "tiles_per_program"],
    do_not_specialize_on_alignment=UNALIGNED_PARAMETERS,
)
def _defensive_scores_kernel(
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
    part_sums_ptr,
    num_parts,
    tiles_per_program,
    scores_stride_request,
    scores_stride_stream,
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
    HAS_PART_SUMS: tl.constexpr,
    POOL_KERNEL: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_M_TILES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """One score per KV head and rated key, and their sums by parts of as many as a tile writes."""
    scored_stream = tl.program_id(1)
    request = tl.program_id(2)
    num_rated = tl.load(num_rated_ptr + request)
    # Keys are pooled with their neighbours, so that a tile reads a few more than it writes.
    HALO: tl.constexpr = POOL_KERNEL // 2
    STEP: tl.constexpr = TILE_N - 2 * HALO
    first_tile = tl.program_id(0) * tiles_per_program
    start = first_tile * STEP
    if HAS_PART_SUMS:
        part_sums_ptr += (request * tl.num_programs(1) + scored_stream).to(tl.int64) * num_parts
        # Parts behind the prompt's end, which others of the batch have.
        end_tile = tl.minimum(first_tile + tiles_per_program, num_parts)
        for part in range(tl.maximum(first_tile, tl.cdiv(num_rated, STEP)), end_tile):
            tl.store(part_sums_ptr + part, 0.0)
    if start >= num_rated:
        return
    end = tl.minimum(start + tiles_per_program * STEP, num_rated)
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
    query_ptr += request.to(tl.int64) * query_stride_request
    query_ptr += layer_index.to(tl.int64) * query_stride_layer
    lse_ptr += request.to(tl.int64) * lse_stride_request
    lse_ptr += layer_index.to(tl.int64) * lse_stride_layer
    scores_ptr += request.to(tl.int64) * scores_stride_request
    scores_ptr += scored_stream.to(tl.int64) * scores_stride_stream
    lane = tl.arange(0, TILE_N)
    distance = lane[:, None] - lane[None, :]
    near = (distance <= HALO) & (distance >= -HALO)
    if NUM_M_TILES == 1:
        place, row_mask, query, lse, gain = _query_rows(
            0,
            sums_ptr,
            sinks_ptr,
            query_ptr,
            lse_ptr,
            request,
            scored_stream,
            num_rated,
            query_stride_token,
            query_stride_head,
            NUM_KV_HEADS,
            GROUP,
            WINDOW,
            HEAD_SIZE,
            HAS_LSE,
            HAS_SINKS,
            POOL_KERNEL,
            NUM_SPLITS,
            NUM_M_TILES,
            TILE_M,
            TILE_W,
            TILE_D,
        )
    for first in range(start, end, STEP):
        tokens = first - HALO + lane
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
        if NUM_M_TILES == 1:
            score = _worst_case(
                place,
                row_mask,
                query,
                lse,
                gain,
                key,
                near,
                tokens,
                num_keys,
                num_rated,
                near_tokens,
                factor,
                soft_cap,
                WINDOW,
                HAS_SOFT_CAP,
            )
        else:
            # More rows than a program holds: they are read again for each tile of keys.
            score = tl.full([TILE_N], float("-inf"), tl.float32)
            for m_tile in tl.range(NUM_M_TILES, num_stages=1):
                place, row_mask, query, lse, gain = _query_rows(
                    m_tile,
                    sums_ptr,
                    sinks_ptr,
                    query_ptr,
                    lse_ptr,
                    request,
                    scored_stream,
                    num_rated,
                    query_stride_token,
                    query_stride_head,
                    NUM_KV_HEADS,
                    GROUP,
                    WINDOW,
                    HEAD_SIZE,
                    HAS_LSE,
                    HAS_SINKS,
                    POOL_KERNEL,
                    NUM_SPLITS,
                    NUM_M_TILES,
                    TILE_M,
                    TILE_W,
                    TILE_D,
                )
                worst = _worst_case(
                    place,
                    row_mask,
                    query,
                    lse,
                    gain,
                    key,
                    near,
                    tokens,
                    num_keys,
                    num_rated,
                    near_tokens,
                    factor,
                    soft_cap,
                    WINDOW,
                    HAS_SOFT_CAP,
                )
                score = tl.maximum(score, worst)
        written = (lane >= HALO) & (lane < TILE_N - HALO) & (tokens < num_rated)
        tl.store(scores_ptr + tokens, score, mask=written)
        if HAS_PART_SUMS:
            tl.store(part_sums_ptr + first // STEP, tl.sum(tl.where(written, score, 0.0), axis=0))


def num_score_parts(max_rated: int, pool_kernel: int) -> int:
    """Parts that the scores of a stream are summed by."""
    return triton.cdiv(max_rated, TILE_N - 2 * (pool_kernel // 2))


def defensive_scores(
    leading: tuple[torch.Tensor, ...],
    part_sums: torch.Tensor | None,
    arguments: tuple[Any, ...],
    shape: dict[str, Any],
) -> None:
    """Launch the kernel.

    Args:
        leading: scores [R, streams, 1, N] float32, written; sums of `window_sums`; sinks.
        part_sums: [R, streams, parts] float32, written, or None.
        arguments: what the kernel shares with the sums'.
        shape: its constants.
    """
    scores = leading[0]
    num_requests, num_streams, _, max_rated = scores.shape
    tile_m, num_m_tiles = shape["TILE_M"], shape["NUM_M_TILES"]
    if num_m_tiles > 1 and shape["TILE_D"] > 128 and tile_m // 2 >= shape["TILE_W"]:
        # The same rows in smaller tiles, which fit beside keys and sums on smaller GPUs.
        shape = {**shape, "TILE_M": tile_m // 2, "NUM_M_TILES": 2 * num_m_tiles}
    num_parts = num_score_parts(max_rated, shape["POOL_KERNEL"])
    per_program = tiles_per_program(num_parts * num_streams * num_requests)
    grid = (triton.cdiv(num_parts, per_program), num_streams, num_requests)
    _defensive_scores_kernel[grid](
        *leading,
        *arguments,
        scores if part_sums is None else part_sums,
        num_parts,
        per_program,
        scores.stride(0),
        scores.stride(1),
        HAS_PART_SUMS=part_sums is not None,
        **shape,
    )
