"""Queries of a prompt's window against tiles of its keys: what the kernels that score share.

A program looks at query rows, `head of the group * TILE_W + place in the window`, of one KV head in
one layer. Streams are numbered twice: among those of the launch's layers, as results are laid out,
and among all of the pool's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from .paging import LOG2E, UNALIGNED, Row, dot, prompt_entries, squash

# Parameters of one layer among many start wherever that layer's lie.
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


class PageShape(NamedTuple):
    """Constants of the pool's pages, and of a tile of what is in them."""

    PAGES_PER_BLOCK: tl.constexpr
    BLOCK_SIZE: tl.constexpr
    HEAD_SIZE: tl.constexpr
    TILE_D: tl.constexpr


class WindowShape(NamedTuple):
    """Constants of the window, and of how its query rows are cut into tiles."""

    NUM_KV_HEADS: tl.constexpr
    GROUP: tl.constexpr
    WINDOW: tl.constexpr
    TILE_M: tl.constexpr
    TILE_W: tl.constexpr
    NUM_M_TILES: tl.constexpr


class PromptKeys(NamedTuple):
    """A prompt's keys in one layer and KV head, and which of them are rated.

    Attributes:
        row: of the prompt.
        stream: among all of the pool's.
        num_rated: the first so many keys are rated,
        near_tokens: but not those which are fewer tokens than this before a query.
    """

    row: Row
    stream: tl.tensor
    num_rated: tl.tensor
    near_tokens: tl.tensor


class LogitScale(NamedTuple):
    """What makes logits of products.

    Attributes:
        factor: of the products.
        soft_cap: 0 caps nothing.
    """

    factor: tl.tensor
    soft_cap: tl.tensor


class QueryRows(NamedTuple):
    """A tile of query rows, [TILE_M] each.

    Attributes:
        index: among all rows of the KV head.
        head: query head of the layer.
        place: in the window.
        mask: which rows exist.
    """

    index: tl.tensor
    head: tl.tensor
    place: tl.tensor
    mask: tl.tensor


@triton.jit
def at_layer(ptr, request, layer_index, stride_request, stride_layer):
    """Where one layer of one request begins."""
    ptr += request.to(tl.int64) * stride_request
    return ptr + layer_index.to(tl.int64) * stride_layer


@triton.jit
def load_logit_scale(scale_ptr, key_scale_ptr, soft_cap_ptr, layer_index, stream):
    """The `LogitScale` of a layer and stream; key_scale_ptr and soft_cap_ptr may be None."""
    factor = tl.load(scale_ptr + layer_index)
    if key_scale_ptr is not None:
        factor *= tl.load(key_scale_ptr + stream)
    # Not None, which Triton lets no function return.
    soft_cap = 0.0
    if soft_cap_ptr is not None:
        soft_cap = tl.load(soft_cap_ptr + layer_index)
    return LogitScale(factor, soft_cap)


@triton.jit
def query_rows(m_tile, scored_stream, shape: tl.constexpr):
    """The `QueryRows` of one tile."""
    index = m_tile * shape.TILE_M + tl.arange(0, shape.TILE_M)
    group_head = index // shape.TILE_W
    place = index % shape.TILE_W
    mask = (place < shape.WINDOW) & (group_head < shape.GROUP)
    head = scored_stream % shape.NUM_KV_HEADS * shape.GROUP + group_head
    return QueryRows(index, head, place, mask)


@triton.jit
def load_queries(query_ptr, rows, stride_token, stride_head, pages: tl.constexpr):
    """[TILE_M, TILE_D] query rows of one prompt and layer."""
    dim = tl.arange(0, pages.TILE_D)
    return tl.load(
        query_ptr
        + rows.place[:, None] * stride_token
        + rows.head[:, None] * stride_head
        + dim[None, :],
        mask=rows.mask[:, None] & (dim < pages.HEAD_SIZE)[None, :],
        other=0.0,
    )


@triton.jit
def load_keys(tokens, keys, pool_ptr, pages: tl.constexpr):
    """[TILE_N, TILE_D] keys as the pool has them; 0 for those that are not there."""
    dim = tl.arange(0, pages.TILE_D)
    exists = (tokens >= 0) & (tokens < keys.row.seq_len)
    entry = prompt_entries(
        tokens,
        exists,
        keys.row,
        keys.stream,
        pages.PAGES_PER_BLOCK,
        pages.BLOCK_SIZE,
        pages.HEAD_SIZE,
    )
    return tl.load(
        pool_ptr + entry[:, None] + dim[None, :],
        mask=exists[:, None] & (dim < pages.HEAD_SIZE)[None, :],
        other=0.0,
    )


@triton.jit
def window_logits(query, key, scale, HAS_SOFT_CAP: tl.constexpr):
    """[TILE_M, TILE_N] base-2 logits."""
    logits = dot(query, tl.trans(key.to(query.dtype))) * scale.factor
    if HAS_SOFT_CAP:
        is_capped = scale.soft_cap > 0
        capped = squash(logits, tl.where(is_capped, scale.soft_cap, 1.0))
        logits = tl.where(is_capped, capped, logits)
    return logits * LOG2E


@triton.jit
def rated_weights(logits, lse, rows, tokens, keys, WINDOW: tl.constexpr):
    """[TILE_M, TILE_N] weights of keys that are rated; 0 for the others."""
    age = (keys.row.seq_len - WINDOW + rows.place)[:, None] - tokens[None, :]
    is_rated = rows.mask[:, None] & (age >= tl.maximum(keys.near_tokens, 0))
    is_rated = is_rated & ((tokens >= 0) & (tokens < keys.num_rated))[None, :]
    return tl.where(is_rated, tl.exp2(logits - lse[:, None]), 0.0)


@triton.jit
def load_lse(lse_ptr, rows, shape: tl.constexpr):
    """[TILE_M] base-2 lse of query rows, from natural ones [w, Hq] of one prompt and layer."""
    num_heads: tl.constexpr = shape.NUM_KV_HEADS * shape.GROUP
    ptrs = lse_ptr + rows.place * num_heads + rows.head
    return tl.load(ptrs, mask=rows.mask, other=0.0) * LOG2E


@triton.jit
def load_sinks(sinks_ptr, layer_index, rows, shape: tl.constexpr):
    """[TILE_M] base-2 logits of the rows' sinks; -inf where there is none (sinks_ptr is None)."""
    if sinks_ptr is not None:
        sinks_ptr += layer_index.to(tl.int64) * (shape.NUM_KV_HEADS * shape.GROUP)
        return tl.load(sinks_ptr + rows.head, mask=rows.mask, other=float("-inf")) * LOG2E
    return tl.full([shape.TILE_M], float("-inf"), tl.float32)
