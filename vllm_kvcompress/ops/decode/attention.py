"""Attention over compressed rows."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.decode import reference
from vllm_kvcompress.ops.decode.work import DecodeWork, decode_work, new_decode_work
from vllm_kvcompress.ops.dispatch import Provider, by_triton, choose
from vllm_kvcompress.ops.limits import (
    MAX_QUERY_LEN,
    check_page_offsets,
    check_pool,
    check_query_starts,
    check_rows,
    check_scales,
)
from vllm_kvcompress.ops.structs import Logits, Pool, Rows


def ragged_decode(
    query: torch.Tensor,
    pool: Pool,
    rows: Rows,
    layer: int,
    logits: Logits,
    *,
    max_query_len: int = 1,
    work: DecodeWork | None = None,
    out: torch.Tensor | None = None,
    backend: str = "triton",
) -> torch.Tensor:
    """Attention of each row's last queries over its region pages and its dense tail.

    A row may be compressed or dense; every KV head of a compressed one has its own number of
    region pages. Queries see the region and the tail up to their own token.

    Args:
        query: [T, Hq, d] bf16, fp16 or fp32, all rows' tokens one after another, Hq = H * g.
        pool: plain pages in query's dtype, or fp8 e4m3 / e5m2.
        rows: with page offsets and query starts. seq_len counts all tokens of the request, the
            queries too; `first_kept_block * b` must lie before the first query. A row may have no
            query, and is then left alone.
        layer: index of the layer among those that share the pool.
        logits: one scale and soft cap; sinks [Hq] float32 or as query.
        max_query_len: most queries of a row, 1 to 8.
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
    check_pool(pool, query)
    check_rows(rows)
    check_query_starts(rows)
    check_page_offsets(rows, pool.num_layers, pool.num_kv_heads)
    check(0 <= layer < pool.num_layers, f"layer {layer} is not among {pool.num_layers}")
    check(
        pool.pages.shape[0] % pool.num_streams == 0,
        f"a pool of {pool.pages.shape[0]} pages is not whole blocks of {pool.num_streams}",
    )
    check(
        1 <= max_query_len <= MAX_QUERY_LEN,
        f"rows may have 1 to {MAX_QUERY_LEN} queries, not {max_query_len}",
    )
    _check_logits(logits, query)
    check_scales(pool.key_scale, pool.num_streams)
    check_scales(pool.value_scale, pool.num_streams)
    if out is None:
        out = torch.empty_like(query)
    check(
        out.shape == query.shape and out.dtype == query.dtype and out.stride(2) == 1,
        f"want out like query {tuple(query.shape)}, got {tuple(out.shape)} {out.dtype}",
    )
    decode = choose(_DECODE, backend)
    decode(query, pool, rows, layer, logits, out, max_query_len=max_query_len, work=work)
    return out


def _check_logits(logits: Logits, query: torch.Tensor) -> None:
    num_heads, sinks = query.shape[1], logits.sinks
    check(
        sinks is None
        or (sinks.shape == (num_heads,) and sinks.dtype in (torch.float32, query.dtype)),
        f"want sinks [{num_heads}] float32 or {query.dtype}",
    )
    scale, soft_cap = logits.scale, logits.soft_cap
    if isinstance(scale, torch.Tensor) or isinstance(soft_cap, torch.Tensor):
        raise ValueError("want scale and soft cap as numbers")
    check(soft_cap >= 0, f"soft cap {soft_cap} must not be negative")


def _by_triton(
    query: torch.Tensor,
    pool: Pool,
    rows: Rows,
    layer: int,
    logits: Logits,
    out: torch.Tensor,
    *,
    max_query_len: int,
    work: DecodeWork | None,
) -> None:
    if work is None:
        work = _own_work(query, pool, rows, max_query_len)
    _check_work(work, query, pool, len(rows), max_query_len)
    key_scale, value_scale = pool.key_scale, pool.value_scale
    if (key_scale is None) != (value_scale is None):
        # The kernel takes both, or none.
        ones = torch.ones(pool.num_streams, dtype=torch.float32, device=query.device)
        key_scale, value_scale = (ones if x is None else x for x in (key_scale, value_scale))
    by_triton("ragged_decode")(
        query,
        pool.pages,
        rows.descriptors,
        rows.page_offsets,
        rows.block_table,
        rows.query_start_loc,
        key_scale,
        value_scale,
        out,
        tile_starts=work.tile_starts,
        num_tiles=work.num_tiles,
        first_streams=work.first_streams,
        pieces=work.pieces,
        piece_lse=work.piece_lse,
        tickets=work.tickets,
        tiles=work.tiles,
        num_layers=pool.num_layers,
        layer=layer,
        num_kv_heads=pool.num_kv_heads,
        scale=logits.scale,
        logits_soft_cap=logits.soft_cap,
        sinks=logits.sinks,
    )


def _by_reference(*arguments: Any, max_query_len: int, work: DecodeWork | None) -> None:
    reference.ragged_decode(*arguments)


_DECODE: dict[str, Provider] = {"triton": _by_triton, "reference": _by_reference}


def _own_work(query: torch.Tensor, pool: Pool, rows: Rows, max_query_len: int) -> DecodeWork:
    """The work of one call."""
    work = new_decode_work(
        len(rows),
        num_layers=pool.num_layers,
        num_kv_heads=pool.num_kv_heads,
        group=query.shape[1] // pool.num_kv_heads,
        head_size=query.shape[2],
        pool_dtype=pool.pages.dtype,
        device=query.device,
        max_query_len=max_query_len,
    )
    return decode_work(rows, num_kv_heads=pool.num_kv_heads, block_size=pool.block_size, out=work)


def _check_work(
    work: DecodeWork, query: torch.Tensor, pool: Pool, num_rows: int, max_query_len: int
) -> None:
    check(
        num_rows * pool.num_kv_heads < work.tile_starts.shape[1],
        f"{num_rows} rows do not fit work of {work.tile_starts.shape[1] - 1} streams",
    )
    piece_rows = query.shape[1] // pool.num_kv_heads * max_query_len
    check(
        work.num_tiles.shape == (pool.num_layers,)
        and work.pieces.shape[1:] == (piece_rows, query.shape[2]),
        f"work of {work.num_tiles.shape[0]} layers and pieces {tuple(work.pieces.shape[1:])} is "
        f"not for {pool.num_layers} layers and {(piece_rows, query.shape[2])}",
    )
