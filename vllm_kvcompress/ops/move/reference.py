"""Plain references of copies."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.rows_reference import descriptors


def compact(
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    page_offsets: torch.Tensor,
    indices: torch.Tensor,
    *,
    max_region_blocks: int,
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
                for place in range(block_size):
                    entry = page * entries_per_page + place // tokens_per_entry
                    token = int(indices[r, entry]) * tokens_per_entry + place % tokens_per_entry
                    source = table[token // block_size] * num_streams + stream
                    bits[target, place] = bits[source, token % block_size]


def move_entries(
    source: torch.Tensor,
    source_index: torch.Tensor,
    target: torch.Tensor,
    target_index: torch.Tensor,
) -> None:
    """See `ops.move_entries`."""
    is_moved = (source_index >= 0) & (target_index >= 0)
    target[target_index[is_moved]] = source[source_index[is_moved]]
