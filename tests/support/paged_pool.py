"""Random paged pools for kernel tests: shuffled blocks, ragged heads, NaN where nobody may look."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from device_labels import LABELLED

from vllm_kvcompress import ops
from vllm_kvcompress.memory import cdiv
from vllm_kvcompress.memory.row_layout import CompactionPoint, RowLayout
from vllm_kvcompress.ops import RowDescriptor
from vllm_kvcompress.ops.rows_reference import stream_tokens

# The GPU if there is one; else kernels run in Triton's interpreter, on memory with a label.
DEVICE = torch.device("cuda") if torch.cuda.is_available() else LABELLED


@dataclass(frozen=True)
class Request:
    """One row: dense, or with a region whose streams own `pages` pages each.

    Attributes:
        older_points: compactions before the one that made the region.
    """

    seq_len: int
    query_len: int = 1
    num_region_blocks: int = 0
    boundary_block: int = 0
    first_kept_block: int = 0
    pages: tuple[int, ...] = ()
    older_points: tuple[CompactionPoint, ...] = ()

    @property
    def layout(self) -> RowLayout:
        if not self.num_region_blocks:
            return RowLayout()
        newest = CompactionPoint(self.boundary_block, self.num_region_blocks, self.first_kept_block)
        return RowLayout((*self.older_points, newest))

    @property
    def descriptor(self) -> RowDescriptor:
        return self.layout.descriptor(self.seq_len)

    def num_row_blocks(self, block_size: int) -> int:
        return cdiv(self.seq_len, block_size) + self.layout.num_region_blocks


# What engines run in on a GPU, for which float32 kernels take long to compile.
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Shape:
    """Of a pool and of what is asked of it."""

    num_layers: int = 2
    num_kv_heads: int = 2
    group: int = 4
    head_size: int = 64
    block_size: int = 16
    dtype: torch.dtype = DTYPE
    pool_dtype: torch.dtype | None = None

    @property
    def num_streams(self) -> int:
        return self.num_layers * self.num_kv_heads

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group


def compressed(
    shape: Shape,
    prompt_len: int,
    num_region_blocks: int,
    seq_len: int,
    *,
    query_len: int = 1,
    window: int = 8,
    pages: Sequence[int] | None = None,
    seed: int = 0,
) -> Request:
    """A request whose prompt was compacted; page counts per stream random unless given."""
    if pages is None:
        total = num_region_blocks * shape.num_streams
        cuts = sorted(random.Random(seed).choices(range(total + 1), k=shape.num_streams - 1))
        pages = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    assert sum(pages) == num_region_blocks * shape.num_streams
    return Request(
        seq_len=seq_len,
        query_len=query_len,
        num_region_blocks=num_region_blocks,
        boundary_block=prompt_len // shape.block_size,
        first_kept_block=(prompt_len - window) // shape.block_size,
        pages=tuple(pages),
    )


@dataclass
class PagedBatch:
    """A pool with a batch of requests in it, as the ops take them."""

    shape: Shape
    requests: list[Request]
    pool: torch.Tensor
    rows: torch.Tensor
    page_offsets: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    query: torch.Tensor

    def paged(self, pages: torch.Tensor | None = None, **options) -> ops.Pool:
        """The pool, or other pages of its shape."""
        pages = self.pool if pages is None else pages
        return ops.Pool(pages, self.shape.num_layers, self.shape.num_kv_heads, **options)

    @property
    def op_rows(self) -> ops.Rows:
        return ops.Rows(self.rows, self.block_table, self.page_offsets, self.query_start_loc)

    def prompts(self, rated: Sequence[int], candidates: Sequence[int] | None = None) -> ops.Prompts:
        """Its rows as prompts of which so many tokens are rated, and compete."""
        candidates = rated if candidates is None else candidates
        numbers = torch.tensor(
            [[*rated], [*candidates]], dtype=torch.int32, device=self.rows.device
        )
        return ops.Prompts(self.op_rows, *numbers, max(rated), max(candidates))

    def stream_entries(self, request: int, stream: int) -> tuple[torch.Tensor, int]:
        """[n, 2 d] keys and values of one stream in order, and how many are the region's."""
        places, num_region_tokens = stream_tokens(
            RowDescriptor(*self.rows[request].tolist()),
            self.page_offsets[request].tolist(),
            self.block_table[request].tolist(),
            stream,
            self.shape.num_streams,
            self.shape.block_size,
        )
        pages, slots = (torch.tensor(x, device=self.pool.device) for x in zip(*places, strict=True))
        return self.pool[pages, slots], num_region_tokens


def random_like(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Normal numbers on the generator's device."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    return values.to(dtype)


def nan_pool(shape: Shape, num_blocks: int, device: torch.device | str) -> torch.Tensor:
    """[num_blocks * S, b, 2 d], every element NaN."""
    size = (num_blocks * shape.num_streams, shape.block_size, 2 * shape.head_size)
    pool = torch.full(size, float("nan"), device=device)
    return pool.to(shape.pool_dtype or shape.dtype)


def make_batch(
    shape: Shape, requests: Sequence[Request], device: torch.device | str, seed: int = 0
) -> PagedBatch:
    """Requests in a pool with shuffled blocks.

    Only what a request's streams hold is numbers; evicted blocks point at a block of NaN, and so
    do the rest of every last page and the columns past a row's end.
    """
    rng = random.Random(seed)
    generator = torch.Generator(device).manual_seed(seed)
    requests = list(requests)
    num_streams, block_size = shape.num_streams, shape.block_size
    widths = [request.num_row_blocks(block_size) for request in requests]
    num_blocks = sum(widths) + 2
    ids = list(range(1, num_blocks))
    rng.shuffle(ids)
    table = torch.zeros(len(requests), max(widths) + 1, dtype=torch.int32)
    for r, (request, width) in enumerate(zip(requests, widths, strict=True)):
        table[r, :width] = torch.tensor([ids.pop() for _ in range(width)])
        if request.num_region_blocks:
            table[r, : request.layout.column_of(request.first_kept_block)] = 0
    offsets = torch.zeros(len(requests), num_streams + 1, dtype=torch.int32)
    for r, request in enumerate(requests):
        if request.pages:
            offsets[r, 1:] = torch.tensor(request.pages).cumsum(0)
        else:
            offsets[r] = -(10**6)
    starts = torch.tensor([0, *(request.query_len for request in requests)]).cumsum(0)
    num_tokens = int(starts[-1])
    batch = PagedBatch(
        shape=shape,
        requests=requests,
        pool=nan_pool(shape, num_blocks, device),
        rows=torch.tensor([x.descriptor for x in requests], dtype=torch.int32, device=device),
        page_offsets=offsets.to(device),
        block_table=table.to(device),
        query_start_loc=starts.to(device, torch.int32),
        query=random_like((num_tokens, shape.num_heads, shape.head_size), shape.dtype, generator),
    )
    for r in range(len(requests)):
        for stream in range(num_streams):
            places, _ = stream_tokens(
                requests[r].descriptor,
                offsets[r].tolist(),
                table[r].tolist(),
                stream,
                num_streams,
                block_size,
            )
            if not places:
                continue
            pages, slots = (torch.tensor(x, device=device) for x in zip(*places, strict=True))
            entries = random_like((len(places), 2 * shape.head_size), torch.float32, generator)
            batch.pool[pages, slots] = entries.to(batch.pool.dtype)
    return batch
