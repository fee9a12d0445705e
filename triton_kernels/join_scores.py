"""From the scores of query heads to one score per KV head and token, or page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .paging import UNALIGNED

JOIN = {"mean": 0, "sum": 1, "max": 2}
PAGE_REDUCE = {"token": 0, "max": 1, "mean": 2, "rms": 3}
_TILE = 256
_TILE_PARTS = 256


@triton.jit
def _join_groups(group_scores, NUM_GROUPS: tl.constexpr, JOIN_KIND: tl.constexpr):
    """[G, N] to [N]; rows past NUM_GROUPS hold what does not count."""
    if JOIN_KIND == 2:
        return tl.max(group_scores, axis=0)
    joined = tl.sum(group_scores, axis=0)
    return joined / NUM_GROUPS if JOIN_KIND == 0 else joined


@triton.jit
def _load_groups(
    row_ptr,
    stride_group,
    tokens,
    num_rated,
    outside,
    NUM_GROUPS: tl.constexpr,
    TILE_G: tl.constexpr,
    JOIN_KIND: tl.constexpr,
):
    """[TILE_G, N] scores, `outside` for tokens that are not rated."""
    group = tl.arange(0, TILE_G)
    absent = float("-inf") if JOIN_KIND == 2 else 0.0
    is_rated = (tokens >= 0) & (tokens < num_rated)
    is_group = group < NUM_GROUPS
    scores = tl.load(
        row_ptr + group[:, None].to(tl.int64) * stride_group + tokens[None, :],
        mask=is_group[:, None] & is_rated[None, :],
        other=0.0,
    )
    scores = tl.where(is_rated[None, :], scores, outside)
    return tl.where(is_group[:, None], scores, absent)


@triton.jit
def _mean_score(part_sums_ptr, num_parts, num_rated, TILE_PARTS: tl.constexpr):
    """Mean of a stream's joined scores, of their sums by parts."""
    total = tl.zeros([TILE_PARTS], tl.float32)
    for first in range(0, num_parts, TILE_PARTS):
        part = first + tl.arange(0, TILE_PARTS)
        total += tl.load(part_sums_ptr + part, mask=part < num_parts, other=0.0)
    return tl.sum(total, axis=0) / num_rated


@triton.jit
def _weighed_scores(
    tokens,
    row_ptr,
    stride_group,
    num_rated,
    floor,
    effect_ptr,
    head,
    effect_stride_stream,
    NUM_KV_HEADS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    JOIN_KIND: tl.constexpr,
    POOL_KERNEL: tl.constexpr,
    POOL_IS_MAX: tl.constexpr,
    POOL_FIRST: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_EFFECT: tl.constexpr,
    TILE_G: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE: tl.constexpr,
):
    """[TILE] scores of tokens, pooled, joined and weighed; -inf for those that are not rated."""
    # What a pooling meets past the ends: nothing to a maximum, zero to a mean.
    outside = float("-inf") if POOL_IS_MAX else 0.0
    pooled = tl.full([TILE_G, TILE], outside, tl.float32)
    if not POOL_FIRST:
        pooled = tl.full([1, TILE], outside, tl.float32)
    for shift in tl.static_range(0, POOL_KERNEL):
        groups = _load_groups(
            row_ptr,
            stride_group,
            tokens + (shift - POOL_KERNEL // 2),
            num_rated,
            outside,
            NUM_GROUPS,
            TILE_G,
            JOIN_KIND,
        )
        if not POOL_FIRST:
            groups = _join_groups(groups, NUM_GROUPS, JOIN_KIND)[None, :]
        if POOL_IS_MAX:
            pooled = tl.maximum(pooled, groups)
        else:
            pooled += groups
    if not POOL_IS_MAX:
        pooled = pooled / POOL_KERNEL
    if POOL_FIRST:
        score = _join_groups(pooled, NUM_GROUPS, JOIN_KIND)
    else:
        score = tl.max(pooled, axis=0)
    if HAS_FLOOR:
        score = tl.maximum(score, floor)
    is_rated = (tokens >= 0) & (tokens < num_rated)
    if HAS_EFFECT:
        score = tl.where(is_rated, score, 0.0)
        heads = tl.arange(0, TILE_H)
        effect = tl.load(
            effect_ptr + heads[:, None].to(tl.int64) * effect_stride_stream + tokens[None, :],
            mask=(heads < NUM_KV_HEADS)[:, None] & is_rated[None, :],
            other=0.0,
        )
        own = tl.sum(tl.where((heads == head)[:, None], effect, 0.0), axis=0)
        # A token whose values do nothing in any head.
        score = score * (own / tl.maximum(tl.sum(effect, axis=0), 1.1754943508222875e-38))
    return tl.where(is_rated, score, float("-inf"))


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
    HAS_FLOOR: tl.constexpr,
    HAS_EFFECT: tl.constexpr,
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
    effect_ptr += request.to(tl.int64) * effect_stride_request
    effect_ptr += (stream - head).to(tl.int64) * effect_stride_stream
    row = (request * tl.num_programs(1) + stream).to(tl.int64)
    floor = 0.0
    if HAS_FLOOR:
        floor = _mean_score(part_sums_ptr + row * num_parts, num_parts, num_rated, TILE_PARTS)
    lane = tl.arange(0, TILE)
    tokens = first + lane
    score = _weighed_scores(
        tokens,
        row_ptr,
        stride_group,
        num_rated,
        floor,
        effect_ptr,
        head,
        effect_stride_stream,
        NUM_KV_HEADS,
        NUM_GROUPS,
        JOIN_KIND,
        POOL_KERNEL,
        POOL_IS_MAX,
        POOL_FIRST,
        HAS_FLOOR,
        HAS_EFFECT,
        TILE_G,
        TILE_H,
        TILE,
    )
    if SPAN_KERNEL > 1:
        # Neighbours go through memory that is this program's own: the tile, and on either side of
        # it the tokens that spans reach to.
        HALF: tl.constexpr = SPAN_KERNEL // 2
        scratch_ptr += (row * tl.num_programs(0) + tl.program_id(0)) * (TILE + TILE_HALO)
        beside = tl.arange(0, TILE_HALO)
        place = tl.where(beside < HALF, beside, TILE + beside)
        near = _weighed_scores(
            first - HALF + place,
            row_ptr,
            stride_group,
            num_rated,
            floor,
            effect_ptr,
            head,
            effect_stride_stream,
            NUM_KV_HEADS,
            NUM_GROUPS,
            JOIN_KIND,
            POOL_KERNEL,
            POOL_IS_MAX,
            POOL_FIRST,
            HAS_FLOOR,
            HAS_EFFECT,
            TILE_G,
            TILE_H,
            TILE_HALO,
        )
        tl.store(scratch_ptr + HALF + lane, score)
        tl.store(scratch_ptr + place, near, mask=beside < 2 * HALF)
        tl.debug_barrier()
        for shift in tl.static_range(0, SPAN_KERNEL):
            score = tl.maximum(score, tl.load(scratch_ptr + lane + shift))
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
    # Any pointer will do where a part is left out.
    scratch = scores
    tile_halo = triton.next_power_of_2(2 * (span_kernel // 2)) if span_kernel > 1 else 0
    if span_kernel > 1:
        size = (num_requests, num_streams, num_tiles, _TILE + tile_halo)
        scratch = torch.empty(size, dtype=torch.float32, device=scores.device)
    _join_scores_kernel[(num_tiles, num_streams, num_requests)](
        out,
        scores,
        scratch,
        num_rated,
        num_candidates,
        scores if part_sums is None else part_sums,
        scores if effect is None else effect,
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
        HAS_FLOOR=floor_at_mean,
        HAS_EFFECT=effect is not None,
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
