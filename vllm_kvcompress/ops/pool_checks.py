"""What ops on the paged pool of a GPU take, and the checks of it that they share."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.row_descriptor import ROW_FIELDS

MAX_QUERY_LEN = 8
HEAD_SIZES = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_GROUP = 16
QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def triton_kernels(*tensors: torch.Tensor) -> ModuleType:
    """The package's Triton kernels, if they can run on these tensors.

    Raises:
        RuntimeError: without Triton, for CPU tensors outside Triton's interpreter, or for fp8 e4m3
            on a GPU that has no such type.
    """
    try:
        kernels = importlib.import_module("vllm_kvcompress.triton_kernels")
    except ImportError as error:
        raise RuntimeError(f"the triton backend needs triton, but: {error}") from None
    on_cpu = [t for t in tensors if not t.is_cuda]
    if on_cpu and not kernels.is_interpreted():
        raise RuntimeError(
            f"the triton backend needs CUDA tensors, got {on_cpu[0].device} "
            "(set TRITON_INTERPRET=1 before triton is imported to run it on the CPU)"
        )
    for tensor in tensors:
        if not tensor.is_cuda or tensor.dtype != torch.float8_e4m3fn:
            continue
        capability = torch.cuda.get_device_capability(tensor.device)
        if capability < (8, 9):
            raise RuntimeError(
                "fp8 e4m3 caches need compute capability 8.9, this GPU has "
                f"{capability[0]}.{capability[1]}; e5m2 works"
            )
    return kernels


def check_pool(pool: torch.Tensor, query: torch.Tensor, num_kv_heads: int) -> None:
    """Raise ValueError unless queries (or keys, [tokens, heads, d]) and the pool go together."""
    check(
        query.dim() == 3 and query.stride(2) == 1 and query.dtype in QUERY_DTYPES,
        f"want [tokens, heads, head size] of bf16, fp16 or fp32, "
        f"got {tuple(query.shape)} {query.dtype}",
    )
    _, num_heads, head_size = query.shape
    check(
        num_kv_heads > 0
        and num_heads % num_kv_heads == 0
        and num_heads // num_kv_heads <= MAX_GROUP,
        f"{num_heads} query heads are not 1 to {MAX_GROUP} for each of {num_kv_heads} KV heads",
    )
    check(head_size in HEAD_SIZES, f"head size {head_size} is none of {HEAD_SIZES}")
    check(
        pool.dim() == 3 and pool.is_contiguous() and pool.shape[2] == 2 * head_size,
        f"want a contiguous pool [pages, block size, {2 * head_size}], got {tuple(pool.shape)}",
    )
    check(pool.shape[1] in BLOCK_SIZES, f"block size {pool.shape[1]} is none of {BLOCK_SIZES}")
    check(
        pool.dtype == query.dtype or pool.dtype in FP8_DTYPES,
        f"a pool of {pool.dtype} does not fit {query.dtype}",
    )


def check_row_descriptors(rows: torch.Tensor) -> None:
    """Raise ValueError unless these are row descriptors."""
    check(
        rows.shape == (rows.shape[0], len(ROW_FIELDS))
        and rows.dtype == torch.int32
        and rows.is_contiguous(),
        f"want row descriptors [R, {len(ROW_FIELDS)}] int32, got {tuple(rows.shape)} {rows.dtype}",
    )


def check_rows(rows: torch.Tensor, block_table: torch.Tensor) -> None:
    """Raise ValueError unless these are row descriptors and their block table."""
    num_rows = rows.shape[0]
    check_row_descriptors(rows)
    check(
        block_table.dim() == 2
        and block_table.shape[0] == num_rows
        and block_table.dtype == torch.int32
        and block_table.stride(1) == 1,
        f"want a block table [{num_rows}, W] int32, "
        f"got {tuple(block_table.shape)} {block_table.dtype}",
    )


def check_query_starts(query_start_loc: torch.Tensor, num_rows: int) -> None:
    """Raise ValueError unless these are the first tokens of so many rows, and the end."""
    check(
        query_start_loc.shape == (num_rows + 1,) and query_start_loc.dtype == torch.int32,
        f"want {num_rows + 1} int32 query starts, "
        f"got {tuple(query_start_loc.shape)} {query_start_loc.dtype}",
    )


def stream_scales(
    scales: torch.Tensor | None, num_streams: int, pool: torch.Tensor
) -> torch.Tensor:
    """[num_streams] float32 scales, 1 where none are given; ValueError on another shape or type."""
    if scales is None:
        return torch.ones(num_streams, dtype=torch.float32, device=pool.device)
    check(
        scales.shape == (num_streams,) and scales.dtype == torch.float32,
        f"want {num_streams} float32 scales, got {tuple(scales.shape)} {scales.dtype}",
    )
    return scales
