"""New tokens and moved pages at the far end of a pool of many GiB."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gpu.real_size.decode import no_host_sync
from gpu.real_size.judge import Verdict
from gpu.real_size.rows import (
    Rows,
    block_sums,
    bytes_of,
    deal_blocks,
    draw_rows,
    fill_pool,
    tokens_at,
)
from gpu.shapes import ModelShape

from vllm_kvcompress import ops


@dataclass
class StoreCases:
    """Slots, stores and moves in one pool."""

    shape: ModelShape
    pool: torch.Tensor
    batch: int
    max_blocks: int

    def run(self) -> Iterator[tuple[str, Callable[[], Verdict]]]:
        """(name, what to run) of each case."""
        name = f"batch {self.batch}" + (", fp8" if self.pool.element_size() == 1 else "")
        yield f"new tokens stored, {name}", self.stored
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

    def stored(self) -> Verdict:
        """Every row's last token, in one layer: read back, and nothing else has changed."""
        verdict = Verdict()
        shape, pool, rows = self.shape, self.pool, self.prepare()
        device, b, layer = pool.device, shape.block_size, shape.num_layers - 1
        head = torch.arange(shape.num_kv_heads, device=device)
        row = torch.arange(self.batch, device=device)
        last = rows.num_tokens()[1] - 1
        stream = (layer * shape.num_kv_heads + head)[None].expand(self.batch, -1)
        row = row[:, None].expand_as(stream)
        page, slot = rows.places(row, stream, last[row, stream])
        # Of an ordinary size, so that fp8 holds them as normal numbers.
        generator = torch.Generator(device).manual_seed(8)
        size = (2, self.batch, shape.num_kv_heads, shape.head_size)
        new = 1 + torch.rand(size, generator=generator, device=device)
        key, value = new.to(shape.dtype)
        scales = torch.linspace(0.25, 2.0, shape.num_streams, device=device)
        old = tokens_at(pool, page, slot)
        before = block_sums(pool, shape.num_streams)
        num_tokens = self.batch + 3
        with no_host_sync(device):
            slots = ops.token_slots(
                rows.rows, rows.block_table, rows.query_start_loc, num_tokens, b
            )
            ops.store_tokens(
                key,
                value,
                pool,
                slots[: self.batch],
                layer=layer,
                num_layers=shape.num_layers,
                key_scale=scales,
                value_scale=scales.flip(0),
            )
        want = page[:, 0] // shape.num_streams * b + slot[:, 0]
        verdict.expect_equal(slots[: self.batch], want, "slots")
        verdict.expect_equal(slots[self.batch :], torch.full_like(slots[:3], -1), "spare slots")
        mine = (scales[stream], scales.flip(0)[stream])
        parts = [x.float() / s[..., None] for x, s in zip((key, value), mine, strict=True)]
        verdict.expect_equal(
            tokens_at(pool, page, slot), torch.cat(parts, dim=2).to(pool.dtype), "tokens"
        )
        bytes_of(pool)[page, slot] = bytes_of(old)
        same = bool(torch.equal(block_sums(pool, shape.num_streams), before))
        verdict.expect(same, "something else was written")
        verdict.facts["highest_element"] = (int(page.max()) + 1) * pool[0].numel() - 1
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
