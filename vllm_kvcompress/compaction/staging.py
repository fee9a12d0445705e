"""Prompts of one step that have no blocks for what they evict (one-shot prefill).

Their keys and values lie in a buffer outside the pool, one area per layer. Where a layer's budget
does not depend on the others', what it keeps moves to the regions before the next layer starts,
and one area serves all layers. Where all layers compete, areas stay until the buffer is full; then
what cannot be kept any more is dropped, and the areas are used again. How much that leaves is known
beforehand, so the host waits for nothing.

On a GPU the buffer is there from the start, and its memory counted. On a CPU each step makes one,
as large as its prompts need.

An entry is what is chosen: a page, or a token. R is the number of prompts, L of layers, H of KV
heads, S = L * H of streams, N of a stream's entries, b of tokens per page.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.prompts import LayerPages
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import CacheShape, RequestGeometry, cdiv
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.ops.transfers import to_device
from vllm_kvcompress.policies.entries import entries_per_page


def flat_places(
    page_offsets: torch.Tensor, indices: torch.Tensor, width: int, entries_per_page: int = 1
) -> torch.Tensor:
    """Chosen entries as places in [streams * width], of `ops.select_entries`' result.

    Args:
        page_offsets: [R, streams + 1] int32.
        indices: [R, M] int32.
        width: N, entries of a stream.
        entries_per_page: 1, or b where entries are tokens.

    Returns:
        [R, M] int64; streams * width for what is past a request's last entry.
    """
    num_prompts, num_streams = page_offsets.shape[0], page_offsets.shape[1] - 1
    ends = (page_offsets[:, 1:] * entries_per_page).contiguous()
    order = torch.arange(indices.shape[1], dtype=torch.int32, device=indices.device)
    streams = torch.searchsorted(ends, order.expand(num_prompts, -1).contiguous(), right=True)
    # What is past the last entry may be any number.
    past = num_streams * width
    return torch.where(streams < num_streams, streams * width + indices, past)


class Staging:
    """One step's one-shot prompts in the buffer. Layers come in order.

    Args:
        config: validated setting.
        shape: of the paged cache.
        buffer: [pages, b, 2 d], on the pool's device, zeros at first; None = made here.
        pool: [num_pages, b, 2 d], written at the regions' pages only.
        order: element order of pages; None = plain.
        geometries: of the prompts.
        block_table: [R, W] int32, their rows, `[evicted][region blocks][later blocks]`.
        guaranteed: per prompt, entries that each stream is assured of where all layers compete.
        move_backend: of the op that moves.
        select_backend: of the ops that select.

    Raises:
        RuntimeError: if the prompts do not fit the buffer.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        shape: CacheShape,
        buffer: torch.Tensor | None,
        pool: torch.Tensor,
        order: PageOrder | None,
        geometries: Sequence[RequestGeometry],
        block_table: torch.Tensor,
        guaranteed: Sequence[int],
        move_backend: str,
        select_backend: str,
    ) -> None:
        self.is_joint = config.layers_compete
        self._is_fresh = buffer is None
        if buffer is None:
            num_pages = config.one_shot.buffer_pages(shape, geometries)
            buffer = pool.new_empty(num_pages, *pool.shape[1:])
        self._shape, self._buffer, self._pool, self._order = shape, buffer, pool, order
        self._move_backend, self._select_backend = move_backend, select_backend
        self._geometries, self._guaranteed = geometries, guaranteed
        self._per_page = entries_per_page(config, shape.block_size)
        self._num_blocks = [cdiv(g.compact_len, shape.block_size) for g in geometries]
        ends = np.cumsum(self._num_blocks)
        self._block_starts = ends - self._num_blocks
        self._area_pages = int(ends[-1]) * shape.num_kv_heads
        self._num_lists = config.num_scores
        self._most_held = [
            config.one_shot.most_held_pages(shape, g.num_region_blocks) if self.is_joint else 0
            for g in geometries
        ]
        self._plan_areas()
        device = buffer.device
        table = np.zeros((len(geometries), max(self._num_blocks)), np.int32)
        for row, start, count in zip(table, self._block_starts, self._num_blocks, strict=True):
            row[:count] = np.arange(start, start + count)
        self.block_table = to_device(table, device)
        self._targets = self._region_entries(block_table)
        self._width = max(g.first_kept_block for g in geometries) * self._per_page
        self._own_entries = self._entries_of_an_area()
        # Where each entry is now, in the buffer; -1 = nowhere. The last column stays so.
        streams = shape.pages_per_block if self.is_joint else shape.num_kv_heads
        size = (len(geometries), streams * self._width + 1)
        self._where = torch.full(size, -1, dtype=torch.int64, device=device)

    def _plan_areas(self) -> None:
        """Decide where areas lie: before what is held, which two places take in turn."""
        shape, size, area = self._shape, self._buffer.shape[0], self._area_pages
        self._area, self._next_area = 0, 0
        held = sum(self._most_held)
        self._held_places = [size - held, size - 2 * held]
        fits_whole = self.is_joint and shape.num_layers * area <= size
        self._areas_end = size if fits_whole else size - held
        if area + 2 * held > size and not fits_whole:
            raise RuntimeError(
                f"one-shot prompts of {area} pages a layer, which hold {held}, do not fit a buffer "
                f"of {size} pages"
            )

    def _region_entries(self, block_table: torch.Tensor) -> torch.Tensor:
        """[R, most entries] int64, each region's entries in the pool, in order."""
        device, block_entries = block_table.device, self._shape.pages_per_block * self._per_page
        most = max(g.num_region_blocks for g in self._geometries)
        boundary = to_device(np.array([[g.boundary_block] for g in self._geometries]), device)
        # Where a region is shorter, columns behind it, which nothing is moved to.
        columns = boundary + torch.arange(most, device=device)
        blocks = block_table.gather(1, columns.clamp(max=block_table.shape[1] - 1)).long()
        entries = blocks[..., None] * block_entries + torch.arange(block_entries, device=device)
        return entries.flatten(1)

    def _entries_of_an_area(self) -> torch.Tensor:
        """[R, H * N] int64, where an area at the buffer's start has them."""
        num_heads, device = self._shape.num_kv_heads, self._buffer.device
        entry = torch.arange(self._width, device=device)
        head = torch.arange(num_heads, device=device)[:, None]
        starts = to_device(self._block_starts, device)[:, None, None]
        page = (starts + entry // self._per_page) * num_heads + head
        return (page * self._per_page + entry % self._per_page).flatten(1)

    def begin_layer(
        self,
        layer: int,
        first: torch.Tensor,
        second: torch.Tensor | None,
        num_entries: torch.Tensor,
    ) -> torch.Tensor:
        """Make room for a layer's keys and values.

        Args:
            layer: 0-based index; all before it are scored and, unless all layers compete, moved.
            first, second: [R, S, N] float32 scores.
            num_entries: [R] int32, entries that compete.

        Returns:
            [blocks, H, b, 2 d] to be written, `block_table` saying whose they are.
        """
        if self.is_joint:
            if self._next_area + self._area_pages > self._areas_end:
                self._narrow(layer, first, second, num_entries)
            self._area, self._next_area = self._next_area, self._next_area + self._area_pages
        if self._is_fresh:
            # Attention multiplies what is behind a prompt's end by zero, so it must be finite.
            ends = self._block_starts + self._num_blocks
            self.area().unflatten(0, (-1, self._shape.num_kv_heads))[ends - 1] = 0
        own = self._own_entries + self._area * self._per_page
        column = layer * own.shape[1] if self.is_joint else 0
        self._where[:, column : column + own.shape[1]] = own
        return self.area().unflatten(0, (-1, self._shape.num_kv_heads))

    def slots(self, prompts: slice) -> torch.Tensor:
        """[t] int64 slots in an area of all tokens of some prompts, one after another."""
        block_size = self._shape.block_size
        runs = [
            np.arange(g.compact_len, dtype=np.int64) + start * block_size
            for g, start in zip(self._geometries[prompts], self._block_starts[prompts], strict=True)
        ]
        return to_device(np.concatenate(runs), self._buffer.device)

    def area(self) -> torch.Tensor:
        """[blocks * H, b, 2 d] of the current layer."""
        return self._buffer[self._area : self._area + self._area_pages]

    def pages(self, prompt: int) -> LayerPages:
        """The current layer of one of the prompts."""
        blocks = self.block_table[prompt, : self._num_blocks[prompt]].long()
        return LayerPages(
            self._buffer.flatten(1), blocks, self._shape.num_kv_heads, first=self._area
        )

    def _narrow(
        self,
        num_known: int,
        first: torch.Tensor,
        second: torch.Tensor | None,
        num_entries: torch.Tensor,
    ) -> None:
        """Keep of the first layers what may still win.

        The other layers are still unknown. More competitors can only raise the score that it takes
        to be kept, and rounding to whole pages adds less than one page.
        """
        num_streams = num_known * self._shape.num_kv_heads
        device, per_page = first.device, self._per_page
        totals = [self._most_entries(i, num_known) for i in range(len(self._geometries))]
        limits = to_device(np.array([totals, self._guaranteed], np.int32), device)
        known = first[:, :num_streams].contiguous()
        counts = ops.joint_page_counts(
            known,
            num_entries,
            limits[0, :, None].contiguous(),
            limits[1, :, None].contiguous(),
            backend=self._select_backend,
        )
        most_pages = max(totals)
        if per_page > 1:
            counts = (counts // per_page + 1).minimum(num_entries[:, None] // per_page)
            most_pages = most_pages // per_page + num_streams
        where = torch.full_like(self._where, -1)
        base = np.cumsum([0, *self._most_held])[:-1] + self._held_places[0]
        for scores in (known, second):
            if scores is None:
                continue
            offsets, indices = ops.select_entries(
                scores[:, :num_streams].contiguous(),
                num_entries,
                counts,
                most_pages,
                per_page,
                backend=self._select_backend,
            )
            places = flat_places(offsets, indices, self._width, per_page)
            is_chosen = places < num_streams * self._width
            places = torch.where(is_chosen, places, self._where.shape[1] - 1)
            target = to_device(base * per_page, device)[:, None]
            target = target + torch.arange(places.shape[1], device=device)
            target = torch.where(is_chosen, target, -1)
            self._move(self._where.gather(1, places), self._buffer, target)
            where.scatter_(1, places, target)
            base = base + np.array(self._most_held) // self._num_lists
        self._where = where
        self._held_places.reverse()
        self._next_area, self._areas_end = 0, min(self._held_places)

    def _most_entries(self, prompt: int, num_known: int) -> int:
        """Entries that the first layers of a prompt can have at most in the end."""
        shape, geometry = self._shape, self._geometries[prompt]
        num_unknown = (shape.num_layers - num_known) * shape.num_kv_heads
        total = geometry.num_region_blocks * shape.pages_per_block * self._per_page
        total -= num_unknown * self._guaranteed[prompt]
        num_entries = geometry.first_kept_block * self._per_page
        return min(total, num_known * shape.num_kv_heads * num_entries)

    def write(
        self, page_offsets: torch.Tensor, indices: torch.Tensor, first_pages: torch.Tensor
    ) -> None:
        """Move what was chosen into the regions.

        Args:
            page_offsets, indices: of `ops.select_entries`, over all streams where all layers
                compete, else over the current layer's.
            first_pages: [R, 1] int64, the region's first page to be written.

        Raises:
            RuntimeError: on a CPU, if something chosen was dropped, which would be a defect here.
        """
        places = flat_places(page_offsets, indices, self._width, self._per_page)
        order = torch.arange(places.shape[1], device=places.device)
        order = (first_pages * self._per_page + order).clamp(max=self._targets.shape[1] - 1)
        source = self._where.gather(1, places)
        # Elsewhere the host would wait for it.
        if self._is_fresh and bool(((source < 0) & (places < self._where.shape[1] - 1)).any()):
            raise RuntimeError("an entry was dropped that is among the kept")
        self._move(source, self._pool, self._targets.gather(1, order))

    def _move(self, source: torch.Tensor, pages: torch.Tensor, target: torch.Tensor) -> None:
        """Copy entries of the buffer to entries of `pages`; negative numbers stand for none."""
        source, target = source.flatten(), target.flatten()
        if self._per_page > 1 and self._order is not None:
            is_moved = (source >= 0) & (target >= 0)
            self._move_tokens(source[is_moved], pages, target[is_moved], self._order)
            return
        as_entries = (-1, self._shape.page.num_elements // self._per_page)
        ops.move_entries(
            self._buffer.view(as_entries),
            source,
            pages.view(as_entries),
            target,
            backend=self._move_backend,
        )

    def _move_tokens(
        self, source: torch.Tensor, pages: torch.Tensor, target: torch.Tensor, order: PageOrder
    ) -> None:
        """Copy tokens of pages whose elements are in another order than token after token."""
        places, per_page = target % self._per_page, self._per_page
        key, value = ops.gather_tokens(
            self._buffer.flatten(1), source // per_page, source % per_page, order
        )
        target_pages = (target // per_page)[:, None]
        pages.flatten(1)[target_pages, order.key_offsets[places]] = key
        pages.flatten(1)[target_pages, order.value_offsets[places]] = value
