"""What ops on the paged pool take, and the checks of it that they share."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.structs import Pool, Rows
from vllm_kvcompress.row_descriptor import ROW_FIELDS

MAX_QUERY_LEN = 8
HEAD_SIZES = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_GROUP = 16
QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def takes_any_size(backend: str, tensor: torch.Tensor) -> bool:
    """Whether pages may have any number of tokens, and their elements any order."""
    return backend == "torch" or (backend == "native" and tensor.device.type == "cpu")


def check_pool(pool: Pool, query: torch.Tensor) -> None:
    """Raise ValueError unless queries (or keys, [tokens, heads, d]) and the pool go together."""
    check(
        query.dim() == 3 and query.stride(2) == 1 and query.dtype in QUERY_DTYPES,
        f"want [tokens, heads, head size] of bf16, fp16 or fp32, "
        f"got {tuple(query.shape)} {query.dtype}",
    )
    _, num_heads, head_size = query.shape
    pages, num_kv_heads = pool.pages, pool.num_kv_heads
    check(
        num_kv_heads > 0
        and num_heads % num_kv_heads == 0
        and num_heads // num_kv_heads <= MAX_GROUP,
        f"{num_heads} query heads are not 1 to {MAX_GROUP} for each of {num_kv_heads} KV heads",
    )
    check(head_size in HEAD_SIZES, f"head size {head_size} is none of {HEAD_SIZES}")
    check(
        pages.dim() == 3 and pages.is_contiguous() and pages.shape[2] == 2 * head_size,
        f"want a contiguous pool [pages, block size, {2 * head_size}], got {tuple(pages.shape)}",
    )
    check(pages.shape[1] in BLOCK_SIZES, f"block size {pages.shape[1]} is none of {BLOCK_SIZES}")
    check(
        pages.dtype == query.dtype or pages.dtype in FP8_DTYPES,
        f"a pool of {pages.dtype} does not fit {query.dtype}",
    )


def check_row_descriptors(rows: torch.Tensor) -> None:
    """Raise ValueError unless these are row descriptors."""
    check(
        rows.shape == (rows.shape[0], len(ROW_FIELDS))
        and rows.dtype == torch.int32
        and rows.is_contiguous(),
        f"want row descriptors [R, {len(ROW_FIELDS)}] int32, got {tuple(rows.shape)} {rows.dtype}",
    )


def check_rows(rows: Rows) -> None:
    """Raise ValueError unless these are row descriptors and their block table."""
    num_rows, block_table = len(rows), rows.block_table
    check_row_descriptors(rows.descriptors)
    check(
        block_table.dim() == 2
        and block_table.shape[0] == num_rows
        and block_table.dtype == torch.int32
        and block_table.stride(1) == 1,
        f"want a block table [{num_rows}, W] int32, "
        f"got {tuple(block_table.shape)} {block_table.dtype}",
    )


def check_page_offsets(rows: Rows, num_layers: int, num_kv_heads: int) -> None:
    """Raise ValueError unless the rows have page offsets of so many streams."""
    num_rows, offsets = len(rows), rows.page_offsets
    check(
        offsets is not None
        and offsets.shape == (num_rows, num_layers * num_kv_heads + 1)
        and offsets.dtype == torch.int32
        and offsets.stride(1) == 1,
        f"want page offsets [{num_rows}, {num_layers} * {num_kv_heads} + 1] int32, got "
        f"{None if offsets is None else (tuple(offsets.shape), offsets.dtype)}",
    )


def check_query_starts(rows: Rows) -> None:
    """Raise ValueError unless the rows have their first tokens, and the end."""
    num_rows, starts = len(rows), rows.query_start_loc
    check(
        starts is not None and starts.shape == (num_rows + 1,) and starts.dtype == torch.int32,
        f"want {num_rows + 1} int32 query starts, got "
        f"{None if starts is None else (tuple(starts.shape), starts.dtype)}",
    )


def check_scales(scales: torch.Tensor | None, num_streams: int) -> None:
    """Raise ValueError unless these are scales of so many streams, or None."""
    check(
        scales is None or (scales.shape == (num_streams,) and scales.dtype == torch.float32),
        f"want {num_streams} float32 scales, got "
        f"{None if scales is None else (tuple(scales.shape), scales.dtype)}",
    )
