"""DefensiveKV's reduction over the window: the worst case of pooled weights (arXiv 2510.13334)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .paging import INTERPRETED, dot, load_row
from .window_sums import gain_by_lse, merged_sums
from .window_tiles import (
    TILE_N,
    UNALIGNED_PARAMETERS,
    UNSPECIALIZED,
    PageShape,
    PromptKeys,
    QueryRows,
    WindowShape,
    at_layer,
    load_keys,
    load_logit_scale,
    load_lse,
    load_queries,
    load_sinks,
    query_rows,
    rated_weights,
    tiles_per_program,
    window_logits,
)


class _Window(NamedTuple):
    """Where a prompt's window of one layer and KV head lies, and what is known of its softmax.

    Attributes:
        request, scored_stream: whose it is.
        query, stride_token, stride_head: of the queries.
        lse: of the queries, or None.
        sums: of all prompts, see `window_sums`.
        sinks: of all layers, or None.
    """

    request: tl.tensor
    scored_stream: tl.tensor
    query: tl.tensor
    stride_token: tl.tensor
    stride_head: tl.tensor
    lse: tl.tensor
    sums: tl.tensor
    sinks: tl.tensor


class _QueryTile(NamedTuple):
    """A tile of query rows, with what turns their logits into pooled weights.

    Attributes:
        rows: which they are.
        query: [TILE_M, TILE_D].
        lse: [TILE_M], base 2.
        gain: [TILE_M] factor on sums of pooled weights.
    """

    rows: QueryRows
    query: tl.tensor
    lse: tl.tensor
    gain: tl.tensor


@triton.jit
def _is_near(lane, HALO: tl.constexpr):
    """[N, N] which keys of a tile a pooling joins."""
    distance = lane[:, None] - lane[None, :]
    return (distance <= HALO) & (distance >= -HALO)


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
def _load_query_tile(
    m_tile,
    window,
    num_rated,
    POOL_KERNEL: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    pages: tl.constexpr,
    shape: tl.constexpr,
):
    """One `_QueryTile`."""
    scored_stream = window.scored_stream
    rows = query_rows(m_tile, scored_stream, shape)
    query = load_queries(window.query, rows, window.stride_token, window.stride_head, pages)
    sink = load_sinks(window.sinks, scored_stream // shape.NUM_KV_HEADS, rows, shape)
    if window.lse is not None:
        lse = load_lse(window.lse, rows, shape)
        has_sinks: tl.constexpr = window.sinks is not None
        gain = gain_by_lse(
            window.sums,
            window.request,
            scored_stream,
            rows,
            lse,
            sink,
            has_sinks,
            NUM_SPLITS,
            shape,
        )
        gain /= POOL_KERNEL
        # Pooling keeps this part of any key's weight at least. Where nearly all attention is on
        # keys that are not rated, sums by the lse are differences of rounded numbers.
        least_kept = tl.minimum(POOL_KERNEL // 2 + 1, num_rated).to(tl.float32)
        gain = tl.minimum(gain, 1 / least_kept)
    else:
        lse, gain = merged_sums(
            window.sums, window.request, scored_stream, rows, sink, NUM_SPLITS, shape
        )
        gain /= POOL_KERNEL
    return _QueryTile(rows, query, lse, gain)


@triton.jit
def _worst_case(
    tile, key, near, tokens, keys, scale, HAS_SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr
):
    """[TILE_N] greatest pooled weight of any query row."""
    logits = window_logits(tile.query, key, scale, HAS_SOFT_CAP)
    weights = rated_weights(logits, tile.lse, tile.rows, tokens, keys, WINDOW)
    return tl.max(_sums_of_near(weights, near) * tile.gain[:, None], axis=0)


@triton.jit
def _clear_parts(part_sums_ptr, first_part, end_part):
    """Write zeros as the sums of parts behind the prompt's end, which others of the batch have."""
    for part in range(first_part, end_part):
        tl.store(part_sums_ptr + part, 0.0)


# One function: nearly half of it names arguments, and the rest is one loop over tiles of keys.
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
    first_part = tl.program_id(0) * tiles_per_program
    start = first_part * STEP
    if part_sums_ptr is not None:
        part_sums_ptr += (request * tl.num_programs(1) + scored_stream).to(tl.int64) * num_parts
        first_empty = tl.maximum(first_part, tl.cdiv(num_rated, STEP))
        end_part = tl.minimum(first_part + tiles_per_program, num_parts)
        _clear_parts(part_sums_ptr, first_empty, end_part)
    if start >= num_rated:
        return
    end = tl.minimum(start + tiles_per_program * STEP, num_rated)
    pages: tl.constexpr = PageShape(PAGES_PER_BLOCK, BLOCK_SIZE, HEAD_SIZE, TILE_D)
    shape: tl.constexpr = WindowShape(NUM_KV_HEADS, GROUP, WINDOW, TILE_M, TILE_W, NUM_M_TILES)
    layer_index = scored_stream // NUM_KV_HEADS
    row = load_row(rows_ptr, table_ptr, request, table_stride)
    keys = PromptKeys(row, first_stream + scored_stream, num_rated, near_tokens)
    scale = load_logit_scale(scale_ptr, key_scale_ptr, soft_cap_ptr, layer_index, keys.stream)
    query_ptr = at_layer(query_ptr, request, layer_index, query_stride_request, query_stride_layer)
    if lse_ptr is not None:
        lse_ptr = at_layer(lse_ptr, request, layer_index, lse_stride_request, lse_stride_layer)
    window = _Window(
        request,
        scored_stream,
        query_ptr,
        query_stride_token,
        query_stride_head,
        lse_ptr,
        sums_ptr,
        sinks_ptr,
    )
    scores_ptr = at_layer(
        scores_ptr, request, scored_stream, scores_stride_request, scores_stride_stream
    )
    lane = tl.arange(0, TILE_N)
    near = _is_near(lane, HALO)
    HAS_SOFT_CAP: tl.constexpr = soft_cap_ptr is not None
    if NUM_M_TILES == 1:
        tile = _load_query_tile(0, window, num_rated, POOL_KERNEL, NUM_SPLITS, pages, shape)
    for first in range(start, end, STEP):
        tokens = first - HALO + lane
        key = load_keys(tokens, keys, pool_ptr, pages)
        if NUM_M_TILES == 1:
            score = _worst_case(tile, key, near, tokens, keys, scale, HAS_SOFT_CAP, WINDOW)
        else:
            # More rows than a program holds: they are read again for each tile of keys.
            score = tl.full([TILE_N], float("-inf"), tl.float32)
            for m_tile in tl.range(NUM_M_TILES, num_stages=1):
                tile = _load_query_tile(
                    m_tile, window, num_rated, POOL_KERNEL, NUM_SPLITS, pages, shape
                )
                worst = _worst_case(tile, key, near, tokens, keys, scale, HAS_SOFT_CAP, WINDOW)
                score = tl.maximum(score, worst)
        written = (lane >= HALO) & (lane < TILE_N - HALO) & (tokens < num_rated)
        tl.store(scores_ptr + tokens, score, mask=written)
        if part_sums_ptr is not None:
            tl.store(part_sums_ptr + first // STEP, tl.sum(tl.where(written, score, 0.0), axis=0))


def num_score_parts(max_rated: int, pool_kernel: int) -> int:
    """Parts that the scores of a stream are summed by."""
    return triton.cdiv(max_rated, TILE_N - 2 * (pool_kernel // 2))


def defensive_scores(
    leading: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    part_sums: torch.Tensor | None,
    arguments: tuple[Any, ...],
    shape: dict[str, Any],
) -> None:
    """Launch the kernel.

    Args:
        leading: scores [R, streams, 1, N] float32, written; sums of `window_sums`; sinks or
            None.
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
        part_sums,
        num_parts,
        per_program,
        scores.stride(0),
        scores.stride(1),
        **shape,
    )
