"""Copies by torch, on any device and for pages of any size and order."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.pages import (
    PageOrder,
    copy_pages,
    gather_tokens,
    pack_pages,
    region_page_ids,
)
from vllm_kvcompress.row_descriptor import RowDescriptor

# Pages that are held at once on their way.
_PAGES_AT_ONCE = 4096


def compact(
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    page_offsets: torch.Tensor,
    indices: torch.Tensor,
    *,
    order: PageOrder | None,
    max_region_blocks: int,
    entries_per_page: int,
) -> None:
    """See `ops.compact`; requests one after another."""
    num_streams, bits = page_offsets.shape[1] - 1, _bits(pool)
    streams = torch.arange(num_streams, device=pool.device)
    for r, numbers in enumerate(rows.tolist()):
        row = RowDescriptor(*numbers)
        if not row.num_region_blocks:
            continue
        blocks = block_table[r].long()
        stream = streams.repeat_interleave(page_offsets[r].diff())
        region = blocks[row.region_column : row.region_column + row.num_region_blocks]
        target = region_page_ids(region, num_streams)[: len(stream)]
        kept = indices[r, : len(target) * entries_per_page].long().view(len(target), -1)
        for part in torch.arange(len(target), device=pool.device).split(_PAGES_AT_ONCE):
            if entries_per_page == 1:
                source = blocks[kept[part, 0]] * num_streams + stream[part]
                copy_pages(bits.flatten(1), source, target[part])
                continue
            source = blocks[kept[part] // entries_per_page] * num_streams + stream[part, None]
            _copy_tokens(bits, source, kept[part] % entries_per_page, target[part], order)


def _copy_tokens(
    bits: torch.Tensor,
    source: torch.Tensor,
    place: torch.Tensor,
    target: torch.Tensor,
    order: PageOrder | None,
) -> None:
    """Token `place[p, i]` of page `source[p, i]` becomes token i of page `target[p]`."""
    if order is None:
        bits[target] = bits[source, place]
        return
    pages = bits.flatten(1)
    key, value = gather_tokens(pages, source.flatten(), place.flatten(), order)
    pack_pages(pages, target, key, value, order)


def move_entries(
    source: torch.Tensor,
    source_index: torch.Tensor,
    target: torch.Tensor,
    target_index: torch.Tensor,
) -> None:
    """See `ops.move_entries`."""
    is_moved = (source_index >= 0) & (target_index >= 0)
    _bits(target)[target_index[is_moved]] = _bits(source)[source_index[is_moved]]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: there are numbers that torch has no copies by index of."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])
