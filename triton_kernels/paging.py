"""What the kernels share: addresses in the paged pool, and products of any float type."""

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


@triton.jit
def row_column(block, num_region_blocks, region_column, boundary_block):
    """Column of a dense token block: before the newest region, or behind it."""
    before = block + (region_column - boundary_block)
    return before + tl.where(block >= boundary_block, num_region_blocks, 0)


@triton.jit
def stream_page_ids(
    tokens,
    mask,
    table_ptr,
    stream,
    num_region_tokens,
    first_virtual_page,
    num_region_blocks,
    region_column,
    boundary_block,
    first_kept_block,
    BLOCK_SIZE: tl.constexpr,
    PAGES_PER_BLOCK: tl.constexpr,
):
    """Page of each token of one stream: its region pages first, then its dense tail.

    Args:
        tokens: index into the stream, >= 0.
        mask: which of them to look up.
        table_ptr: the request's block-table row.
        stream: layer * H + head.
        num_region_tokens: tokens of the stream's region pages, all of them full.
        first_virtual_page: of the stream in the region.

    Returns:
        int64 page ids, 0 where masked.
    """
    in_region = tokens < num_region_tokens
    page = first_virtual_page + tokens // BLOCK_SIZE
    tail_block = first_kept_block + (tokens - num_region_tokens) // BLOCK_SIZE
    column = tl.where(
        in_region,
        region_column + page // PAGES_PER_BLOCK,
        row_column(tail_block, num_region_blocks, region_column, boundary_block),
    )
    slot = tl.where(in_region, page % PAGES_PER_BLOCK, stream)
    block = tl.load(table_ptr + column, mask=mask, other=0).to(tl.int64)
    return tl.where(mask, block * PAGES_PER_BLOCK + slot, 0)


@triton.jit
def prompt_entries(
    tokens,
    mask,
    table_row_ptr,
    stream,
    num_region_blocks,
    region_column,
    boundary_block,
    PAGES_PER_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """Element offset of each token's key in the pool, for a prompt that is still dense."""
    column = row_column(tokens // BLOCK_SIZE, num_region_blocks, region_column, boundary_block)
    block = tl.load(table_row_ptr + column, mask=mask, other=0).to(tl.int64)
    page = tl.where(mask, block * PAGES_PER_BLOCK + stream, 0)
    # Multiplied last, so that the compiler sees whole rows, and loads and copies 16 bytes at once.
    return (page * BLOCK_SIZE + tl.where(mask, tokens % BLOCK_SIZE, 0)) * (2 * HEAD_SIZE)
