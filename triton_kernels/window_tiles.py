"""Queries of a prompt's window against tiles of its keys: what the kernels that score share.

A program looks at query rows, `head of the group * TILE_W + place in the window`, of one KV head in
one layer. Streams are numbered twice: among those of the launch's layers, as results are laid out,
and among all of the pool's.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .paging import LOG2E, UNALIGNED, dot, prompt_entries, squash

# Parameters of one layer among many start wherever that layer's lie.
# Some stand in for a part that is left out.
UNALIGNED_PARAMETERS = (
    *UNALIGNED,
    "key_scale_ptr",
    "lse_ptr",
    "scale_ptr",
    "sinks_ptr",
    "soft_cap_ptr",
    "sums_ptr",
)
# Sizes that depend on how many layers are scored at once, or on which is the first.
UNSPECIALIZED = ["first_stream", "lse_stride_layer", "lse_stride_request", "table_stride"]
# Keys that a program looks at together.
TILE_N = 64
# Pieces that the keys are cut into where the queries' sums are not known; few prompts end at once.
NUM_SPLITS = 16
# Query rows that one program holds.
_MAX_TILE_M = 128
_PROGRAMS_WANTED = 512
_MAX_TILES_PER_PROGRAM = 8


@dataclass(frozen=True)
class WindowTiles:
    """How the query rows of one KV head are cut into tiles: constants of all kernels that score."""

    tile_w: int
    tile_m: int
    num_m_tiles: int

    @property
    def num_rows(self) -> int:
        """Query rows of a KV head, those that only fill a tile among them."""
        return self.num_m_tiles * self.tile_m

    @property
    def num_warps(self) -> int:
        """Of a program."""
        return 8 if self.tile_m > 64 else 4


def window_tiles(group: int, window: int) -> WindowTiles:
    """Tiles of `group` query heads times `window` queries."""
    tile_w = max(16, triton.next_power_of_2(window))
    tile_m = max(tile_w, min(_MAX_TILE_M, tile_w * triton.next_power_of_2(group)))
    return WindowTiles(tile_w, tile_m, triton.cdiv(group, tile_m // tile_w))


def num_stages(tile_bytes: int) -> int:
    """Stages of a loop over tiles of keys or values, of tile_bytes each in the pool's type.

    Addresses come from the block table, so that a tile is behind two loads. With five stages Triton
    keeps three tiles, two of them on their way while one is used; with three, one is awaited before
    the next. Larger tiles would not fit the shared memory of smaller GPUs.
    """
    return 5 if tile_bytes <= 64 * 128 * 2 else 3


def tiles_per_program(num_tiles: int) -> int:
    """Loading the queries pays off over several tiles of keys, if there are enough programs."""
    return max(1, min(_MAX_TILES_PER_PROGRAM, num_tiles // _PROGRAMS_WANTED))


@triton.jit
def split_rows(
    m_tile,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """[TILE_M] query rows of a tile, their heads of the group and places, and which exist."""
    rows = m_tile * TILE_M + tl.arange(0, TILE_M)
    group_head = rows // TILE_W
    place = rows % TILE_W
    return rows, group_head, place, (place < WINDOW) & (group_head < GROUP)


@triton.jit
def load_queries(
    query_ptr,
    query_head,
    place,
    row_mask,
    query_stride_token,
    query_stride_head,
    HEAD_SIZE: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """[TILE_M, TILE_D] query rows of one prompt and layer."""
    dim = tl.arange(0, TILE_D)
    return tl.load(
        query_ptr
        + place[:, None] * query_stride_token
        + query_head[:, None] * query_stride_head
        + dim[None, :],
        mask=row_mask[:, None] & (dim < HEAD_SIZE)[None, :],
        other=0.0,
    )


@triton.jit
def load_keys(
    tokens,
    num_keys,
    pool_ptr,
    table_row_ptr,
    stream,
    num_region_blocks,
    region_column,
    boundary_block,
    PAGES_PER_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """[TILE_N, TILE_D] keys as the pool has them; 0 for those that are not there."""
    dim = tl.arange(0, TILE_D)
    exists = (tokens >= 0) & (tokens < num_keys)
    entry = prompt_entries(
        tokens,
        exists,
        table_row_ptr,
        stream,
        num_region_blocks,
        region_column,
        boundary_block,
        PAGES_PER_BLOCK,
        BLOCK_SIZE,
        HEAD_SIZE,
    )
    return tl.load(
        pool_ptr + entry[:, None] + dim[None, :],
        mask=exists[:, None] & (dim < HEAD_SIZE)[None, :],
        other=0.0,
    )


@triton.jit
def window_logits(query, key, factor, soft_cap, HAS_SOFT_CAP: tl.constexpr):
    """[TILE_M, TILE_N] base-2 logits; a soft cap of 0 caps nothing."""
    logits = dot(query, tl.trans(key.to(query.dtype))) * factor
    if HAS_SOFT_CAP:
        is_capped = soft_cap > 0
        capped = squash(logits, tl.where(is_capped, soft_cap, 1.0))
        logits = tl.where(is_capped, capped, logits)
    return logits * LOG2E


@triton.jit
def rated_weights(
    logits, lse, place, row_mask, tokens, num_keys, num_rated, near_tokens, WINDOW: tl.constexpr
):
    """[TILE_M, TILE_N] weights of keys that are rated; 0 for the others."""
    age = (num_keys - WINDOW + place)[:, None] - tokens[None, :]
    is_rated = row_mask[:, None] & (age >= tl.maximum(near_tokens, 0))
    is_rated = is_rated & ((tokens >= 0) & (tokens < num_rated))[None, :]
    return tl.where(is_rated, tl.exp2(logits - lse[:, None]), 0.0)


@triton.jit
def load_lse(lse_ptr, query_head, place, row_mask, NUM_HEADS: tl.constexpr):
    """[TILE_M] base-2 lse of query rows, from natural ones [w, Hq] of one prompt and layer."""
    return tl.load(lse_ptr + place * NUM_HEADS + query_head, mask=row_mask, other=0.0) * LOG2E


@triton.jit
def load_sinks(
    sinks_ptr,
    layer_index,
    query_head,
    row_mask,
    HAS_SINKS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """[TILE_M] base-2 logits of the rows' sinks; -inf where there is none."""
    if HAS_SINKS:
        sinks_ptr += layer_index.to(tl.int64) * NUM_HEADS
        return tl.load(sinks_ptr + query_head, mask=row_mask, other=float("-inf")) * LOG2E
    return tl.full([TILE_M], float("-inf"), tl.float32)
