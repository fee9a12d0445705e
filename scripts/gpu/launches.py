"""Every launcher of the package at one model's shape, called on CPU tensors that nobody reads.

One generator per family of ops; each yields (what it is asked for, call).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu.shapes import ModelShape

from vllm_kvcompress import ops, triton_kernels

NUM_REQUESTS, NUM_BLOCKS, MAX_TOKENS = 4, 64, 2048
POOL_KERNEL = 5

Call = Callable[[], Any]
Calls = Iterator[tuple[str, Call]]


class Batch:
    """A few requests in a pool: what all launchers are given.

    The pool has as many pages as one block; pages of a real pool would not fit, and nobody reads
    or writes these.
    """

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        size = (shape.num_streams, shape.block_size, 2 * shape.head_size)
        self.pool = torch.empty(size, dtype=shape.pool_dtype)
        self.rows = self.ints(len(ops.ROW_FIELDS))
        self.table = self.ints(NUM_BLOCKS)
        self.offsets = self.ints(shape.num_streams + 1)
        self.lens = torch.zeros(NUM_REQUESTS, dtype=torch.int32)
        self.scales = torch.ones(shape.num_streams)
        self.model = {"layer": 3, "num_layers": shape.num_layers}

    def ints(self, width: int) -> torch.Tensor:
        """[requests, width] int32 zeros."""
        return torch.zeros(NUM_REQUESTS, width, dtype=torch.int32)

    def scores(self, num_rows: int) -> torch.Tensor:
        """[requests, rows, tokens] float32."""
        return torch.empty(NUM_REQUESTS, num_rows, MAX_TOKENS)


def decode_launches(batch: Batch) -> Calls:
    """Shares of a step's work, and decode attention."""
    shape = batch.shape

    def decode(query_len: int, **options: Any) -> Call:
        size = (NUM_REQUESTS * query_len, shape.num_heads, shape.head_size)
        query = torch.empty(size, dtype=shape.dtype)
        starts = torch.arange(NUM_REQUESTS + 1, dtype=torch.int32)
        work = ops.new_decode_work(
            NUM_REQUESTS,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            group=shape.group,
            head_size=shape.head_size,
            pool_dtype=shape.pool_dtype,
            device=batch.pool.device,
            max_query_len=query_len,
        )
        lists = {
            "tile_starts": work.tile_starts,
            "num_tiles": work.num_tiles,
            "first_streams": work.first_streams,
        }
        scales = batch.scales if shape.pool_dtype.itemsize == 1 else None

        def run() -> None:
            triton_kernels.decode_work(
                batch.rows,
                batch.offsets,
                starts,
                **lists,
                num_kv_heads=shape.num_kv_heads,
                block_size=shape.block_size,
                tile_tokens=work.tiles.num_keys,
                least_tiles=work.tiles.least_tiles,
            )
            triton_kernels.ragged_decode(
                query,
                batch.pool,
                batch.rows,
                batch.offsets,
                batch.table,
                starts,
                scales,
                scales,
                torch.empty_like(query),
                **lists,
                pieces=work.pieces,
                piece_lse=work.piece_lse,
                tickets=work.tickets,
                tiles=work.tiles,
                **batch.model,
                num_kv_heads=shape.num_kv_heads,
                scale=shape.head_size**-0.5,
                **options,
            )

        return run

    yield "one query", decode(1)
    yield "as many queries as it takes", decode(ops.MAX_QUERY_LEN)
    yield "all options", decode(1, logits_soft_cap=50.0, sinks=torch.zeros(shape.num_heads))


def slot_launches(batch: Batch) -> Calls:
    """Where new tokens go."""
    shape = batch.shape
    slots = torch.zeros(NUM_REQUESTS, dtype=torch.int64)
    yield (
        "",
        lambda: triton_kernels.token_slots(
            batch.rows, batch.table, batch.lens, slots, block_size=shape.block_size
        ),
    )


def part_sums(shape: ModelShape) -> torch.Tensor:
    """[requests, H, parts] float32."""
    num_parts = triton_kernels.num_score_parts(MAX_TOKENS, POOL_KERNEL)
    return torch.empty(NUM_REQUESTS, shape.num_kv_heads, num_parts)


def score_launches(batch: Batch) -> Calls:
    """Scores of keys under the last queries of a prompt."""
    shape = batch.shape

    def score(reduce: str, window: int, **options: Any) -> Call:
        query = torch.empty(
            NUM_REQUESTS, 1, window, shape.num_heads, shape.head_size, dtype=shape.dtype
        )
        num_groups = triton_kernels.num_score_groups(shape.group, reduce)
        scores = torch.empty(NUM_REQUESTS, shape.num_kv_heads, num_groups, MAX_TOKENS)
        usual = {
            "logits_soft_cap": None,
            "power": 1,
            "near_tokens": 0,
            "pool_kernel": POOL_KERNEL,
            "lse": None,
            "sinks": None,
            "part_sums": part_sums(shape) if reduce == "defensive" else None,
        }
        return lambda: triton_kernels.window_scores(
            query,
            batch.pool,
            batch.rows,
            batch.table,
            batch.lens,
            batch.scales,
            scores,
            **batch.model,
            num_kv_heads=shape.num_kv_heads,
            scale=torch.ones(1),
            reduce=reduce,
            **usual | options,
        )

    window = 16
    lse = torch.zeros(NUM_REQUESTS, 1, window, shape.num_heads)
    sinks = torch.zeros(shape.num_heads)
    yield "defensive", score("defensive", window, near_tokens=8)
    yield "defensive, lse given", score("defensive", window, near_tokens=8, lse=lse)
    yield "defensive, sinks, lse given", score("defensive", window, lse=lse, sinks=sinks)
    yield "mean, sinks", score("mean", window, sinks=sinks)
    yield "max", score("max", window)
    yield "max of squares", score("max", window, power=2)
    yield "mean, window 32", score("mean", 32)
    yield "sum of squares, window 64", score("sum", 64, power=2)


def effect_launches(batch: Batch) -> Calls:
    """How much values move a layer's output."""
    shape = batch.shape
    root = torch.empty(1, shape.num_kv_heads, shape.head_size, shape.head_size, dtype=shape.dtype)
    effect = batch.scores(shape.num_kv_heads)
    yield (
        "",
        lambda: triton_kernels.value_effect(
            batch.pool,
            root,
            batch.rows,
            batch.table,
            batch.lens,
            batch.scales,
            effect,
            **batch.model,
        ),
    )


def join_launches(batch: Batch) -> Calls:
    """Scores of query heads to scores of KV heads, and of pages."""
    shape = batch.shape
    effect = batch.scores(shape.num_kv_heads)

    def join(num_groups: int, with_effect: bool, **options: Any) -> Call:
        scores = torch.empty(NUM_REQUESTS, shape.num_kv_heads, num_groups, MAX_TOKENS)
        return lambda: triton_kernels.join_scores(
            scores,
            batch.lens,
            batch.lens,
            effect if with_effect else None,
            effect,
            max_candidates=MAX_TOKENS,
            num_kv_heads=shape.num_kv_heads,
            part_sums=part_sums(shape) if options["floor_at_mean"] else None,
            page_size=shape.block_size,
            pool_kind="max",
            pool_first=True,
            **options,
        )

    snapkv = {"pool_kernel": 7, "floor_at_mean": False, "group_reduce": "mean"}
    span = {"pool_kernel": 1, "floor_at_mean": True, "group_reduce": "max"}
    yield "SnapKV", join(shape.group, False, **snapkv, span_kernel=1, page_reduce="max")
    yield "span", join(1, True, **span, span_kernel=11, page_reduce="rms")


def selection_launches(batch: Batch) -> Calls:
    """Budgets of streams, and what each keeps."""
    shape = batch.shape
    scores = batch.scores(shape.num_streams)
    num_pages = batch.ints(shape.num_streams)

    def counts(page_size: int, num_groups: int) -> Call:
        totals = batch.ints(num_groups)
        return lambda: triton_kernels.joint_page_counts(
            scores, batch.lens, totals, totals, num_pages, page_size=page_size
        )

    yield "pages, all streams", counts(1, 1)
    yield "tokens, a layer's heads", counts(shape.block_size, shape.num_layers)
    indices = batch.ints(NUM_BLOCKS * shape.num_streams * shape.block_size)
    yield (
        "",
        lambda: triton_kernels.select_entries(
            scores, batch.lens, num_pages, batch.offsets, indices, page_size=1
        ),
    )


def move_launches(batch: Batch) -> Calls:
    """Copies of what is kept."""
    pool, block_size = batch.pool, batch.shape.block_size
    indices = batch.ints(NUM_BLOCKS * batch.shape.num_streams * block_size)

    def compact(entries_per_page: int) -> Call:
        return lambda: triton_kernels.compact(
            pool,
            batch.rows,
            batch.table,
            batch.offsets,
            indices,
            max_region_blocks=NUM_BLOCKS,
            entries_per_page=entries_per_page,
        )

    def move(num_entries: int) -> Call:
        entries = pool.view(num_entries, -1)
        index = torch.zeros(64, dtype=torch.int64)
        return lambda: triton_kernels.move_entries(entries, index, entries, index)

    yield "pages", compact(1)
    yield "tokens", compact(block_size)
    yield "pages", move(pool.shape[0])
    yield "tokens", move(pool.shape[0] * block_size)


FAMILIES = (
    decode_launches,
    slot_launches,
    score_launches,
    effect_launches,
    join_launches,
    selection_launches,
    move_launches,
)


def launches_of(shape: ModelShape) -> Calls:
    """Every launcher of the package at one shape, by what it is asked for."""
    batch = Batch(shape)
    for family in FAMILIES:
        yield from family(batch)
