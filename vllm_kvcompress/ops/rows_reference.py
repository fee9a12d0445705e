"""Where tokens lie, by plain loops: what references on the paged pool share."""

from __future__ import annotations

import torch

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


def prompt_entries(
    pool: torch.Tensor, row: RowDescriptor, table: list[int], stream: int, num_streams: int
) -> torch.Tensor:
    """[n, 2 d] float64 keys and values of one stream of a prompt that is still dense."""
    block_size = pool.shape[1]
    places = []
    for position in range(row.seq_len):
        block = table[row.column_of(position // block_size)]
        places.append((block * num_streams + stream, position % block_size))
    page_ids, at = (torch.tensor(x, device=pool.device) for x in zip(*places, strict=True))
    return pool[page_ids, at].double()
