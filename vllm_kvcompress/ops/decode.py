"""Attention over compressed rows, and the store of new tokens, on the paged pool of a GPU.

Unlike `paged.py`, whose page order is whatever a CPU kernel wants, a page here is plain: token
after token, a token's key before its value (vLLM's layout BLHNC on CUDA).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

from vllm_kvcompress.ops import reference_paged as reference
from vllm_kvcompress.ops.checks import check, check_backend

# Columns of a row descriptor: what `memory.RequestGeometry` says of a request, and its length.
# All of them are 0 but the first for a row that is dense.
ROW_FIELDS = ("seq_len", "num_region_blocks", "boundary_block", "first_kept_block")
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


def ragged_decode(
    query: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    page_offsets: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    layer: int,
    num_kv_heads: int,
    scale: float,
    max_query_len: int = 1,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    logits_soft_cap: float = 0.0,
    sliding_window: int = 0,
    sinks: torch.Tensor | None = None,
    num_splits: int | None = None,
    out: torch.Tensor | None = None,
    backend: str = "triton",
) -> torch.Tensor:
    """Attention of each row's last queries over its region pages and its dense tail.

    A row may be compressed or dense; every KV head of a compressed one has its own number of
    region pages. Queries see the region and the tail up to their own token.

    Args:
        query: [T, Hq, d] bf16, fp16 or fp32, all rows' tokens one after another, Hq = H * g.
        pool: [num_pages, b, 2 d], the whole KV pool, contiguous: page
            `(block * L + layer) * H + head`, each token's key before its value. query's dtype,
            or fp8 e4m3 / e5m2.
        rows: [R, 4] int32, see `ROW_FIELDS`. seq_len counts all tokens of the request, the
            queries too; `first_kept_block * b` must lie before the first query.
        page_offsets: [R, S + 1] int32, first virtual page of every stream of the region, S = L * H.
            Not read for dense rows.
        block_table: [R, W] int32, `[prompt blocks][region blocks][later blocks]`. Entries of
            evicted blocks are not read.
        query_start_loc: [R + 1] int32; a row may have no query, and is then left alone.
        layer: index of the layer among the L that share the pool.
        num_kv_heads: H.
        scale: factor on the products.
        max_query_len: most queries of a row, 1 to 8.
        key_scale, value_scale: [S] float32, what stored keys and values are multiplied by;
            None = 1.
        logits_soft_cap: squash logits into (-cap, cap) by tanh; 0 = not.
        sliding_window: tail tokens that a query sees, its own among them; region tokens are
            seen in any case. 0 = all.
        sinks: [Hq] float32 or as query, a logit per head that no value belongs to.
        num_splits: most pieces that a stream is cut into, a power of two; None = by batch size.
        out: [T, Hq, d] like query, written; None = a new tensor.
        backend: 'triton' or 'reference'.

    Returns:
        `out`. No host sync; all sizes of launches and buffers follow from shapes and Python
        numbers, so that a CUDA graph may replay it. Deterministic.

    Raises:
        ValueError: on shapes or types that do not fit.
        RuntimeError: if the backend cannot run here.
    """
    check_pool(pool, query, num_kv_heads)
    num_rows = rows.shape[0]
    num_streams = page_offsets.shape[-1] - 1
    check_rows(rows, block_table)
    _check_query_starts(query_start_loc, rows.shape[0])
    check(
        page_offsets.shape == (num_rows, num_streams + 1)
        and num_streams > 0
        and num_streams % num_kv_heads == 0
        and page_offsets.dtype == torch.int32
        and page_offsets.stride(1) == 1,
        f"want page offsets [{num_rows}, L * {num_kv_heads} + 1] int32, "
        f"got {tuple(page_offsets.shape)} {page_offsets.dtype}",
    )
    num_layers = num_streams // num_kv_heads
    check(0 <= layer < num_layers, f"layer {layer} is not among {num_layers}")
    check(
        pool.shape[0] % num_streams == 0,
        f"a pool of {pool.shape[0]} pages is not whole blocks of {num_streams}",
    )
    check(
        1 <= max_query_len <= MAX_QUERY_LEN,
        f"rows may have 1 to {MAX_QUERY_LEN} queries, not {max_query_len}",
    )
    check(
        num_splits is None or (num_splits > 0 and num_splits & (num_splits - 1) == 0),
        f"num_splits must be a power of two, got {num_splits}",
    )
    check(
        sinks is None
        or (sinks.shape == (query.shape[1],) and sinks.dtype in (torch.float32, query.dtype)),
        f"want sinks [{query.shape[1]}] float32 or {query.dtype}",
    )
    check(
        logits_soft_cap >= 0 and sliding_window >= 0,
        f"soft cap {logits_soft_cap} and sliding window {sliding_window} must not be negative",
    )
    key_scale = stream_scales(key_scale, num_streams, pool)
    value_scale = stream_scales(value_scale, num_streams, pool)
    if out is None:
        out = torch.empty_like(query)
    check(
        out.shape == query.shape and out.dtype == query.dtype and out.stride(2) == 1,
        f"want out like query {tuple(query.shape)}, got {tuple(out.shape)} {out.dtype}",
    )
    options: dict[str, Any] = {
        "layer": layer,
        "num_kv_heads": num_kv_heads,
        "scale": scale,
        "logits_soft_cap": logits_soft_cap,
        "sliding_window": sliding_window,
        "sinks": sinks,
    }
    tensors = (
        query,
        pool,
        rows,
        page_offsets,
        block_table,
        query_start_loc,
        key_scale,
        value_scale,
        out,
    )
    if check_backend(backend, "triton") == "reference":
        reference.ragged_decode(*tensors, **options)
        return out
    triton_kernels(*tensors).ragged_decode(
        *tensors,
        num_layers=num_layers,
        max_query_len=max_query_len,
        num_splits=num_splits,
        **options,
    )
    return out


def token_slots(
    rows: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_tokens: int,
    block_size: int,
    out: torch.Tensor | None = None,
    backend: str = "triton",
) -> torch.Tensor:
    """Slot of each new token of a step, `block id * b + place in the block`.

    The slot mapping that vLLM computes does not know that blocks after a region are further
    right in the row. This one does; it is computed once per step and serves every layer.

    Args:
        rows, block_table, query_start_loc: as in `ragged_decode`; any number of queries.
        num_tokens: T, length of the result; tokens past the last row's get -1.
        block_size: b.
        out: [T] int64, written; None = a new tensor.
        backend: 'triton' or 'reference'.

    Returns:
        [T] int64, `out` if given. No host sync, graph-safe, deterministic.

    Raises:
        ValueError: on shapes or types that do not fit.
        RuntimeError: if the backend cannot run here.
    """
    check_rows(rows, block_table)
    _check_query_starts(query_start_loc, rows.shape[0])
    if out is None:
        out = torch.empty(num_tokens, dtype=torch.int64, device=rows.device)
    check(
        out.shape == (num_tokens,) and out.dtype == torch.int64 and out.is_contiguous(),
        f"want out [{num_tokens}] int64, got {tuple(out.shape)} {out.dtype}",
    )
    arguments = (rows, block_table, query_start_loc, block_size, out)
    if check_backend(backend, "triton") == "reference":
        reference.token_slots(*arguments)
    else:
        triton_kernels(rows, block_table, query_start_loc).token_slots(*arguments)
    return out


def store_tokens(
    key: torch.Tensor,
    value: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
    *,
    layer: int,
    num_layers: int,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    backend: str = "triton",
) -> None:
    """Write new keys and values into one layer's pages.

    Args:
        key, value: [T, H, d] bf16, fp16 or fp32.
        pool: [num_pages, b, 2 d] as in `ragged_decode`, written; numbers past an fp8 type's
            largest are stored as that.
        slots: [T] int64 of `token_slots`; tokens with a negative one are not stored. No slot twice.
        layer: index of the layer among the num_layers that share the pool.
        key_scale, value_scale: [L * H] float32, what keys and values are divided by; None = 1.
        backend: 'triton' or 'reference'.

    Raises:
        ValueError: on shapes or types that do not fit.
        RuntimeError: if the backend cannot run here.
    """
    num_tokens, num_heads, _ = key.shape
    check_pool(pool, key, num_heads)
    check(
        value.shape == key.shape and value.dtype == key.dtype and value.stride(2) == 1,
        f"want value like key {tuple(key.shape)}, got {tuple(value.shape)} {value.dtype}",
    )
    check(
        slots.shape == (num_tokens,) and slots.dtype == torch.int64 and slots.is_contiguous(),
        f"want {num_tokens} int64 slots, got {tuple(slots.shape)} {slots.dtype}",
    )
    check(0 <= layer < num_layers, f"layer {layer} is not among {num_layers}")
    key_scale = stream_scales(key_scale, num_layers * num_heads, pool)
    value_scale = stream_scales(value_scale, num_layers * num_heads, pool)
    arguments = (key, value, pool, slots, key_scale, value_scale, layer, num_layers)
    if check_backend(backend, "triton") == "reference":
        reference.store_tokens(*arguments)
    else:
        triton_kernels(key, value, pool, slots).store_tokens(*arguments)


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


def check_rows(rows: torch.Tensor, block_table: torch.Tensor) -> None:
    """Raise ValueError unless these are row descriptors and their block table."""
    num_rows = rows.shape[0]
    check(
        rows.shape == (num_rows, len(ROW_FIELDS))
        and rows.dtype == torch.int32
        and rows.is_contiguous(),
        f"want row descriptors [R, {len(ROW_FIELDS)}] int32, got {tuple(rows.shape)} {rows.dtype}",
    )
    check(
        block_table.dim() == 2
        and block_table.shape[0] == num_rows
        and block_table.dtype == torch.int32
        and block_table.stride(1) == 1,
        f"want a block table [{num_rows}, W] int32, "
        f"got {tuple(block_table.shape)} {block_table.dtype}",
    )


def _check_query_starts(query_start_loc: torch.Tensor, num_rows: int) -> None:
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
