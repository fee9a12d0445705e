"""How much each token's value moves a layer's output, read from pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .paging import UNALIGNED, dot, load_row, prompt_entries
from .window_tiles import num_stages, tiles_per_program


@triton.jit
def _root_columns(
    root_ptr, start, HEAD_SIZE: tl.constexpr, TILE_D: tl.constexpr, TILE_E: tl.constexpr
):
    """[E, D], columns of the root from `start` on as rows."""
    dim = tl.arange(0, TILE_D)
    column = start + tl.arange(0, TILE_E)
    return tl.load(
        root_ptr + column[:, None] + dim[None, :] * HEAD_SIZE,
        mask=(column < HEAD_SIZE)[:, None] & (dim < HEAD_SIZE)[None, :],
        other=0.0,
    )


@triton.jit(
    do_not_specialize=["first_stream", "tiles_per_program", "table_stride"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def _value_effect_kernel(
    effect_ptr,
    pool_ptr,
    root_ptr,
    rows_ptr,
    table_ptr,
    num_rated_ptr,
    value_scale_ptr,
    first_stream,
    tiles_per_program,
    table_stride,
    effect_stride_request,
    effect_stride_stream,
    HAS_SCALE: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_E: tl.constexpr,
):
    scored_stream = tl.program_id(1)
    request = tl.program_id(2)
    num_rated = tl.load(num_rated_ptr + request)
    start = tl.program_id(0) * tiles_per_program * TILE_N
    if start >= num_rated:
        return
    end = tl.minimum(start + tiles_per_program * TILE_N, num_rated)
    row = load_row(rows_ptr, table_ptr, request, table_stride)
    stream = first_stream + scored_stream
    value_scale = 1.0
    if HAS_SCALE:
        value_scale = tl.load(value_scale_ptr + stream)
    root_ptr += scored_stream.to(tl.int64) * HEAD_SIZE * HEAD_SIZE
    effect_row_ptr = (
        effect_ptr
        + request.to(tl.int64) * effect_stride_request
        + scored_stream.to(tl.int64) * effect_stride_stream
    )
    dim = tl.arange(0, TILE_D)
    # The root is the left factor, which stays in registers; values come through shared memory.
    root = _root_columns(root_ptr, 0, HEAD_SIZE, TILE_D, TILE_E)
    for first in range(start, end, TILE_N):
        tokens = first + tl.arange(0, TILE_N)
        mask = tokens < num_rated
        entry = prompt_entries(tokens, mask, row, stream, PAGES_PER_BLOCK, BLOCK_SIZE, HEAD_SIZE)
        value = tl.load(
            pool_ptr + HEAD_SIZE + entry[:, None] + dim[None, :],
            mask=mask[:, None] & (dim < HEAD_SIZE)[None, :],
            other=0.0,
        )
        value = tl.trans(value.to(root_ptr.dtype.element_ty))
        moved = dot(root, value)
        squares = tl.sum(moved * moved, axis=0)
        for column in tl.static_range(TILE_E, HEAD_SIZE, TILE_E):
            more = dot(_root_columns(root_ptr, column, HEAD_SIZE, TILE_D, TILE_E), value)
            squares += tl.sum(more * more, axis=0)
        tl.store(effect_row_ptr + tokens, tl.sqrt(squares) * value_scale, mask=mask)


def value_effect(
    pool: torch.Tensor,
    output_root: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    num_rated: torch.Tensor,
    value_scale: torch.Tensor | None,
    effect: torch.Tensor,
    *,
    layer: int,
    num_layers: int,
) -> None:
    """See `ops.paged_value_effect`; output_root has the dimension of layers."""
    num_requests, num_streams, max_rated = effect.shape
    _, num_kv_heads, head_size, _ = output_root.shape
    if num_requests == 0 or max_rated == 0:
        return
    tile_n, tile_d = 64, triton.next_power_of_2(head_size)
    num_tiles = triton.cdiv(max_rated, tile_n)
    per_program = tiles_per_program(num_tiles * num_streams * num_requests)
    grid = (triton.cdiv(num_tiles, per_program), num_streams, num_requests)
    _value_effect_kernel[grid](
        effect,
        pool,
        output_root,
        rows,
        block_table,
        num_rated,
        # Any pointer will do where there is none.
        effect if value_scale is None else value_scale,
        layer * num_kv_heads,
        per_program,
        block_table.stride(0),
        effect.stride(0),
        effect.stride(1),
        HAS_SCALE=value_scale is not None,
        PAGES_PER_BLOCK=num_layers * num_kv_heads,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=pool.shape[1],
        TILE_N=tile_n,
        TILE_D=tile_d,
        TILE_E=min(tile_d, 128 * 128 // tile_d),
        num_warps=8,
        # Several parts of a large root would be copied ahead too, and not fit.
        num_stages=num_stages(tile_n * tile_d * pool.element_size()) if tile_d <= 128 else 1,
    )
