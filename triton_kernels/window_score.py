"""Attention of a prompt's last queries to all its keys, read from pages, reduced to scores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .paging import (
    INTERPRETED,
    LOG2E,
    ROW_BOUNDARY_BLOCK,
    ROW_NUM_REGION_BLOCKS,
    ROW_SEQ_LEN,
    ROW_WIDTH,
    UNALIGNED,
    dot,
    prompt_entries,
    squash,
)

# Reductions over the window, as the kernels know them.
REDUCE = {"mean": 0, "sum": 1, "max": 2, "defensive": 3}
DEFENSIVE = tl.constexpr(REDUCE["defensive"])
# Query rows (head of the group x window) that one program holds.
_MAX_TILE_M = 128
# Pieces that the keys are cut into where their sums are not known; few prompts end at once.
_NUM_SPLITS = 32
_PROGRAMS_WANTED = 512
_MAX_TILES_PER_PROGRAM = 8


@triton.jit
def _window_logits(
    query,
    tokens,
    num_keys,
    pool_ptr,
    table_row_ptr,
    stream,
    num_region_blocks,
    boundary_block,
    factor,
    soft_cap,
    PAGES_PER_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """[M, N] base-2 logits of query rows and keys; keys that are not there count as 0."""
    dim = tl.arange(0, TILE_D)
    exists = (tokens >= 0) & (tokens < num_keys)
    entry = prompt_entries(
        tokens,
        exists,
        table_row_ptr,
        stream,
        num_region_blocks,
        boundary_block,
        PAGES_PER_BLOCK,
        BLOCK_SIZE,
        HEAD_SIZE,
    )
    key = tl.load(
        pool_ptr + entry[:, None] + dim[None, :],
        mask=exists[:, None] & (dim < HEAD_SIZE)[None, :],
        other=0.0,
    )
    logits = dot(query, tl.trans(key.to(query.dtype))) * factor
    if HAS_SOFT_CAP:
        logits = squash(logits, soft_cap)
    return logits * LOG2E


@triton.jit
def _window_query(
    query_ptr,
    request,
    head,
    rows,
    query_stride_request,
    query_stride_token,
    query_stride_head,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """Query rows of one KV head, `head of the group * TILE_W + place in the window`."""
    dim = tl.arange(0, TILE_D)
    place = rows % TILE_W
    group_head = rows // TILE_W
    mask = (place < WINDOW) & (group_head < GROUP)
    query = tl.load(
        query_ptr
        + request.to(tl.int64) * query_stride_request
        + place[:, None] * query_stride_token
        + (head * GROUP + group_head)[:, None] * query_stride_head
        + dim[None, :],
        mask=mask[:, None] & (dim < HEAD_SIZE)[None, :],
        other=0.0,
    )
    return query, place, mask


@triton.jit(do_not_specialize=["layer", "table_stride"], do_not_specialize_on_alignment=UNALIGNED)
def _window_sums_kernel(
    sums_ptr,
    query_ptr,
    pool_ptr,
    rows_ptr,
    table_ptr,
    num_rated_ptr,
    lse_ptr,
    key_scale_ptr,
    layer,
    scale,
    soft_cap,
    near_tokens,
    query_stride_request,
    query_stride_token,
    query_stride_head,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_LSE: tl.constexpr,
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
    over these as a mean pooling of POOL_KERNEL weighs them (what it adds up outside is lost).
    With it, relative to the lse: over keys that are not rated, and what the pooling loses; only
    the first and the last keys are read, since no others contribute.
    """
    m_tile = tl.program_id(0) % NUM_M_TILES
    split = tl.program_id(0) // NUM_M_TILES
    head = tl.program_id(1)
    request = tl.program_id(2)
    row_ptr = rows_ptr + request * ROW_WIDTH
    table_row_ptr = table_ptr + request.to(tl.int64) * table_stride
    stream = layer * NUM_KV_HEADS + head
    num_keys = tl.load(row_ptr + ROW_SEQ_LEN)
    # Loaded here: a chain of three loads inside the loop would keep it from being pipelined.
    num_region_blocks = tl.load(row_ptr + ROW_NUM_REGION_BLOCKS)
    boundary_block = tl.load(row_ptr + ROW_BOUNDARY_BLOCK)
    num_rated = tl.load(num_rated_ptr + request)
    rows = m_tile * TILE_M + tl.arange(0, TILE_M)
    query, place, row_mask = _window_query(
        query_ptr,
        request,
        head,
        rows,
        query_stride_request,
        query_stride_token,
        query_stride_head,
        GROUP,
        WINDOW,
        HEAD_SIZE,
        TILE_W,
        TILE_D,
    )
    position = num_keys - WINDOW + place
    factor = scale * tl.load(key_scale_ptr + stream)
    stat = ((request * NUM_KV_HEADS + head) * NUM_M_TILES * TILE_M + rows).to(tl.int64)
    if HAS_LSE:
        # Split 0 reads the first keys, split 1 all that may be near or not rated.
        edge: tl.constexpr = POOL_KERNEL // 2
        tail = tl.minimum(num_rated - edge, num_keys - WINDOW + 1 - near_tokens)
        tail = tl.maximum(tail, 0) // TILE_N * TILE_N
        start = tl.where(split == 0, 0, tl.maximum(tail, TILE_N))
        end = tl.where(split == 0, tl.minimum(num_keys, TILE_N), num_keys)
        best = tl.load(lse_ptr + stat, mask=row_mask, other=0.0)
    else:
        tiles = tl.cdiv(tl.cdiv(num_keys, TILE_N), NUM_SPLITS)
        start = split * tiles * TILE_N
        end = tl.minimum(start + tiles * TILE_N, num_keys)
        best = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    rated = tl.zeros([TILE_M], tl.float32)
    pooled = tl.zeros([TILE_M], tl.float32)
    for first in range(start, end, TILE_N):
        tokens = first + tl.arange(0, TILE_N)
        logits = _window_logits(
            query,
            tokens,
            num_keys,
            pool_ptr,
            table_row_ptr,
            stream,
            num_region_blocks,
            boundary_block,
            factor,
            soft_cap,
            PAGES_PER_BLOCK,
            BLOCK_SIZE,
            HEAD_SIZE,
            HAS_SOFT_CAP,
            TILE_D,
        )
        age = position[:, None] - tokens[None, :]
        logits = tl.where((age >= 0) & row_mask[:, None], logits, float("-inf"))
        is_rated = (age >= near_tokens) & (tokens < num_rated)[None, :]
        # How many windows of the pooling, all inside the rated keys, a key counts in.
        before = tl.minimum(tokens, POOL_KERNEL // 2)
        after = tl.minimum(num_rated - 1 - tokens, POOL_KERNEL // 2)
        share = (before + after + 1).to(tl.float32) / POOL_KERNEL
        if HAS_LSE:
            weights = tl.exp2(logits - best[:, None])
            total += tl.sum(tl.where(is_rated, 0.0, weights), axis=1)
            pooled += tl.sum(tl.where(is_rated, weights * (1 - share)[None, :], 0.0), axis=1)
        else:
            new_best = tl.maximum(best, tl.max(logits, axis=1))
            base = tl.where(new_best == float("-inf"), 0.0, new_best)
            weights = tl.exp2(logits - base[:, None])
            decay = tl.exp2(best - base)
            in_rated = tl.where(is_rated, weights, 0.0)
            total = total * decay + tl.sum(weights, axis=1)
            rated = rated * decay + tl.sum(in_rated, axis=1)
            pooled = pooled * decay + tl.sum(in_rated * share[None, :], axis=1)
            best = new_best
    num_stats = tl.num_programs(2).to(tl.int64) * (NUM_KV_HEADS * NUM_M_TILES * TILE_M)
    out_ptr = sums_ptr + split * 4 * num_stats + stat
    tl.store(out_ptr, best)
    tl.store(out_ptr + num_stats, total)
    tl.store(out_ptr + 2 * num_stats, rated)
    tl.store(out_ptr + 3 * num_stats, pooled)


@triton.jit
def _merge_sums_kernel(
    lse_ptr,
    gain_ptr,
    sums_ptr,
    sinks_ptr,
    num_stats,
    HAS_LSE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_W: tl.constexpr,
    ROWS_PER_HEAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Splits to the base-2 lse of each row, and to what its pooled weights are multiplied by."""
    stat = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = (stat < num_stats)[None, :]
    sink = tl.full([TILE], float("-inf"), tl.float32)
    if HAS_SINKS:
        group_head = stat % ROWS_PER_HEAD // TILE_W
        query_head = stat // ROWS_PER_HEAD % NUM_KV_HEADS * GROUP + group_head
        has_sink = (stat < num_stats) & (group_head < GROUP)
        sink = tl.load(sinks_ptr + query_head, mask=has_sink, other=float("-inf")) * LOG2E
    split = tl.arange(0, NUM_SPLITS)
    ptrs = sums_ptr + split[:, None].to(tl.int64) * 4 * num_stats + stat[None, :]
    total = tl.load(ptrs + num_stats, mask=mask, other=0.0)
    pooled = tl.load(ptrs + 3 * num_stats, mask=mask, other=0.0)
    if HAS_LSE:
        # Weights of keys and sink sum to one.
        all_rated = 1 - tl.sum(total, axis=0)
        if HAS_SINKS:
            lse = tl.load(lse_ptr + stat, mask=stat < num_stats, other=0.0)
            all_rated -= tl.exp2(sink - lse)
        old_sum = tl.maximum(all_rated, 0.0)
        new_sum = old_sum - tl.sum(pooled, axis=0)
    else:
        best = tl.load(ptrs, mask=mask, other=float("-inf"))
        rated = tl.load(ptrs + 2 * num_stats, mask=mask, other=0.0)
        greatest = tl.maximum(tl.max(best, axis=0), sink)
        base = tl.where(greatest == float("-inf"), 0.0, greatest)
        decay = tl.exp2(best - base[None, :])
        all_keys = tl.sum(total * decay, axis=0) + tl.exp2(sink - base)
        old_sum = tl.sum(rated * decay, axis=0)
        new_sum = tl.sum(pooled * decay, axis=0)
        lse = base + tl.log2(tl.where(all_keys > 0, all_keys, 1.0))
        tl.store(lse_ptr + stat, lse, mask=stat < num_stats)
    gain = tl.where(new_sum > 0, old_sum / tl.where(new_sum > 0, new_sum, 1.0), 0.0)
    tl.store(gain_ptr + stat, gain, mask=stat < num_stats)


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


@triton.jit(
    do_not_specialize=["layer", "tiles_per_program", "table_stride"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def _window_scores_kernel(
    scores_ptr,
    query_ptr,
    pool_ptr,
    rows_ptr,
    table_ptr,
    num_rated_ptr,
    lse_ptr,
    gain_ptr,
    key_scale_ptr,
    layer,
    scale,
    soft_cap,
    near_tokens,
    tiles_per_program,
    query_stride_request,
    query_stride_token,
    query_stride_head,
    table_stride,
    scores_stride_request,
    scores_stride_head,
    scores_stride_group,
    NUM_KV_HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    REDUCTION: tl.constexpr,
    POWER: tl.constexpr,
    POOL_KERNEL: tl.constexpr,
    NUM_M_TILES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_W: tl.constexpr,
    TILE_D: tl.constexpr,
):
    m_tile = tl.program_id(0) % NUM_M_TILES
    head = tl.program_id(1)
    request = tl.program_id(2)
    num_rated = tl.load(num_rated_ptr + request)
    # The defensive reduction pools along keys, and reads a few more than it writes.
    HALO: tl.constexpr = POOL_KERNEL // 2 if REDUCTION == DEFENSIVE else 0
    STEP: tl.constexpr = TILE_N - 2 * HALO
    start = tl.program_id(0) // NUM_M_TILES * tiles_per_program * STEP
    if start >= num_rated:
        return
    end = tl.minimum(start + tiles_per_program * STEP, num_rated)
    row_ptr = rows_ptr + request * ROW_WIDTH
    table_row_ptr = table_ptr + request.to(tl.int64) * table_stride
    stream = layer * NUM_KV_HEADS + head
    num_keys = tl.load(row_ptr + ROW_SEQ_LEN)
    # Loaded here: a chain of three loads inside the loop would keep it from being pipelined.
    num_region_blocks = tl.load(row_ptr + ROW_NUM_REGION_BLOCKS)
    boundary_block = tl.load(row_ptr + ROW_BOUNDARY_BLOCK)
    factor = scale * tl.load(key_scale_ptr + stream)
    rows = m_tile * TILE_M + tl.arange(0, TILE_M)
    query, place, row_mask = _window_query(
        query_ptr,
        request,
        head,
        rows,
        query_stride_request,
        query_stride_token,
        query_stride_head,
        GROUP,
        WINDOW,
        HEAD_SIZE,
        TILE_W,
        TILE_D,
    )
    stat = ((request * NUM_KV_HEADS + head) * NUM_M_TILES * TILE_M + rows).to(tl.int64)
    lse = tl.load(lse_ptr + stat, mask=row_mask, other=0.0)
    gain = tl.zeros([TILE_M], tl.float32)
    if REDUCTION == DEFENSIVE:
        gain = tl.load(gain_ptr + stat, mask=row_mask, other=0.0) / POOL_KERNEL
    position = num_keys - WINDOW + place
    lane = tl.arange(0, TILE_N)
    score_ptr = (
        scores_ptr
        + request.to(tl.int64) * scores_stride_request
        + head.to(tl.int64) * scores_stride_head
    )
    for first in range(start, end, STEP):
        tokens = first - HALO + lane
        logits = _window_logits(
            query,
            tokens,
            num_keys,
            pool_ptr,
            table_row_ptr,
            stream,
            num_region_blocks,
            boundary_block,
            factor,
            soft_cap,
            PAGES_PER_BLOCK,
            BLOCK_SIZE,
            HEAD_SIZE,
            HAS_SOFT_CAP,
            TILE_D,
        )
        age = position[:, None] - tokens[None, :]
        is_rated = row_mask[:, None] & (age >= tl.maximum(near_tokens, 0))
        is_rated = is_rated & ((tokens >= 0) & (tokens < num_rated))[None, :]
        weights = tl.where(is_rated, tl.exp2(logits - lse[:, None]), 0.0)
        if REDUCTION == DEFENSIVE:
            distance = lane[:, None] - lane[None, :]
            near = (distance <= HALO) & (distance >= -HALO)
            score = tl.max(_sums_of_near(weights, near) * gain[:, None], axis=0)
            written = (lane >= HALO) & (lane < TILE_N - HALO) & (tokens < num_rated)
            tl.store(score_ptr + m_tile * scores_stride_group + tokens, score, mask=written)
        else:
            if POWER == 2:
                weights = weights * weights
            by_head = tl.reshape(weights, [TILE_M // TILE_W, TILE_W, TILE_N])
            if REDUCTION == 2:
                score = tl.max(by_head, axis=1)
            else:
                score = tl.sum(by_head, axis=1)
                if REDUCTION == 0:
                    score = score / WINDOW
            group_head = m_tile * (TILE_M // TILE_W) + tl.arange(0, TILE_M // TILE_W)
            tl.store(
                score_ptr + group_head[:, None] * scores_stride_group + tokens[None, :],
                score,
                mask=(group_head < GROUP)[:, None] & (tokens < num_rated)[None, :],
            )


def _window_tiles(group: int, window: int) -> tuple[int, int, int]:
    """(TILE_W, TILE_M, number of tiles of query rows)."""
    tile_w = max(16, triton.next_power_of_2(window))
    tile_m = max(tile_w, min(_MAX_TILE_M, tile_w * triton.next_power_of_2(group)))
    return tile_w, tile_m, triton.cdiv(group, tile_m // tile_w)


def num_score_groups(group: int, window: int, reduce: str) -> int:
    """Third size of the scores: query heads, or what is left of them to take the maximum of."""
    return _window_tiles(group, window)[2] if reduce == "defensive" else group


def window_scores(
    query: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    num_rated: torch.Tensor,
    key_scale: torch.Tensor,
    scores: torch.Tensor,
    *,
    layer: int,
    num_layers: int,
    num_kv_heads: int,
    scale: float,
    logits_soft_cap: float,
    reduce: str,
    power: int,
    near_tokens: int,
    pool_kernel: int,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    """See `ops.window_scores`."""
    num_requests, window, num_heads, head_size = query.shape
    group = num_heads // num_kv_heads
    max_rated = scores.shape[-1]
    if num_requests == 0 or max_rated == 0:
        return
    tile_w, tile_m, num_m_tiles = _window_tiles(group, window)
    tile_n = 64
    num_stats = num_requests * num_kv_heads * num_m_tiles * tile_m
    shape = {
        "NUM_KV_HEADS": num_kv_heads,
        "PAGES_PER_BLOCK": num_layers * num_kv_heads,
        "GROUP": group,
        "WINDOW": window,
        "HEAD_SIZE": head_size,
        "BLOCK_SIZE": pool.shape[1],
        "HAS_SOFT_CAP": logits_soft_cap > 0,
        "POOL_KERNEL": pool_kernel if reduce == "defensive" else 1,
        "NUM_M_TILES": num_m_tiles,
        "TILE_M": tile_m,
        "TILE_N": tile_n,
        "TILE_W": tile_w,
        "TILE_D": triton.next_power_of_2(head_size),
        "num_warps": 8 if tile_m > 64 else 4,
    }
    query_strides = (query.stride(0), query.stride(1), query.stride(2))
    gain = torch.empty(num_stats, dtype=torch.float32, device=query.device)
    if lse is None:
        stats_lse = torch.empty(num_stats, dtype=torch.float32, device=query.device)
    else:
        stats_lse = _lse_by_stat(lse, num_kv_heads, tile_w, tile_m, num_m_tiles)
    if lse is None or reduce == "defensive":
        num_splits = _NUM_SPLITS if lse is None else 2
        sums = torch.empty(num_splits, 4, num_stats, dtype=torch.float32, device=query.device)
        _window_sums_kernel[(num_splits * num_m_tiles, num_kv_heads, num_requests)](
            sums,
            query,
            pool,
            rows,
            block_table,
            num_rated,
            stats_lse,
            key_scale,
            layer,
            scale,
            logits_soft_cap,
            near_tokens,
            *query_strides,
            block_table.stride(0),
            HAS_LSE=lse is not None,
            NUM_SPLITS=num_splits,
            **shape,
        )
        _merge_sums_kernel[(triton.cdiv(num_stats, 128),)](
            stats_lse,
            gain,
            sums,
            sums if sinks is None else sinks,
            num_stats,
            HAS_LSE=lse is not None,
            HAS_SINKS=sinks is not None,
            NUM_SPLITS=num_splits,
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            TILE_W=tile_w,
            ROWS_PER_HEAD=num_m_tiles * tile_m,
            TILE=128,
            num_warps=4,
        )
    step = tile_n - 2 * (shape["POOL_KERNEL"] // 2)
    num_tiles = triton.cdiv(max_rated, step)
    # Loading the queries pays off over several tiles of keys, if there are enough programs.
    num_programs = num_tiles * num_m_tiles * num_kv_heads * num_requests
    tiles_per_program = max(1, min(_MAX_TILES_PER_PROGRAM, num_programs // _PROGRAMS_WANTED))
    grid = (triton.cdiv(num_tiles, tiles_per_program) * num_m_tiles, num_kv_heads, num_requests)
    _window_scores_kernel[grid](
        scores,
        query,
        pool,
        rows,
        block_table,
        num_rated,
        stats_lse,
        gain,
        key_scale,
        layer,
        scale,
        logits_soft_cap,
        near_tokens,
        tiles_per_program,
        *query_strides,
        block_table.stride(0),
        scores.stride(0),
        scores.stride(1),
        scores.stride(2),
        REDUCTION=REDUCE[reduce],
        POWER=power,
        **shape,
    )


def _lse_by_stat(
    lse: torch.Tensor, num_kv_heads: int, tile_w: int, tile_m: int, num_m_tiles: int
) -> torch.Tensor:
    """[R, w, Hq] natural lse in the kernels' order of query rows, to base 2."""
    num_requests, window, num_heads = lse.shape
    group = num_heads // num_kv_heads
    size = (num_requests, num_kv_heads, num_m_tiles * tile_m // tile_w, tile_w)
    by_stat = torch.zeros(size, dtype=torch.float32, device=lse.device)
    by_head = lse.view(num_requests, window, num_kv_heads, group).permute(0, 2, 3, 1)
    by_stat[:, :, :group, :window] = by_head * LOG2E.value
    return by_stat
