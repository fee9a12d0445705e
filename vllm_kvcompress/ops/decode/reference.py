"""Plain references of the ops of a step: loops in float64 over tokens and pages."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.rows_reference import descriptors, stream_tokens
from vllm_kvcompress.ops.structs import Logits, Pool, Rows


def ragged_decode(
    query: torch.Tensor, pool: Pool, rows: Rows, layer: int, logits: Logits, out: torch.Tensor
) -> None:
    """See `ops.ragged_decode`."""
    assert rows.page_offsets is not None and rows.query_start_loc is not None
    num_kv_heads, head_size = pool.num_kv_heads, pool.head_size
    group = query.shape[1] // num_kv_heads
    starts = rows.query_start_loc.tolist()
    for r, (row, offsets, table) in enumerate(
        zip(
            descriptors(rows.descriptors),
            rows.page_offsets.tolist(),
            rows.block_table.tolist(),
            strict=True,
        )
    ):
        for head in range(num_kv_heads if starts[r + 1] > starts[r] else 0):
            stream = layer * num_kv_heads + head
            places, _ = stream_tokens(
                row, offsets, table, stream, pool.num_streams, pool.block_size
            )
            page_ids, at = (torch.tensor(x, device=query.device) for x in zip(*places, strict=True))
            entries = pool.pages[page_ids, at].double()
            keys, values = entries[:, :head_size], entries[:, head_size:]
            if pool.key_scale is not None:
                keys = keys * pool.key_scale[stream].double()
            if pool.value_scale is not None:
                values = values * pool.value_scale[stream].double()
            for token in range(starts[r], starts[r + 1]):
                limit = len(places) - (starts[r + 1] - 1 - token)
                for q in range(head * group, (head + 1) * group):
                    weights = _weights(keys[:limit], query[token, q], logits, q)
                    out[token, q] = (weights @ values[:limit]).to(out.dtype)


def _weights(keys: torch.Tensor, query: torch.Tensor, logits: Logits, head: int) -> torch.Tensor:
    """[n] of one query over [n, d] keys."""
    products = keys @ query.double() * logits.scale
    if logits.soft_cap > 0:
        products = logits.soft_cap * torch.tanh(products / logits.soft_cap)
    if logits.sinks is not None:
        products = torch.cat([products, logits.sinks[head : head + 1].double()])
    return products.softmax(dim=0)[: len(keys)]


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
    slots: torch.Tensor,
    *,
    block_size: int,
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
