"""Copies of what is kept: from a prompt's pages into its region, or from anywhere to anywhere."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .paging import ROW_NUM_REGION_BLOCKS, ROW_REGION_COLUMN, ROW_WIDTH

# Elements that one program has in flight.
_TILE_ELEMENTS = 8192


@triton.jit
def _stream_of_page(page, offsets_ptr, NUM_STREAMS: tl.constexpr, STEPS: tl.constexpr):
    """Number of the last stream that starts at or before each virtual page."""
    stream = tl.zeros_like(page)
    for step in tl.static_range(0, STEPS):
        later = stream + (1 << (STEPS - 1 - step))
        exists = later < NUM_STREAMS
        start = tl.load(offsets_ptr + later, mask=exists, other=0)
        stream = tl.where(exists & (start <= page), later, stream)
    return stream


@triton.jit(do_not_specialize=["table_stride", "indices_stride"])
def _compact_kernel(
    pool_ptr,
    rows_ptr,
    table_ptr,
    offsets_ptr,
    indices_ptr,
    table_stride,
    indices_stride,
    NUM_STREAMS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKEN_ELEMENTS: tl.constexpr,
    PAGE_ENTRIES: tl.constexpr,
    TILE_PAGES: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_E: tl.constexpr,
):
    """PAGE_ENTRIES is 1 where whole pages are kept, BLOCK_SIZE where single tokens are."""
    request = tl.program_id(1)
    row_ptr = rows_ptr + request * ROW_WIDTH
    num_pages = tl.load(row_ptr + ROW_NUM_REGION_BLOCKS) * NUM_STREAMS
    first = tl.program_id(0) * TILE_PAGES
    if first >= num_pages:
        return
    region_column = tl.load(row_ptr + ROW_REGION_COLUMN)
    table_row_ptr = table_ptr + request.to(tl.int64) * table_stride
    page = first + tl.arange(0, TILE_PAGES)
    is_page = page < num_pages
    stream = _stream_of_page(
        page, offsets_ptr + request.to(tl.int64) * (NUM_STREAMS + 1), NUM_STREAMS, STEPS
    )
    target_block = tl.load(
        table_row_ptr + region_column + page // NUM_STREAMS, mask=is_page, other=0
    ).to(tl.int64)
    target = (target_block * NUM_STREAMS + page % NUM_STREAMS) * BLOCK_SIZE
    element = tl.arange(0, TILE_E)
    for start in tl.static_range(0, BLOCK_SIZE, TILE_TOKENS):
        # [TILE_PAGES, TILE_TOKENS] tokens of the target pages.
        place = start + tl.arange(0, TILE_TOKENS)
        entry = page[:, None] * PAGE_ENTRIES + place[None, :] % PAGE_ENTRIES
        is_token = tl.broadcast_to(is_page[:, None], (TILE_PAGES, TILE_TOKENS))
        index = tl.load(
            indices_ptr + request.to(tl.int64) * indices_stride + entry, mask=is_token, other=0
        )
        if PAGE_ENTRIES == 1:
            source_column = index
            source_place = tl.broadcast_to(place[None, :], (TILE_PAGES, TILE_TOKENS))
        else:
            source_column = index // BLOCK_SIZE
            source_place = index % BLOCK_SIZE
        source_block = tl.load(table_row_ptr + source_column, mask=is_token, other=0).to(tl.int64)
        source = (source_block * NUM_STREAMS + stream[:, None]) * BLOCK_SIZE + source_place
        mask = is_token[:, :, None] & (element < TOKEN_ELEMENTS)[None, None, :]
        source_ptrs = pool_ptr + source[:, :, None] * TOKEN_ELEMENTS + element[None, None, :]
        moved = tl.load(source_ptrs, mask=mask)
        target_token = target[:, None] + place[None, :]
        target_ptrs = pool_ptr + target_token[:, :, None] * TOKEN_ELEMENTS + element[None, None, :]
        tl.store(target_ptrs, moved, mask=mask)


def compact(
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    page_offsets: torch.Tensor,
    indices: torch.Tensor,
    *,
    max_region_blocks: int,
    entries_per_page: int,
) -> None:
    """See `ops.compact`."""
    num_requests = rows.shape[0]
    num_streams = page_offsets.shape[1] - 1
    block_size = pool.shape[1]
    if num_requests == 0 or max_region_blocks == 0:
        return
    bits = pool.view(_bits_type(pool.shape[2] * pool.element_size()))
    token_elements = bits.shape[2]
    tile_e = triton.next_power_of_2(token_elements)
    tile_tokens = min(block_size, max(1, _TILE_ELEMENTS // tile_e))
    tile_pages = max(1, min(8, _TILE_ELEMENTS // (tile_e * tile_tokens)))
    grid = (triton.cdiv(max_region_blocks * num_streams, tile_pages), num_requests)
    _compact_kernel[grid](
        bits,
        rows,
        block_table,
        page_offsets,
        indices,
        block_table.stride(0),
        indices.stride(0),
        NUM_STREAMS=num_streams,
        STEPS=num_streams.bit_length(),
        BLOCK_SIZE=block_size,
        TOKEN_ELEMENTS=token_elements,
        PAGE_ENTRIES=entries_per_page,
        TILE_PAGES=tile_pages,
        TILE_TOKENS=tile_tokens,
        TILE_E=tile_e,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["num_moves"])
def _move_entries_kernel(
    source_ptr,
    source_index_ptr,
    target_ptr,
    target_index_ptr,
    num_moves,
    ENTRY_ELEMENTS: tl.constexpr,
    TILE_MOVES: tl.constexpr,
    TILE_E: tl.constexpr,
):
    move = tl.program_id(0) * TILE_MOVES + tl.arange(0, TILE_MOVES)
    source = tl.load(source_index_ptr + move, mask=move < num_moves, other=-1)
    target = tl.load(target_index_ptr + move, mask=move < num_moves, other=-1)
    is_moved = (source >= 0) & (target >= 0)
    for start in range(0, ENTRY_ELEMENTS, TILE_E):
        element = start + tl.arange(0, TILE_E)
        mask = is_moved[:, None] & (element < ENTRY_ELEMENTS)[None, :]
        source_ptrs = source_ptr + source[:, None] * ENTRY_ELEMENTS + element[None, :]
        target_ptrs = target_ptr + target[:, None] * ENTRY_ELEMENTS + element[None, :]
        tl.store(target_ptrs, tl.load(source_ptrs, mask=mask), mask=mask)


def move_entries(
    source: torch.Tensor,
    source_index: torch.Tensor,
    target: torch.Tensor,
    target_index: torch.Tensor,
) -> None:
    """See `ops.move_entries`."""
    num_moves = source_index.numel()
    if num_moves == 0:
        return
    bits = _bits_type(source.shape[1] * source.element_size())
    entry_elements = source.view(bits).shape[1]
    tile_e = min(triton.next_power_of_2(entry_elements), _TILE_ELEMENTS)
    tile_moves = max(1, min(64, _TILE_ELEMENTS // tile_e))
    _move_entries_kernel[(triton.cdiv(num_moves, tile_moves),)](
        source.view(bits),
        source_index,
        target.view(bits),
        target_index,
        num_moves,
        ENTRY_ELEMENTS=entry_elements,
        TILE_MOVES=tile_moves,
        TILE_E=tile_e,
        num_warps=8,
    )


def _bits_type(num_bytes: int) -> torch.dtype:
    """What to move that many bytes as, whatever they mean: wide elements if they are whole."""
    return torch.int32 if num_bytes % 4 == 0 else torch.int8
