"""What the kernels share: addresses in the paged pool, and products of any float type."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# Triton's interpreter multiplies bfloat16 numbers as integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

LOG2E = tl.constexpr(1.4426950408889634)

# Numbers of a row descriptor. What they mean, and their order, is written at
# vllm_kvcompress/row_descriptor.py; a test compares.
ROW_SEQ_LEN = tl.constexpr(0)
ROW_NUM_REGION_BLOCKS = tl.constexpr(1)
ROW_REGION_COLUMN = tl.constexpr(2)
ROW_BOUNDARY_BLOCK = tl.constexpr(3)
ROW_FIRST_KEPT_BLOCK = tl.constexpr(4)
ROW_WIDTH = tl.constexpr(5)

# A kernel must not be compiled once more for another prompt or batch. These arguments are parts of
# larger tensors, which start at a multiple of 16 bytes or not, as it happens; kernels read single
# numbers there. For the same reason sizes of launches are not specialized, and callers keep the
# strides of scores multiples of 16.
UNALIGNED = (
    "guaranteed_ptr",
    "num_candidates_ptr",
    "num_entries_ptr",
    "num_pages_ptr",
    "num_rated_ptr",
    "totals_ptr",
)


def is_interpreted() -> bool:
    """Whether the kernels were loaded into Triton's interpreter, and so run on CPU tensors."""
    return bool(INTERPRETED.value)


@triton.jit
def dot(a, b):
    """Matrix product in float32; float32 operands are not rounded."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 to a stored type, rounded to nearest, ties to even."""
    if INTERPRETED and dtype.primitive_bitwidth < 32 and dtype != tl.float16:
        # The interpreter rounds wrongly; what is rounded already, it keeps.
        DROPPED: tl.constexpr = 23 - dtype.fp_mantissa_width
        bits = x.to(tl.uint32, bitcast=True)
        odd = (bits >> DROPPED) & 1
        bits = (bits + (1 << (DROPPED - 1)) - 1 + odd) >> DROPPED << DROPPED
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def squash(logits, cap):
    """`cap * tanh(logits / cap)`."""
    return cap * (2 * tl.sigmoid(2 * logits / cap) - 1)


class Row(NamedTuple):
    """Where one request's blocks stand in the block table, as far as its descriptor says.

    Attributes:
        table_ptr: its first entry of the block table.
        seq_len: its tokens.
        num_region_blocks, region_column, boundary_block: see vllm_kvcompress/row_descriptor.py.
    """

    table_ptr: tl.tensor
    seq_len: tl.tensor
    num_region_blocks: tl.tensor
    region_column: tl.tensor
    boundary_block: tl.tensor


@triton.jit
def load_row(rows_ptr, table_ptr, request, table_stride):
    """A request's `Row`.

    To be called before a loop over tokens: loads that wait for these would keep it from being
    pipelined.
    """
    row_ptr = rows_ptr + request * ROW_WIDTH
    return Row(
        table_ptr + request.to(tl.int64) * table_stride,
        tl.load(row_ptr + ROW_SEQ_LEN),
        tl.load(row_ptr + ROW_NUM_REGION_BLOCKS),
        tl.load(row_ptr + ROW_REGION_COLUMN),
        tl.load(row_ptr + ROW_BOUNDARY_BLOCK),
    )


@triton.jit
def row_column(block, row):
    """Column of a dense token block: before the newest region, or behind it."""
    before = block + (row.region_column - row.boundary_block)
    return before + tl.where(block >= row.boundary_block, row.num_region_blocks, 0)


class StreamTokens(NamedTuple):
    """Where the tokens of one stream lie: in its region pages, all full, and then in dense blocks.

    Attributes:
        num_region_tokens: tokens in region pages.
        num_tokens: tokens in all.
        first_page: first virtual page of the stream in the region.
        first_tail_block: first dense block that is kept.
    """

    num_region_tokens: tl.tensor
    num_tokens: tl.tensor
    first_page: tl.tensor
    first_tail_block: tl.tensor


@triton.jit
def stream_page_ids(
    indices, mask, row, stream, extent, BLOCK_SIZE: tl.constexpr, PAGES_PER_BLOCK: tl.constexpr
):
    """Page of each token of one stream.

    Args:
        indices: of tokens in the stream, >= 0.
        mask: which of them to look up.
        row: the request's `Row`.
        stream: layer * H + head.
        extent: the stream's `StreamTokens`.

    Returns:
        int64 page ids, 0 where masked.
    """
    in_region = indices < extent.num_region_tokens
    page = extent.first_page + indices // BLOCK_SIZE
    tail_block = extent.first_tail_block + (indices - extent.num_region_tokens) // BLOCK_SIZE
    column = tl.where(
        in_region, row.region_column + page // PAGES_PER_BLOCK, row_column(tail_block, row)
    )
    page_of_block = tl.where(in_region, page % PAGES_PER_BLOCK, stream)
    block = tl.load(row.table_ptr + column, mask=mask, other=0).to(tl.int64)
    return tl.where(mask, block * PAGES_PER_BLOCK + page_of_block, 0)


@triton.jit
def prompt_entries(
    positions,
    mask,
    row,
    stream,
    PAGES_PER_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """Element offset of each token's key in the pool, for a prompt that is still dense."""
    column = row_column(positions // BLOCK_SIZE, row)
    block = tl.load(row.table_ptr + column, mask=mask, other=0).to(tl.int64)
    page = tl.where(mask, block * PAGES_PER_BLOCK + stream, 0)
    # Multiplied last, so that the compiler sees whole rows, and loads and copies 16 bytes at once.
    return (page * BLOCK_SIZE + tl.where(mask, positions % BLOCK_SIZE, 0)) * (2 * HEAD_SIZE)
