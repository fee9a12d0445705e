"""How much each token's value moves a layer's output, read from pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .paging import ROW_WIDTH, dot, prompt_entries


@triton.jit(do_not_specialize=["layer"])
def _value_effect_kernel(
    effect_ptr,
    pool_ptr,
    root_ptr,
    rows_ptr,
    table_ptr,
    num_rated_ptr,
    value_scale_ptr,
    layer,
    table_stride,
    effect_stride_request,
    effect_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_E: tl.constexpr,
):
    head = tl.program_id(1)
    request = tl.program_id(2)
    num_rated = tl.load(num_rated_ptr + request)
    tokens = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    if tl.program_id(0) * TILE_N >= num_rated:
        return
    mask = tokens < num_rated
    stream = layer * NUM_KV_HEADS + head
    entry = prompt_entries(
        tokens,
        mask,
        rows_ptr + request * ROW_WIDTH,
        table_ptr + request.to(tl.int64) * table_stride,
        stream,
        PAGES_PER_BLOCK,
        BLOCK_SIZE,
        HEAD_SIZE,
    )
    dim = tl.arange(0, TILE_D)
    dim_mask = dim < HEAD_SIZE
    root_row_ptr = root_ptr + head.to(tl.int64) * HEAD_SIZE * HEAD_SIZE + dim * HEAD_SIZE
    value = tl.load(
        pool_ptr + HEAD_SIZE + entry[:, None] + dim[None, :],
        mask=mask[:, None] & dim_mask[None, :],
        other=0.0,
    ).to(root_ptr.dtype.element_ty)
    squares = tl.zeros([TILE_N], tl.float32)
    for start in tl.static_range(0, HEAD_SIZE, TILE_E):
        column = start + tl.arange(0, TILE_E)
        root = tl.load(
            root_row_ptr[:, None] + column[None, :],
            mask=dim_mask[:, None] & (column < HEAD_SIZE)[None, :],
            other=0.0,
        )
        moved = dot(value, root)
        squares += tl.sum(moved * moved, axis=1)
    effect = tl.sqrt(squares) * tl.load(value_scale_ptr + stream)
    effect_row_ptr = (
        effect_ptr
        + request.to(tl.int64) * effect_stride_request
        + head.to(tl.int64) * effect_stride_head
    )
    tl.store(effect_row_ptr + tokens, effect, mask=mask)


def value_effect(
    pool: torch.Tensor,
    output_root: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    num_rated: torch.Tensor,
    value_scale: torch.Tensor,
    effect: torch.Tensor,
    *,
    layer: int,
    num_layers: int,
) -> None:
    """See `ops.paged_value_effect`."""
    num_requests, num_kv_heads, max_rated = effect.shape
    head_size = output_root.shape[1]
    if num_requests == 0 or max_rated == 0:
        return
    tile_n = 64
    _value_effect_kernel[(triton.cdiv(max_rated, tile_n), num_kv_heads, num_requests)](
        effect,
        pool,
        output_root,
        rows,
        block_table,
        num_rated,
        value_scale,
        layer,
        block_table.stride(0),
        effect.stride(0),
        effect.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        PAGES_PER_BLOCK=num_layers * num_kv_heads,
        HEAD_SIZE=head_size,
        BLOCK_SIZE=pool.shape[1],
        TILE_N=tile_n,
        TILE_D=triton.next_power_of_2(head_size),
        TILE_E=min(64, triton.next_power_of_2(head_size)),
        num_warps=4,
    )
