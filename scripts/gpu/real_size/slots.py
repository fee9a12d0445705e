"""Slots of new tokens and moved pages at the far end of a pool of many GiB."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gpu.real_size.decode import no_host_sync
from gpu.real_size.judge import Verdict
from gpu.real_size.rows import (
    Rows,
    deal_blocks,
    draw_rows,
    fill_pool,
)
from gpu.shapes import ModelShape

from vllm_kvcompress import ops


@dataclass
class SlotCases:
    """Slots and moves in one pool."""

    shape: ModelShape
    pool: torch.Tensor
    batch: int
    max_blocks: int

    def run(self) -> Iterator[tuple[str, Callable[[], Verdict]]]:
        """(name, what to run) of each case."""
        name = f"batch {self.batch}" + (", fp8" if self.pool.element_size() == 1 else "")
        yield f"slots of new tokens, {name}", self.slots
        yield f"pages moved, {name}", self.moved

    def prepare(self) -> Rows:
        """Rows that own some of the pool, its last block among it."""
        generator = torch.Generator().manual_seed(7)
        num_blocks = self.pool.shape[0] // self.shape.num_streams
        (hand,) = deal_blocks(num_blocks, 1, 0.5, generator)
        hand = hand[: self.max_blocks * self.batch]
        width = 10 * len(hand) // self.batch
        rows = draw_rows(self.batch, 0, self.shape, hand, width, generator)
        fill_pool(self.pool, [rows], seed=7)
        return rows.to(self.pool.device)

    def slots(self) -> Verdict:
        """Every row's last token is where attention reads it."""
        verdict = Verdict()
        shape, rows, device = self.shape, self.prepare(), self.pool.device
        b, num_streams, num_tokens = shape.block_size, shape.num_streams, self.batch + 3
        row = torch.arange(self.batch, device=device)
        stream = torch.full_like(row, num_streams - 1)
        page, slot = rows.places(row, stream, rows.num_tokens()[1][row, stream] - 1)
        with no_host_sync(device):
            slots = ops.token_slots(rows.op_rows, num_tokens, b)
        want = page // num_streams * b + slot
        verdict.expect_equal(slots[: self.batch], want, "slots")
        verdict.expect_equal(slots[self.batch :], torch.full_like(slots[:3], -1), "spare slots")
        verdict.facts["highest_slot"] = int(slots.max())
        return verdict

    def moved(self) -> Verdict:
        """Pages from everywhere to the pool's last pages, some of them left out."""
        verdict = Verdict()
        pool, num_pages = self.pool, self.pool.shape[0]
        num_moves = min(4096, num_pages // 4)
        generator = torch.Generator().manual_seed(9)
        source = torch.randperm(num_pages - num_moves, generator=generator)[:num_moves]
        target = num_pages - 1 - torch.randperm(num_moves, generator=generator)
        source[::7], target[::11] = -1, -1
        is_moved = (source >= 0) & (target >= 0)
        source, target, is_moved = (x.to(pool.device) for x in (source, target, is_moved))
        entries = pool.flatten(1)
        bits = entries.view(torch.uint8)
        want = bits[-num_moves:].clone()
        place = target[is_moved] - (num_pages - num_moves)
        want[place] = bits[source[is_moved]]
        with no_host_sync(pool.device):
            ops.move_entries(entries, source, entries, target)
        verdict.expect_equal(bits[-num_moves:], want, "moved pages")
        verdict.facts |= {"moves": int(is_moved.sum()), "highest_element": pool.numel() - 1}
        return verdict
