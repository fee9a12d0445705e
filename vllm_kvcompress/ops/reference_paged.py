"""Plain references of the ops on the paged pool: loops in float64 over tokens and pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_kvcompress.ops import reference
from vllm_kvcompress.row_descriptor import RowDescriptor


def descriptors(rows: torch.Tensor) -> list[RowDescriptor]:
    """Of [R, ROW_FIELDS] numbers."""
    return [RowDescriptor(*row) for row in rows.tolist()]


def stream_tokens(
    row: RowDescriptor,
    offsets: list[int],
    table: list[int],
    stream: int,
    num_streams: int,
    block_size: int,
) -> tuple[list[tuple[int, int]], int]:
    """Where one stream's tokens lie, in order.

    Args:
        row: descriptor of the request.
        offsets: its page offsets; not read if it is dense.
        table: its block-table row.
        stream: layer * H + head.
        num_streams: L * H.
        block_size: tokens per page.

    Returns:
        (page id, place in the page) of every token, and how many of them are the region's.
    """
    places = []
    if row.num_region_blocks:
        for page in range(offsets[stream], offsets[stream + 1]):
            block = table[row.region_column + page // num_streams]
            page_id = block * num_streams + page % num_streams
            places += [(page_id, i) for i in range(block_size)]
    num_region_tokens = len(places)
    for position in range(row.first_kept_block * block_size, row.seq_len):
        block = table[row.column_of(position // block_size)]
        places.append((block * num_streams + stream, position % block_size))
    return places, num_region_tokens


def ragged_decode(
    query: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    page_offsets: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    out: torch.Tensor,
    *,
    layer: int,
    num_kv_heads: int,
    scale: float,
    logits_soft_cap: float,
    sinks: torch.Tensor | None,
) -> None:
    """See `ops.ragged_decode`."""
    block_size, head_size = pool.shape[1], query.shape[2]
    group = query.shape[1] // num_kv_heads
    num_streams = page_offsets.shape[1] - 1
    starts = query_start_loc.tolist()
    for r, (row, offsets, table) in enumerate(
        zip(descriptors(rows), page_offsets.tolist(), block_table.tolist(), strict=True)
    ):
        for head in range(num_kv_heads if starts[r + 1] > starts[r] else 0):
            stream = layer * num_kv_heads + head
            places, _ = stream_tokens(row, offsets, table, stream, num_streams, block_size)
            pages, slots = (torch.tensor(x, device=pool.device) for x in zip(*places, strict=True))
            entries = pool[pages, slots].double()
            keys, values = entries[:, :head_size], entries[:, head_size:]
            if key_scale is not None and value_scale is not None:
                keys = keys * key_scale[stream].double()
                values = values * value_scale[stream].double()
            for token in range(starts[r], starts[r + 1]):
                limit = len(places) - (starts[r + 1] - 1 - token)
                for q in range(head * group, (head + 1) * group):
                    logits = keys[:limit] @ query[token, q].double() * scale
                    if logits_soft_cap > 0:
                        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
                    if sinks is not None:
                        logits = torch.cat([logits, sinks[q : q + 1].double()])
                    weights = logits.softmax(dim=0)[:limit]
                    out[token, q] = (weights @ values[:limit]).to(out.dtype)


def decode_work(
    rows: torch.Tensor,
    page_offsets: torch.Tensor,
    query_start_loc: torch.Tensor,
    tile_starts: torch.Tensor,
    num_tiles: torch.Tensor,
    first_streams: torch.Tensor,
    *,
    num_kv_heads: int,
    block_size: int,
    tile_tokens: int,
    least_tiles: int,
) -> None:
    """See `ops.decode_work`."""
    num_layers, num_programs = first_streams.shape
    starts = query_start_loc.tolist()
    for layer in range(num_layers):
        owners: list[int] = []
        for r, (row, offsets) in enumerate(
            zip(descriptors(rows), page_offsets.tolist(), strict=True)
        ):
            for head in range(num_kv_heads):
                index, stream = r * num_kv_heads + head, layer * num_kv_heads + head
                tile_starts[layer, index] = len(owners)
                if starts[r + 1] == starts[r]:
                    continue
                num_tokens = row.seq_len - row.first_kept_block * block_size
                if row.num_region_blocks:
                    num_tokens += (offsets[stream + 1] - offsets[stream]) * block_size
                owners += [index] * -(-num_tokens // tile_tokens)
        tile_starts[layer, len(rows) * num_kv_heads] = len(owners)
        num_tiles[layer] = len(owners)
        working = min(num_programs, -(-len(owners) // least_tiles))
        for program in range(working):
            share, extra = divmod(len(owners), working)
            first_streams[layer, program] = owners[program * share + min(program, extra)]


def token_slots(
    rows: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    block_size: int,
    slots: torch.Tensor,
) -> None:
    """See `ops.token_slots`."""
    slots.fill_(-1)
    starts = query_start_loc.tolist()
    for r, (row, table) in enumerate(zip(descriptors(rows), block_table.tolist(), strict=True)):
        query_len = starts[r + 1] - starts[r]
        for i in range(query_len):
            position = row.seq_len - query_len + i
            block = table[row.column_of(position // block_size)]
            slots[starts[r] + i] = block * block_size + position % block_size


def store_tokens(
    key: torch.Tensor,
    value: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    layer: int,
    num_layers: int,
) -> None:
    """See `ops.store_tokens`."""
    _, num_heads, head_size = key.shape
    block_size = pool.shape[1]
    for token, slot in enumerate(slots.tolist()):
        for head in range(num_heads if slot >= 0 else 0):
            stream = layer * num_heads + head
            page = slot // block_size * num_layers * num_heads + stream
            for new, scale, start in (
                (key[token, head], key_scale[stream], 0),
                (value[token, head], value_scale[stream], head_size),
            ):
                scaled = new.float() / scale
                if pool.dtype.itemsize == 1:
                    largest = torch.finfo(pool.dtype).max
                    scaled = scaled.clamp(-largest, largest)
                pool[page, slot % block_size, start : start + head_size] = scaled.to(pool.dtype)


def prompt_entries(
    pool: torch.Tensor, row: RowDescriptor, table: list[int], stream: int, num_streams: int
) -> torch.Tensor:
    """[n, 2 d] float64 keys and values of one stream of a prompt that is still dense."""
    block_size = pool.shape[1]
    places = []
    for position in range(row.seq_len):
        block = table[row.column_of(position // block_size)]
        places.append((block * num_streams + stream, position % block_size))
    pages, slots = (torch.tensor(x, device=pool.device) for x in zip(*places, strict=True))
    return pool[pages, slots].double()


def window_scores(
    query: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    num_rated: torch.Tensor,
    max_rated: int,
    key_scale: torch.Tensor,
    *,
    layer: int,
    num_layers: int,
    num_kv_heads: int,
    scale: torch.Tensor,
    logits_soft_cap: torch.Tensor | None,
    reduce: str,
    power: int,
    near_tokens: int,
    pool_kernel: int,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    part_sums: torch.Tensor | None,
) -> torch.Tensor:
    """See `ops.window_scores`; a given lse is not believed but computed."""
    num_requests, num_scored, window, num_heads, head_size = query.shape
    group = num_heads // num_kv_heads
    num_groups = 1 if reduce == "defensive" else group
    size = (num_requests, num_scored * num_kv_heads, num_groups, max_rated)
    scores = torch.full(size, float("nan"), dtype=torch.float64, device=query.device)
    if part_sums is not None:
        part_sums.zero_()
    for r, (row, table) in enumerate(zip(descriptors(rows), block_table.tolist(), strict=True)):
        num_keys, rated = row.seq_len, int(num_rated[r])
        for scored_stream in range(num_scored * num_kv_heads):
            index, head = divmod(scored_stream, num_kv_heads)
            stream = layer * num_kv_heads + scored_stream
            entries = prompt_entries(pool, row, table, stream, num_layers * num_kv_heads)
            keys = entries[:, :head_size] * key_scale[stream].double()
            worst = torch.zeros(rated, dtype=torch.float64, device=query.device)
            for g in range(group):
                query_head = head * group + g
                logits = query[r, index, :, query_head].double() @ keys.T * scale[index].double()
                if logits_soft_cap is not None and logits_soft_cap[index] > 0:
                    cap = logits_soft_cap[index].double()
                    logits = cap * torch.tanh(logits / cap)
                positions = torch.arange(num_keys - window, num_keys, device=query.device)
                age = positions[:, None] - torch.arange(num_keys, device=query.device)
                seen = logits.masked_fill(age < 0, float("-inf"))
                sink = seen.new_full((window, 1), float("-inf"))
                if sinks is not None:
                    sink.fill_(sinks[index, query_head])
                weights = torch.cat([seen, sink], dim=1).softmax(dim=-1)[:, :-1]
                weights = weights.masked_fill(age < near_tokens, 0.0)[:, :rated] ** power
                if reduce == "defensive":
                    worst = worst.maximum(_defensive(weights, pool_kernel))
                elif reduce == "max":
                    scores[r, scored_stream, g, :rated] = weights.amax(dim=0)
                else:
                    joined = weights.mean(dim=0) if reduce == "mean" else weights.sum(dim=0)
                    scores[r, scored_stream, g, :rated] = joined
            if reduce == "defensive":
                scores[r, scored_stream, 0, :rated] = worst
                if part_sums is not None:
                    part_sums[r, scored_stream, 0] = worst.sum()
    return scores.float()


def _defensive(weights: torch.Tensor, pool_kernel: int) -> torch.Tensor:
    """Largest of [w, n] weights, each row mean-pooled and brought back to its old sum."""
    half = pool_kernel // 2
    pooled = torch.zeros_like(weights)
    for shift in range(-half, half + 1):
        source = weights[:, max(0, -shift) : weights.shape[1] - max(0, shift)]
        pooled[:, max(0, shift) : weights.shape[1] - max(0, -shift)] += source / pool_kernel
    old_sum = weights.sum(dim=1, keepdim=True)
    new_sum = pooled.sum(dim=1, keepdim=True)
    return torch.where(new_sum > 0, pooled / new_sum * old_sum, 0.0).amax(dim=0)


def value_effect(
    pool: torch.Tensor,
    output_root: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    num_rated: torch.Tensor,
    value_scale: torch.Tensor,
    effect: torch.Tensor,
    *,
    layer: int,
    num_layers: int,
) -> None:
    """See `ops.paged_value_effect`."""
    num_scored, num_kv_heads, head_size, _ = output_root.shape
    roots = output_root.flatten(0, 1).double()
    for r, (row, table) in enumerate(zip(descriptors(rows), block_table.tolist(), strict=True)):
        for scored_stream in range(num_scored * num_kv_heads):
            stream = layer * num_kv_heads + scored_stream
            entries = prompt_entries(pool, row, table, stream, num_layers * num_kv_heads)
            values = entries[: int(num_rated[r]), head_size:] * value_scale[stream].double()
            moved = values @ roots[scored_stream]
            effect[r, scored_stream, : len(moved)] = moved.norm(dim=1).float()


def join_scores(
    scores: torch.Tensor,
    num_rated: torch.Tensor,
    num_candidates: torch.Tensor,
    effect: torch.Tensor | None,
    out: torch.Tensor,
    *,
    num_kv_heads: int,
    group_reduce: str,
    pool_kernel: int,
    pool_kind: str,
    pool_first: bool,
    floor_at_mean: bool,
    span_kernel: int,
    page_reduce: str,
    page_size: int,
) -> None:
    """See `ops.join_scores`."""
    joins: dict[str, Any] = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}
    join = joins[group_reduce]
    for r, (rated, candidates) in enumerate(
        zip(num_rated.tolist(), num_candidates.tolist(), strict=True)
    ):
        joined = scores[r, :, :, :rated].double()
        if pool_first:
            joined = join(reference.pool_scores(joined, pool_kernel, pool_kind).double(), dim=1)
        else:
            joined = reference.pool_scores(join(joined, dim=1), pool_kernel, pool_kind).double()
        if floor_at_mean:
            joined = joined.maximum(joined.mean(dim=1, keepdim=True))
        if effect is not None:
            own = effect[r, :, :rated].double().unflatten(0, (-1, num_kv_heads))
            total = own.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            joined = joined * (own / total).flatten(0, 1)
        joined = reference.pool_scores(joined, span_kernel, "max")[:, :candidates]
        if page_reduce != "token":
            joined = reference.page_scores(joined, page_size, page_reduce)
        out[r, :, : joined.shape[1]] = joined


def joint_page_counts(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    total_pages: torch.Tensor,
    guaranteed: torch.Tensor,
    num_pages: torch.Tensor,
    page_size: int,
    apportion: Callable[..., list[int]],
) -> None:
    """See `ops.joint_page_counts`."""
    num_groups = total_pages.shape[1]
    size = scores.shape[1] // num_groups
    lowest = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    for r, entries in enumerate(num_entries.tolist()):
        for group in range(num_groups):
            streams = slice(group * size, (group + 1) * size)
            total = int(total_pages[r, group])
            counts = reference.joint_top_counts(
                lowest[r, streams, :entries], total * page_size, int(guaranteed[r, group])
            ).tolist()
            if page_size > 1:
                ideal = [count / page_size for count in counts]
                counts = apportion(ideal, total, 1, entries // page_size)
            num_pages[r, streams] = torch.tensor(counts, dtype=torch.int32)


def select_entries(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_pages: torch.Tensor,
    page_offsets: torch.Tensor,
    indices: torch.Tensor,
    page_size: int,
) -> None:
    """See `ops.select_entries`."""
    lowest = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    for r, entries in enumerate(num_entries.tolist()):
        page_offsets[r, 0] = 0
        page_offsets[r, 1:] = num_pages[r].cumsum(0)
        chosen = reference.select_top(lowest[r, :, :entries], num_pages[r] * page_size)
        indices[r, : len(chosen)] = chosen.to(torch.int32)


def compact(
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    page_offsets: torch.Tensor,
    indices: torch.Tensor,
    entries_per_page: int,
) -> None:
    """See `ops.compact`."""
    num_streams = page_offsets.shape[1] - 1
    block_size = pool.shape[1]
    tokens_per_entry = block_size // entries_per_page
    bits = pool.view(torch.uint8)
    for r, (row, table) in enumerate(zip(descriptors(rows), block_table.tolist(), strict=True)):
        offsets = page_offsets[r].tolist()
        for stream in range(num_streams if row.num_region_blocks else 0):
            for page in range(offsets[stream], offsets[stream + 1]):
                block = table[row.region_column + page // num_streams]
                target = block * num_streams + page % num_streams
                for slot in range(block_size):
                    entry = page * entries_per_page + slot // tokens_per_entry
                    token = int(indices[r, entry]) * tokens_per_entry + slot % tokens_per_entry
                    source = table[token // block_size] * num_streams + stream
                    bits[target, slot] = bits[source, token % block_size]


def move_entries(
    source: torch.Tensor,
    source_index: torch.Tensor,
    target: torch.Tensor,
    target_index: torch.Tensor,
) -> None:
    """See `ops.move_entries`."""
    is_moved = (source_index >= 0) & (target_index >= 0)
    target[target_index[is_moved]] = source[source_index[is_moved]]
