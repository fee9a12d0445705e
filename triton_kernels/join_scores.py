"""From the scores of query heads to one score per KV head and token, or page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .paging import UNALIGNED

JOIN = {"mean": 0, "sum": 1, "max": 2}
PAGE_REDUCE = {"token": 0, "max": 1, "mean": 2, "rms": 3}
_TILE = 256
_NUM_CHUNKS = 32


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
        row_ptr + group[:, None] * stride_group + tokens[None, :],
        mask=is_group[:, None] & is_rated[None, :],
        other=0.0,
    )
    scores = tl.where(is_rated[None, :], scores, outside)
    return tl.where(is_group[:, None], scores, absent)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _mean_scores_kernel(
    sums_ptr,
    scores_ptr,
    num_rated_ptr,
    stride_request,
    stride_head,
    stride_group,
    NUM_GROUPS: tl.constexpr,
    JOIN_KIND: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    TILE_G: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum of the joined scores of one chunk of a head's tokens."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    num_rated = tl.load(num_rated_ptr + request)
    row_ptr = scores_ptr + request.to(tl.int64) * stride_request + head.to(tl.int64) * stride_head
    tiles = tl.cdiv(tl.cdiv(num_rated, TILE), NUM_CHUNKS)
    start = chunk * tiles * TILE
    total = 0.0
    for first in range(start, tl.minimum(start + tiles * TILE, num_rated), TILE):
        tokens = first + tl.arange(0, TILE)
        groups = _load_groups(
            row_ptr, stride_group, tokens, num_rated, 0.0, NUM_GROUPS, TILE_G, JOIN_KIND
        )
        joined = _join_groups(groups, NUM_GROUPS, JOIN_KIND)
        total += tl.sum(tl.where(tokens < num_rated, joined, 0.0), axis=0)
    tl.store(sums_ptr + (request * tl.num_programs(1) + head) * NUM_CHUNKS + chunk, total)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _join_scores_kernel(
    out_ptr,
    scores_ptr,
    num_rated_ptr,
    sums_ptr,
    effect_ptr,
    stride_request,
    stride_head,
    stride_group,
    out_stride_request,
    out_stride_head,
    effect_stride_request,
    effect_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    JOIN_KIND: tl.constexpr,
    POOL_KERNEL: tl.constexpr,
    POOL_IS_MAX: tl.constexpr,
    POOL_FIRST: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_EFFECT: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    TILE_G: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE: tl.constexpr,
):
    head = tl.program_id(1)
    request = tl.program_id(2)
    num_rated = tl.load(num_rated_ptr + request)
    first = tl.program_id(0) * TILE
    if first >= num_rated:
        return
    tokens = first + tl.arange(0, TILE)
    row_ptr = scores_ptr + request.to(tl.int64) * stride_request + head.to(tl.int64) * stride_head
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
        chunk = tl.arange(0, NUM_CHUNKS)
        sums = tl.load(sums_ptr + (request * NUM_KV_HEADS + head) * NUM_CHUNKS + chunk)
        score = tl.maximum(score, tl.sum(sums, axis=0) / num_rated)
    if HAS_EFFECT:
        heads = tl.arange(0, TILE_H)
        effect = tl.load(
            effect_ptr
            + request.to(tl.int64) * effect_stride_request
            + heads[:, None].to(tl.int64) * effect_stride_head
            + tokens[None, :],
            mask=(heads < NUM_KV_HEADS)[:, None] & (tokens < num_rated)[None, :],
            other=0.0,
        )
        own = tl.sum(tl.where((heads == head)[:, None], effect, 0.0), axis=0)
        # A token whose values do nothing in any head.
        score = score * (own / tl.maximum(tl.sum(effect, axis=0), 1.1754943508222875e-38))
    out_row_ptr = (
        out_ptr + request.to(tl.int64) * out_stride_request + head.to(tl.int64) * out_stride_head
    )
    tl.store(out_row_ptr + tokens, score, mask=tokens < num_rated)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _widen_kernel(
    out_ptr,
    scores_ptr,
    num_rated_ptr,
    num_candidates_ptr,
    stride_request,
    stride_head,
    out_stride_request,
    out_stride_head,
    KERNEL: tl.constexpr,
    PAGE_KIND: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Max pooling along tokens, then one score per page."""
    head = tl.program_id(1)
    request = tl.program_id(2)
    num_rated = tl.load(num_rated_ptr + request)
    num_candidates = tl.load(num_candidates_ptr + request)
    first = tl.program_id(0) * TILE
    if first >= num_candidates:
        return
    tokens = first + tl.arange(0, TILE)
    row_ptr = scores_ptr + request.to(tl.int64) * stride_request + head.to(tl.int64) * stride_head
    score = tl.full([TILE], float("-inf"), tl.float32)
    for shift in tl.static_range(0, KERNEL):
        place = tokens + (shift - KERNEL // 2)
        near = tl.load(
            row_ptr + place, mask=(place >= 0) & (place < num_rated), other=float("-inf")
        )
        score = tl.maximum(score, near)
    out_row_ptr = (
        out_ptr + request.to(tl.int64) * out_stride_request + head.to(tl.int64) * out_stride_head
    )
    if PAGE_KIND == 0:
        tl.store(out_row_ptr + tokens, score, mask=tokens < num_candidates)
    else:
        # Candidates are whole pages.
        pages = tl.reshape(score, [TILE // PAGE_SIZE, PAGE_SIZE])
        best = tl.max(pages, axis=1)
        if PAGE_KIND == 1:
            page_score = best
        elif PAGE_KIND == 2:
            page_score = tl.sum(pages, axis=1) / PAGE_SIZE
        else:
            # Relative to the best, since squares of small scores would underflow.
            unit = tl.where((best > 0) & (best < float("inf")), best, 1.0)
            relative = pages / unit[:, None]
            page_score = unit * tl.sqrt(tl.sum(relative * relative, axis=1) / PAGE_SIZE)
        page = first // PAGE_SIZE + tl.arange(0, TILE // PAGE_SIZE)
        tl.store(out_row_ptr + page, page_score, mask=page < num_candidates // PAGE_SIZE)


def join_scores(
    scores: torch.Tensor,
    num_rated: torch.Tensor,
    num_candidates: torch.Tensor,
    effect: torch.Tensor | None,
    out: torch.Tensor,
    *,
    group_reduce: str,
    pool_kernel: int,
    pool_kind: str,
    pool_first: bool,
    floor_at_mean: bool,
    span_kernel: int,
    page_reduce: str,
    page_size: int,
) -> None:
    """See `ops.join_scores`."""
    num_requests, num_kv_heads, num_groups, max_rated = scores.shape
    if num_requests == 0 or max_rated == 0:
        return
    # Rows as far apart as those of the scores.
    size = (num_requests, num_kv_heads, scores.stride(2))
    joined = torch.empty(size, dtype=torch.float32, device=scores.device)
    strides = (scores.stride(0), scores.stride(1), scores.stride(2))
    shape = {
        "NUM_GROUPS": num_groups,
        "JOIN_KIND": JOIN[group_reduce],
        "NUM_CHUNKS": _NUM_CHUNKS,
        "TILE_G": triton.next_power_of_2(num_groups),
        "TILE": _TILE,
        "num_warps": 4,
    }
    num_tiles = triton.cdiv(max_rated, _TILE)
    # Any pointer will do where a part is left out.
    sums = joined
    if floor_at_mean:
        size = (num_requests, num_kv_heads, shape["NUM_CHUNKS"])
        sums = torch.empty(size, dtype=torch.float32, device=scores.device)
        _mean_scores_kernel[(shape["NUM_CHUNKS"], num_kv_heads, num_requests)](
            sums, scores, num_rated, *strides, **shape
        )
    _join_scores_kernel[(num_tiles, num_kv_heads, num_requests)](
        joined,
        scores,
        num_rated,
        sums,
        joined if effect is None else effect,
        *strides,
        joined.stride(0),
        joined.stride(1),
        0 if effect is None else effect.stride(0),
        0 if effect is None else effect.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        POOL_KERNEL=pool_kernel,
        POOL_IS_MAX=pool_kind == "max",
        POOL_FIRST=pool_first,
        HAS_FLOOR=floor_at_mean,
        HAS_EFFECT=effect is not None,
        TILE_H=triton.next_power_of_2(num_kv_heads),
        **shape,
    )
    _widen_kernel[(num_tiles, num_kv_heads, num_requests)](
        out,
        joined,
        num_rated,
        num_candidates,
        joined.stride(0),
        joined.stride(1),
        out.stride(0),
        out.stride(1),
        KERNEL=span_kernel,
        PAGE_KIND=PAGE_REDUCE[page_reduce],
        PAGE_SIZE=page_size,
        TILE=_TILE,
        num_warps=4,
    )
