"""Attention over compressed rows, and the store of new tokens, on the paged pool of a GPU.

Unlike `paged.py`, whose page order is whatever a CPU kernel wants, a page here is plain: token
after token, a token's key before its value (vLLM's layout BLHNC on CUDA).
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvcompress.ops import reference_paged as reference
from vllm_kvcompress.ops.checks import check, check_backend
from vllm_kvcompress.ops.decode_work import DecodeWork, decode_work, new_decode_work
from vllm_kvcompress.ops.pool_checks import (
    MAX_QUERY_LEN,
    check_pool,
    check_query_starts,
    check_rows,
    stream_scales,
    triton_kernels,
)


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
    sinks: torch.Tensor | None = None,
    work: DecodeWork | None = None,
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
        rows: [R, ROW_FIELDS] int32, see `RowDescriptor`. seq_len counts all tokens of the
            request, the queries too; `first_kept_block * b` must lie before the first query.
        page_offsets: [R, S + 1] int32, first virtual page of every stream of the region, S = L * H.
            Not read for dense rows.
        block_table: [R, W] int32 block ids, in the columns that `RowDescriptor` says. Entries of
            evicted blocks and of older regions are not read.
        query_start_loc: [R + 1] int32; a row may have no query, and is then left alone.
        layer: index of the layer among the L that share the pool.
        num_kv_heads: H.
        scale: factor on the products.
        max_query_len: most queries of a row, 1 to 8.
        key_scale, value_scale: [S] float32, what stored keys and values are multiplied by;
            None = 1.
        logits_soft_cap: squash logits into (-cap, cap) by tanh; 0 = not.
        sinks: [Hq] float32 or as query, a logit per head that no value belongs to.
        work: what `decode_work` has made of these rows, with room for `max_query_len`; written
            where streams are shared. None = made here, which is one launch more. Not read by
            'reference'.
        out: [T, Hq, d] like query, written; None = a new tensor.
        backend: 'triton' or 'reference'.

    Returns:
        `out`. One launch, no host sync, deterministic. With `work` given, what is launched does not
        depend on the rows, so that a CUDA graph may replay it for others.

    Raises:
        ValueError: on shapes or types that do not fit.
        RuntimeError: if the backend cannot run here.
    """
    check_pool(pool, query, num_kv_heads)
    num_rows = rows.shape[0]
    num_streams = page_offsets.shape[-1] - 1
    check_rows(rows, block_table)
    check_query_starts(query_start_loc, num_rows)
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
        sinks is None
        or (sinks.shape == (query.shape[1],) and sinks.dtype in (torch.float32, query.dtype)),
        f"want sinks [{query.shape[1]}] float32 or {query.dtype}",
    )
    check(logits_soft_cap >= 0, f"soft cap {logits_soft_cap} must not be negative")
    if key_scale is not None or value_scale is not None:
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
        "sinks": sinks,
    }
    indices = (rows, page_offsets, block_table, query_start_loc)
    tensors = (query, pool, *indices, key_scale, value_scale, out)
    if check_backend(backend, "triton") == "reference":
        reference.ragged_decode(*tensors, **options)
        return out
    kernels = triton_kernels(query, pool, *indices)
    if work is None:
        work = _own_work(query, pool, *indices, num_kv_heads, max_query_len)
    _check_work(work, query, num_rows, num_layers, num_kv_heads, max_query_len)
    kernels.ragged_decode(
        *tensors,
        tile_starts=work.tile_starts,
        num_tiles=work.num_tiles,
        first_streams=work.first_streams,
        pieces=work.pieces,
        piece_lse=work.piece_lse,
        tickets=work.tickets,
        tiles=work.tiles,
        num_layers=num_layers,
        **options,
    )
    return out


def _own_work(
    query: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    page_offsets: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_kv_heads: int,
    max_query_len: int,
) -> DecodeWork:
    """The work of one call."""
    work = new_decode_work(
        rows.shape[0],
        num_layers=(page_offsets.shape[1] - 1) // num_kv_heads,
        num_kv_heads=num_kv_heads,
        group=query.shape[1] // num_kv_heads,
        head_size=query.shape[2],
        pool_dtype=pool.dtype,
        device=query.device,
        max_query_len=max_query_len,
    )
    return decode_work(
        rows,
        page_offsets,
        query_start_loc,
        num_kv_heads=num_kv_heads,
        block_size=pool.shape[1],
        out=work,
    )


def _check_work(
    work: DecodeWork,
    query: torch.Tensor,
    num_rows: int,
    num_layers: int,
    num_kv_heads: int,
    max_query_len: int,
) -> None:
    check(
        num_rows * num_kv_heads < work.tile_starts.shape[1],
        f"{num_rows} rows do not fit work of {work.tile_starts.shape[1] - 1} streams",
    )
    piece_rows = query.shape[1] // num_kv_heads * max_query_len
    check(
        work.num_tiles.shape == (num_layers,)
        and work.pieces.shape[1:] == (piece_rows, query.shape[2]),
        f"work of {work.num_tiles.shape[0]} layers and pieces {tuple(work.pieces.shape[1:])} is "
        f"not for {num_layers} layers and {(piece_rows, query.shape[2])}",
    )


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
    check_query_starts(query_start_loc, rows.shape[0])
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
