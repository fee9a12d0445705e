"""Compressed and dense rows of a decode step, and the pool of many GiB that they lie in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gpu.shapes import ModelShape

from vllm_kvcompress import ops
from vllm_kvcompress.ops import ROW_FIELDS, RowDescriptor

# Tokens of a prompt that are never evicted, and how much longer it was than its region.
WINDOW, TIMES_AS_LONG = 16, 8
# Every so many rows one is dense.
DENSE_EVERY = 4
# vLLM's null block, of NaN here: what evicted blocks and unused columns of a table point at.
NULL_BLOCK = 0


@dataclass
class Rows:
    """Descriptors of R rows on one device, as `ops.ragged_decode` takes them.

    Attributes:
        rows: [R, 4] int32.
        page_offsets: [R, S + 1] int32; garbage for dense rows.
        block_table: [R, W] int32.
        query_start_loc: [R + 1] int32; the last rows have no query.
        num_active: rows that have one.
        block_size: tokens per page.
    """

    rows: torch.Tensor
    page_offsets: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    num_active: int
    block_size: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What `ops.ragged_decode` is given, in its order."""
        return self.rows, self.page_offsets, self.block_table, self.query_start_loc

    @property
    def num_streams(self) -> int:
        """S, layers times KV heads."""
        return self.page_offsets.shape[1] - 1

    def to(self, device: torch.device) -> Rows:
        """The same elsewhere."""
        moved = (tensor.to(device) for tensor in self.tensors)
        return Rows(*moved, self.num_active, self.block_size)

    def clone(self) -> Rows:
        """The same at other addresses."""
        copied = (tensor.clone() for tensor in self.tensors)
        return Rows(*copied, self.num_active, self.block_size)

    def copy_from(self, other: Rows) -> None:
        """Take another step's descriptors, at the same addresses."""
        for mine, its in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(its)
        self.num_active = other.num_active

    @property
    def op_rows(self) -> ops.Rows:
        """As the ops take them."""
        return ops.Rows(self.rows, self.block_table, self.page_offsets, self.query_start_loc)

    def num_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, S] int64 tokens of every stream: those of the region, and all of them."""
        row = RowDescriptor(*self.rows.long().T[..., None])
        pages = self.page_offsets.long().diff(dim=1)
        region = torch.where(row.num_region_blocks > 0, pages * self.block_size, 0)
        return region, region + row.seq_len - row.first_kept_block * self.block_size

    def places(
        self, row: torch.Tensor, stream: torch.Tensor, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and slot of tokens, given by row, stream and place in the stream (int64, alike)."""
        b, num_streams = self.block_size, self.num_streams
        its = RowDescriptor(*self.rows.long()[row].unbind(-1))
        first_page = self.page_offsets[row, stream].long()
        pages = self.page_offsets[row, stream + 1].long() - first_page
        num_region_tokens = torch.where(its.num_region_blocks > 0, pages * b, 0)
        in_region = index < num_region_tokens
        virtual = torch.where(in_region, first_page + index // b, 0)
        block = its.first_kept_block + (index - num_region_tokens).clamp(min=0) // b
        before = block + its.region_column - its.boundary_block
        column = torch.where(
            in_region,
            its.region_column + virtual // num_streams,
            before + torch.where(block >= its.boundary_block, its.num_region_blocks, 0),
        )
        slot_of_block = torch.where(in_region, virtual % num_streams, stream)
        page = self.block_table[row, column].long() * num_streams + slot_of_block
        return page, index % b


def ragged_pages(num_region_blocks: int, num_streams: int, generator: torch.Generator):
    """[S] int64 page counts that sum to the region's; uneven, and some of them 0."""
    total = num_region_blocks * num_streams
    weights = torch.randn(num_streams, generator=generator).mul(1.5).exp()
    pages = (weights / weights.sum() * total).long()
    pages[torch.argmax(pages)] += total - int(pages.sum())
    return pages


def _between(low: int, high: int, generator: torch.Generator) -> int:
    return low + int(torch.randint(max(1, high - low + 1), (), generator=generator))


def draw_rows(
    num_rows: int,
    num_idle: int,
    shape: ModelShape,
    blocks: torch.Tensor,
    table_width: int,
    generator: torch.Generator,
) -> Rows:
    """Rows of different lengths that own the given blocks, on the CPU.

    Args:
        num_rows: R.
        num_idle: rows at the end that have no query, as a captured graph's spare rows.
        shape: of the model.
        blocks: [n] ids that may be used; the first is in the first row's region.
        table_width: columns of the block table.
        generator: for lengths and page counts.
    """
    b, num_streams = shape.block_size, shape.num_streams
    num_active = num_rows - num_idle
    share = len(blocks) // num_active
    ids = iter(blocks.split(share))
    rows = torch.zeros(num_rows, len(ROW_FIELDS), dtype=torch.int32)
    offsets = torch.full((num_rows, num_streams + 1), -(10**6), dtype=torch.int32)
    table = torch.full((num_rows, table_width), NULL_BLOCK, dtype=torch.int32)
    for r in range(num_active):
        own = next(ids)
        tail_blocks = _between(2, max(2, share // 8), generator)
        if r % DENSE_EVERY == DENSE_EVERY - 1:
            seq_len = _between(1, (share - 1) * b, generator)
            rows[r] = torch.tensor(RowDescriptor(seq_len))
            num_blocks = -(-seq_len // b)
            table[r, :num_blocks] = own[:num_blocks]
            continue
        region = _between(max(1, (share - tail_blocks) // 3), share - tail_blocks - 1, generator)
        prompt_len = region * b * TIMES_AS_LONG + _between(0, b - 1, generator)
        boundary, first_kept = prompt_len // b, (prompt_len - WINDOW) // b
        last_block = first_kept + tail_blocks - 1
        seq_len = max(prompt_len + 1, last_block * b + _between(1, b, generator))
        rows[r] = torch.tensor(RowDescriptor(seq_len, region, boundary, boundary, first_kept))
        offsets[r, 0] = 0
        offsets[r, 1:] = ragged_pages(region, num_streams, generator).cumsum(0)
        table[r, boundary : boundary + region] = own[:region]
        tail = torch.arange(first_kept, -(-seq_len // b))
        columns = tail + torch.where(tail >= boundary, region, 0)
        table[r, columns] = own[region : region + len(tail)].int()
    starts = torch.arange(num_rows + 1, dtype=torch.int32).clamp(max=num_active)
    return Rows(rows, offsets, table, starts, num_active, b)


def deal_blocks(
    num_blocks: int, num_hands: int, fraction: float, generator: torch.Generator
) -> list[torch.Tensor]:
    """Disjoint random hands of block ids; the pool's last blocks come first in each.

    Args:
        num_blocks: of the pool; the null block is nobody's.
        num_hands: how many to deal.
        fraction: of the pool that is dealt.
        generator: for the order.
    """
    ids = 1 + torch.randperm(num_blocks - 1, generator=generator)
    size = int(num_blocks * fraction) // num_hands
    for hand in range(num_hands):
        place = int((ids == num_blocks - 1 - hand).nonzero())
        ids[[hand * size, place]] = ids[[place, hand * size]]
    return [ids[hand * size : (hand + 1) * size] for hand in range(num_hands)]


def bytes_of(pool: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes, which every op takes; not every one takes fp8."""
    return pool.view(torch.uint8)


def tokens_at(pool: torch.Tensor, page: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """[..., 2 d] copies of the tokens at these places."""
    return bytes_of(pool)[page, slot].view(pool.dtype)


def fill_nan(pool: torch.Tensor) -> None:
    """Every element NaN, in any type."""
    if pool.dtype == torch.float8_e4m3fn:
        bytes_of(pool).fill_(0x7F)
    else:
        pool.fill_(float("nan"))


def block_of(pool: torch.Tensor, block: int, num_streams: int) -> torch.Tensor:
    """[S, b, 2 d] view of one block's pages."""
    return pool[block * num_streams : (block + 1) * num_streams]


def _last_blocks(step: Rows) -> Iterator[tuple[int, int]]:
    """(block id, used tokens) of every active row's last block, if it is not full."""
    for row, table in zip(step.rows.tolist(), step.block_table, strict=True):
        its = RowDescriptor(*row)
        column = its.column_of((its.seq_len - 1) // step.block_size)
        if its.seq_len % step.block_size:
            yield int(table[column]), its.seq_len % step.block_size


def fill_pool(pool: torch.Tensor, steps: list[Rows], seed: int) -> int:
    """Normal numbers where a row may read, NaN everywhere else.

    Args:
        pool: [pages, b, 2 d], written.
        steps: rows on the CPU that the pool must hold.
        seed: of the numbers.

    Returns:
        Blocks that are NaN throughout.
    """
    num_streams = steps[0].num_streams
    generator = torch.Generator(pool.device).manual_seed(seed)
    used = torch.cat([step.block_table.flatten().unique() for step in steps])
    is_used = torch.zeros(pool.shape[0] // num_streams, dtype=torch.bool)
    is_used[used.long()] = True
    is_used[NULL_BLOCK] = False
    for block, is_read in enumerate(is_used.tolist()):
        pages = block_of(pool, block, num_streams)
        if not is_read:
            fill_nan(pages)
        elif pool.element_size() == 1:
            values = torch.randn(pages.shape, generator=generator, device=pool.device)
            pages.copy_(values)
        else:
            pages.normal_(generator=generator)
    for step in steps:
        for block, num_tokens in _last_blocks(step):
            fill_nan(block_of(pool, block, num_streams)[:, num_tokens:])
    return int((~is_used).sum())


def block_sums(pool: torch.Tensor, num_streams: int) -> torch.Tensor:
    """[blocks] int64 sums of every block's bits: what changes when anybody writes."""
    words = pool.view(-1).view(torch.int64).view(pool.shape[0] // num_streams, -1)
    # In parts, for the memory that a sum over everything at once might take.
    return torch.cat([part.sum(dim=1) for part in words.split(1024)])
