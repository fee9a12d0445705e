"""Where results of ragged decode attention go: straight out, or in pieces to be merged first."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .paging import LOG2E, cast


class Request(NamedTuple):
    """Queries of one request, and one KV head of it.

    Attributes:
        start: first query, among all of the batch.
        num_queries: its queries.
        first_head: first query head of the KV head.
    """

    start: tl.tensor
    num_queries: tl.tensor
    first_head: tl.tensor


class Output(NamedTuple):
    """Where results go.

    Attributes:
        ptr, stride_token, stride_head: of the batch's results.
        sinks: a learned logit per query head, that no value belongs to, or None.
    """

    ptr: tl.tensor
    stride_token: tl.tensor
    stride_head: tl.tensor
    sinks: tl.tensor


class DecodeShape(NamedTuple):
    """Constants of the pool and of a request's query rows."""

    PAGES_PER_BLOCK: tl.constexpr
    BLOCK_SIZE: tl.constexpr
    HEAD_SIZE: tl.constexpr
    GROUP: tl.constexpr
    PIECE_ROWS: tl.constexpr


class Pieces(NamedTuple):
    """Results of parts of streams that programs leave for the last of them.

    Attributes:
        out: [2 * programs, PIECE_ROWS, HEAD_SIZE]. A program leaves at most two: the end of a
            stream, and the start of one.
        lse: [2 * programs, PIECE_ROWS].
        tickets: [programs], how many of a stream's pieces are there, at its first program.
    """

    out: tl.tensor
    lse: tl.tensor
    tickets: tl.tensor


@triton.jit
def load_request(query_start_ptr, index, head, GROUP: tl.constexpr):
    """The `Request` of one row of the batch and KV head."""
    start = tl.load(query_start_ptr + index)
    return Request(start, tl.load(query_start_ptr + index + 1) - start, head * GROUP)


@triton.jit
def query_ptrs(
    ptr, m, request, stride_token, stride_head, GROUP: tl.constexpr, TILE_D: tl.constexpr
):
    """[m, TILE_D] pointers to query rows m: query m // GROUP, head m % GROUP of the group."""
    token = (request.start + m // GROUP).to(tl.int64)
    head = request.first_head + m % GROUP
    dim = tl.arange(0, TILE_D)
    return ptr + token[:, None] * stride_token + head[:, None] * stride_head + dim[None, :]


@triton.jit
def query_mask(m, request, shape: tl.constexpr, TILE_D: tl.constexpr):
    """[m, TILE_D] which elements of query rows m exist."""
    is_element = tl.arange(0, TILE_D) < shape.HEAD_SIZE
    return (m // shape.GROUP < request.num_queries)[:, None] & is_element[None, :]


@triton.jit
def store_out(output, out, lse, m, request, shape: tl.constexpr):
    """Write the results [m, TILE_D] of a KV head's query rows m, whose base-2 lse is [m]."""
    GROUP: tl.constexpr = shape.GROUP
    TILE_D: tl.constexpr = out.shape[1]
    if output.sinks is not None:
        # The sink counts in the softmax.
        heads = request.first_head + m % GROUP
        mask = m // GROUP < request.num_queries
        sink = tl.load(output.sinks + heads, mask=mask, other=0.0).to(tl.float32) * LOG2E
        out = out / (1 + tl.exp2(sink - lse))[:, None]
    ptrs = query_ptrs(
        output.ptr, m, request, output.stride_token, output.stride_head, GROUP, TILE_D
    )
    out_mask = query_mask(m, request, shape, TILE_D)
    tl.store(ptrs, cast(out, output.ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def leave_piece(pieces, out, lse, place, m, request, shape: tl.constexpr):
    """Write a program's part of a stream: [m, TILE_D] out and [m] lse of query rows m."""
    TILE_D: tl.constexpr = out.shape[1]
    piece_row = place * shape.PIECE_ROWS + m
    ptrs = pieces.out + piece_row[:, None] * shape.HEAD_SIZE + tl.arange(0, TILE_D)[None, :]
    tl.store(ptrs, out, mask=query_mask(m, request, shape, TILE_D))
    tl.store(pieces.lse + piece_row, lse, mask=m // shape.GROUP < request.num_queries)


@triton.jit
def is_last_piece(pieces, first_program, last_program):
    """Whether all other programs have left their pieces of a stream; counts this program's."""
    # All threads have stored before one of them says so.
    tl.debug_barrier()
    ticket_ptr = pieces.tickets + first_program
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    is_last = ticket == last_program - first_program
    if is_last:
        # For the next layer.
        tl.store(ticket_ptr, 0)
    return is_last


@triton.jit
def _merge_pieces(
    pieces,
    m,
    first_program,
    last_program,
    shape: tl.constexpr,
    TILE_D: tl.constexpr,
    NUM_MERGED: tl.constexpr,
):
    """([m, TILE_D] result, [m] base-2 lse) of the pieces that programs have left of a stream."""
    TILE_M: tl.constexpr = m.shape[0]
    dim = tl.arange(0, TILE_D)
    m_mask = m < shape.PIECE_ROWS
    best = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, TILE_D], tl.float32)
    # Not to be pipelined: that would take shared memory from the loop over keys.
    for first in tl.range(first_program, last_program + 1, NUM_MERGED, num_stages=1):
        program = first + tl.arange(0, NUM_MERGED)
        place = 2 * program + tl.where(program == first_program, 1, 0)
        entry = place[:, None] * shape.PIECE_ROWS + m[None, :]
        mask = (program <= last_program)[:, None] & m_mask[None, :]
        # From the L2 cache: other multiprocessors have written them.
        lse = tl.load(pieces.lse + entry, mask=mask, other=float("-inf"), cache_modifier=".cg")
        piece = tl.load(
            pieces.out + entry[:, :, None] * shape.HEAD_SIZE + dim[None, None, :],
            mask=mask[:, :, None] & (dim < shape.HEAD_SIZE)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_best = tl.maximum(best, tl.max(lse, axis=0))
        # A query may see none of a piece's tokens.
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(lse - base[None, :])
        decay = tl.exp2(best - base)
        total = total * decay + tl.sum(weights, axis=0)
        acc = acc * decay[:, None] + tl.sum(piece * weights[:, :, None], axis=0)
        best = new_best
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    return acc / total[:, None], tl.where(seen, best + tl.log2(total), float("-inf"))


@triton.jit
def store_merged(
    pieces,
    output,
    request,
    first_program,
    last_program,
    shape: tl.constexpr,
    TILE_MERGED: tl.constexpr,
    TILE_D: tl.constexpr,
    NUM_MERGED: tl.constexpr,
):
    """Write what the pieces of a stream give together."""
    # A few rows at a time: all of them may be more than shared memory holds.
    for first_row in tl.range(0, shape.PIECE_ROWS, TILE_MERGED, num_stages=1):
        m = first_row + tl.arange(0, TILE_MERGED)
        out, lse = _merge_pieces(pieces, m, first_program, last_program, shape, TILE_D, NUM_MERGED)
        store_out(output, out, lse, m, request, shape)
