"""From the scores of query heads to one score per KV head and token, or page."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .paging import UNALIGNED

JOIN = {"mean": 0, "sum": 1, "max": 2}
PAGE_REDUCE = {"token": 0, "max": 1, "mean": 2, "rms": 3}
_TILE = 256
_TILE_PARTS = 256


class _Scores(NamedTuple):
    """Scores of one prompt and stream, and what they are weighed by.

    Attributes:
        ptr, stride_group: [NUM_GROUPS, N] scores.
        num_rated: tokens that have one.
        floor: least score of a rated token, or None.
        effect, effect_stride: [NUM_KV_HEADS, N] effects of values in the layer's heads, or None.
        head: the stream's KV head.
    """

    ptr: tl.tensor
    stride_group: tl.tensor
    num_rated: tl.tensor
    floor: tl.tensor
    effect: tl.tensor
    effect_stride: tl.tensor
    head: tl.tensor


class _Join(NamedTuple):
    """Constants: how the scores of a token's neighbours and groups become one."""

    NUM_KV_HEADS: tl.constexpr
    NUM_GROUPS: tl.constexpr
    JOIN_KIND: tl.constexpr
    POOL_KERNEL: tl.constexpr
    POOL_IS_MAX: tl.constexpr
    POOL_FIRST: tl.constexpr
    TILE_G: tl.constexpr
    TILE_H: tl.constexpr


@triton.jit
def _join_groups(group_scores, NUM_GROUPS: tl.constexpr, JOIN_KIND: tl.constexpr):
    """[G, N] to [N]; rows past NUM_GROUPS hold what does not count."""
    if JOIN_KIND == 2:
        return tl.max(group_scores, axis=0)
    joined = tl.sum(group_scores, axis=0)
    return joined / NUM_GROUPS if JOIN_KIND == 0 else joined


@triton.jit
def _load_groups(scores, tokens, outside, join: tl.constexpr):
    """[TILE_G, N] scores, `outside` for tokens that are not rated."""
    group = tl.arange(0, join.TILE_G)
    absent = float("-inf") if join.JOIN_KIND == 2 else 0.0
    is_rated = (tokens >= 0) & (tokens < scores.num_rated)
    is_group = group < join.NUM_GROUPS
    loaded = tl.load(
        scores.ptr + group[:, None].to(tl.int64) * scores.stride_group + tokens[None, :],
        mask=is_group[:, None] & is_rated[None, :],
        other=0.0,
    )
    loaded = tl.where(is_rated[None, :], loaded, outside)
    return tl.where(is_group[:, None], loaded, absent)


@triton.jit
def _mean_score(part_sums_ptr, num_parts, num_rated, TILE_PARTS: tl.constexpr):
    """Mean of a stream's joined scores, of their sums by parts."""
    total = tl.zeros([TILE_PARTS], tl.float32)
    for first in range(0, num_parts, TILE_PARTS):
        part = first + tl.arange(0, TILE_PARTS)
        total += tl.load(part_sums_ptr + part, mask=part < num_parts, other=0.0)
    return tl.sum(total, axis=0) / num_rated


@triton.jit
def _pooled_scores(scores, tokens, join: tl.constexpr):
    """[TILE] scores of tokens, pooled with their neighbours' and joined."""
    # What a pooling meets past the ends: nothing to a maximum, zero to a mean.
    outside = float("-inf") if join.POOL_IS_MAX else 0.0
    pooled = tl.full([join.TILE_G, tokens.shape[0]], outside, tl.float32)
    if not join.POOL_FIRST:
        pooled = tl.full([1, tokens.shape[0]], outside, tl.float32)
    for shift in tl.static_range(0, join.POOL_KERNEL):
        groups = _load_groups(scores, tokens + (shift - join.POOL_KERNEL // 2), outside, join)
        if not join.POOL_FIRST:
            groups = _join_groups(groups, join.NUM_GROUPS, join.JOIN_KIND)[None, :]
        if join.POOL_IS_MAX:
            pooled = tl.maximum(pooled, groups)
        else:
            pooled += groups
    if not join.POOL_IS_MAX:
        pooled = pooled / join.POOL_KERNEL
    if join.POOL_FIRST:
        return _join_groups(pooled, join.NUM_GROUPS, join.JOIN_KIND)
    return tl.max(pooled, axis=0)


@triton.jit
def _weighed_scores(scores, tokens, join: tl.constexpr):
    """[TILE] scores of tokens, pooled, joined and weighed; -inf for those that are not rated."""
    score = _pooled_scores(scores, tokens, join)
    if scores.floor is not None:
        score = tl.maximum(score, scores.floor)
    is_rated = (tokens >= 0) & (tokens < scores.num_rated)
    if scores.effect is not None:
        score = tl.where(is_rated, score, 0.0)
        heads = tl.arange(0, join.TILE_H)
        effect = tl.load(
            scores.effect + heads[:, None].to(tl.int64) * scores.effect_stride + tokens[None, :],
            mask=(heads < join.NUM_KV_HEADS)[:, None] & is_rated[None, :],
            other=0.0,
        )
        own = tl.sum(tl.where((heads == scores.head)[:, None], effect, 0.0), axis=0)
        # A token whose values do nothing in any head.
        score = score * (own / tl.maximum(tl.sum(effect, axis=0), 1.1754943508222875e-38))
    return tl.where(is_rated, score, float("-inf"))


@triton.jit
def _best_of_spans(
    scores,
    score,
    first,
    scratch_ptr,
    join: tl.constexpr,
    SPAN_KERNEL: tl.constexpr,
    TILE_HALO: tl.constexpr,
):
    """[TILE] the greatest score of each span around a token, given the tokens' own, from `first`.

    Neighbours go through memory that is this program's own: the tile, and on either side of it the
    tokens that spans reach to.
    """
    HALF: tl.constexpr = SPAN_KERNEL // 2
    TILE: tl.constexpr = score.shape[0]
    lane = tl.arange(0, TILE)
    beside = tl.arange(0, TILE_HALO)
    place = tl.where(beside < HALF, beside, TILE + beside)
    near = _weighed_scores(scores, first - HALF + place, join)
    tl.store(scratch_ptr + HALF + lane, score)
    tl.store(scratch_ptr + place, near, mask=beside < 2 * HALF)
    tl.debug_barrier()
    for shift in tl.static_range(0, SPAN_KERNEL):
        score = tl.maximum(score, tl.load(scratch_ptr + lane + shift))
    return score


@triton.jit
def _page_scores(score, PAGE_KIND: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr):
    """[TILE] to [TILE / PAGE_SIZE]."""
    pages = tl.reshape(score, [TILE // PAGE_SIZE, PAGE_SIZE])
    best = tl.max(pages, axis=1)
    if PAGE_KIND == 1:
        return best
    if PAGE_KIND == 2:
        return tl.sum(pages, axis=1) / PAGE_SIZE
    # Relative to the best, since squares of small scores would underflow.
    unit = tl.where((best > 0) & (best < float("inf")), best, 1.0)
    relative = pages / unit[:, None]
    return unit * tl.sqrt(tl.sum(relative * relative, axis=1) / PAGE_SIZE)


@triton.jit(do_not_specialize=["num_parts"], do_not_specialize_on_alignment=UNALIGNED)
def _join_scores_kernel(
    out_ptr,
    scores_ptr,
    scratch_ptr,
    num_rated_ptr,
    num_candidates_ptr,
    part_sums_ptr,
    effect_ptr,
    num_parts,
    stride_request,
    stride_stream,
    stride_group,
    out_stride_request,
    out_stride_stream,
    effect_stride_request,
    effect_stride_stream,
    NUM_KV_HEADS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    JOIN_KIND: tl.constexpr,
    POOL_KERNEL: tl.constexpr,
    POOL_IS_MAX: tl.constexpr,
    POOL_FIRST: tl.constexpr,
    SPAN_KERNEL: tl.constexpr,
    PAGE_KIND: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    TILE_G: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE: tl.constexpr,
    TILE_HALO: tl.constexpr,
):
    """Tokens' scores joined and weighed, the greatest of a span's, and one per page."""
    stream = tl.program_id(1)
    request = tl.program_id(2)
    num_rated = tl.load(num_rated_ptr + request)
    num_candidates = tl.load(num_candidates_ptr + request)
    first = tl.program_id(0) * TILE
    if first >= num_candidates:
        return
    head = stream % NUM_KV_HEADS
    row_ptr = scores_ptr + request.to(tl.int64) * stride_request
    row_ptr += stream.to(tl.int64) * stride_stream
    row = (request * tl.num_programs(1) + stream).to(tl.int64)
    floor = None
    if part_sums_ptr is not None:
        floor = _mean_score(part_sums_ptr + row * num_parts, num_parts, num_rated, TILE_PARTS)
    if effect_ptr is not None:
        effect_ptr += request.to(tl.int64) * effect_stride_request
        effect_ptr += (stream - head).to(tl.int64) * effect_stride_stream
    scores = _Scores(
        row_ptr, stride_group, num_rated, floor, effect_ptr, effect_stride_stream, head
    )
    join: tl.constexpr = _Join(
        NUM_KV_HEADS, NUM_GROUPS, JOIN_KIND, POOL_KERNEL, POOL_IS_MAX, POOL_FIRST, TILE_G, TILE_H
    )
    tokens = first + tl.arange(0, TILE)
    score = _weighed_scores(scores, tokens, join)
    if SPAN_KERNEL > 1:
        scratch_ptr += (row * tl.num_programs(0) + tl.program_id(0)) * (TILE + TILE_HALO)
        score = _best_of_spans(scores, score, first, scratch_ptr, join, SPAN_KERNEL, TILE_HALO)
    out_ptr += request.to(tl.int64) * out_stride_request
    out_ptr += stream.to(tl.int64) * out_stride_stream
    if PAGE_KIND == 0:
        tl.store(out_ptr + tokens, score, mask=tokens < num_candidates)
    else:
        # Candidates are whole pages.
        page = first // PAGE_SIZE + tl.arange(0, TILE // PAGE_SIZE)
        page_score = _page_scores(score, PAGE_KIND, PAGE_SIZE, TILE)
        tl.store(out_ptr + page, page_score, mask=page < num_candidates // PAGE_SIZE)


def join_scores(
    scores: torch.Tensor,
    num_rated: torch.Tensor,
    num_candidates: torch.Tensor,
    effect: torch.Tensor | None,
    out: torch.Tensor,
    *,
    max_candidates: int,
    num_kv_heads: int,
    group_reduce: str,
    pool_kernel: int,
    pool_kind: str,
    pool_first: bool,
    floor_at_mean: bool,
    span_kernel: int,
    page_reduce: str,
    page_size: int,
    part_sums: torch.Tensor | None,
) -> None:
    """See `ops.join_scores`."""
    num_requests, num_streams, num_groups, _ = scores.shape
    num_tiles = triton.cdiv(max_candidates, _TILE)
    if num_requests == 0 or num_tiles == 0:
        return
    scratch, tile_halo = None, 0
    if span_kernel > 1:
        tile_halo = triton.next_power_of_2(2 * (span_kernel // 2))
        size = (num_requests, num_streams, num_tiles, _TILE + tile_halo)
        scratch = torch.empty(size, dtype=torch.float32, device=scores.device)
    _join_scores_kernel[(num_tiles, num_streams, num_requests)](
        out,
        scores,
        scratch,
        num_rated,
        num_candidates,
        # Where a part is None, the kernel leaves its step out.
        part_sums if floor_at_mean else None,
        effect,
        0 if part_sums is None else part_sums.shape[2],
        *scores.stride()[:3],
        *out.stride()[:2],
        *((0, 0) if effect is None else effect.stride()[:2]),
        NUM_KV_HEADS=num_kv_heads,
        NUM_GROUPS=num_groups,
        JOIN_KIND=JOIN[group_reduce],
        POOL_KERNEL=pool_kernel,
        POOL_IS_MAX=pool_kind == "max",
        POOL_FIRST=pool_first,
        SPAN_KERNEL=span_kernel,
        PAGE_KIND=PAGE_REDUCE[page_reduce],
        PAGE_SIZE=page_size,
        TILE_PARTS=_TILE_PARTS,
        TILE_G=triton.next_power_of_2(num_groups),
        TILE_H=triton.next_power_of_2(num_kv_heads),
        TILE=_TILE,
        TILE_HALO=tile_halo,
        num_warps=4,
    )
