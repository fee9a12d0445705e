"""What a decode step does: attention of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from gpu.peers import decode_peers
from gpu.shapes import ModelShape

from timing.case import Case, new_pool, normal, shuffled_table
from vllm_kvcompress import ops

TAIL_TOKENS = 100


def ragged_pages(mean_pages: int, num_streams: int, seed: int) -> torch.Tensor:
    """[num_streams] int64 pages of every stream, uneven as joint budgets are; mean as asked."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(num_streams, generator=generator).exp()
    total = mean_pages * num_streams
    pages = (weights / weights.sum() * (total - num_streams)).long() + 1
    pages[: total - int(pages.sum())] += 1
    return pages


@dataclass(frozen=True)
class DecodeStep:
    """A step of compressed requests of one token each, in all layers.

    Attributes:
        shape: of the model.
        query: [batch, Hq, d], the same in every layer.
        pool, rows, offsets, table, starts: as `ops.ragged_decode` takes them.
        num_tokens: kept and tail tokens of all streams together.
    """

    shape: ModelShape
    query: torch.Tensor
    pool: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor
    table: torch.Tensor
    starts: torch.Tensor
    num_tokens: int

    def new_work(self, num_programs: int | None = None) -> ops.DecodeWork:
        """Room for its work."""
        shape = self.shape
        return ops.new_decode_work(
            len(self.rows),
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            group=shape.group,
            head_size=shape.head_size,
            pool_dtype=shape.pool_dtype,
            device=self.pool.device,
            num_programs=num_programs,
        )

    def run(self, work: ops.DecodeWork, out: torch.Tensor) -> torch.Tensor:
        """Share out the work, then attend in every layer."""
        shape = self.shape
        rows = ops.Rows(self.rows, self.table, self.offsets, self.starts)
        ops.decode_work(
            rows,
            num_kv_heads=shape.num_kv_heads,
            block_size=shape.block_size,
            out=work,
        )
        for layer in range(shape.num_layers):
            ops.ragged_decode(
                self.query,
                ops.Pool(self.pool, shape.num_layers, shape.num_kv_heads),
                rows,
                layer,
                ops.Logits(shape.head_size**-0.5),
                work=work,
                out=out,
            )
        return out


def decode_step(shape: ModelShape, batch: int, kept: int, device: torch.device) -> DecodeStep:
    """Each request has `kept` tokens per KV head in its region, on average, and a tail."""
    b = shape.block_size
    region = kept // b
    width = region + triton.cdiv(TAIL_TOKENS, b)
    offsets = torch.zeros(batch, shape.num_streams + 1, dtype=torch.int32)
    for r in range(batch):
        offsets[r, 1:] = ragged_pages(region, shape.num_streams, r).cumsum(0)
    num_tokens = int(offsets[:, -1].sum()) * b + batch * shape.num_streams * TAIL_TOKENS
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    return DecodeStep(
        shape,
        normal(batch, shape.num_heads, shape.head_size, device=device, dtype=shape.dtype),
        new_pool(shape, batch * width, device),
        # Boundary 0: the row is the region, then the tail.
        torch.tensor([ops.RowDescriptor(TAIL_TOKENS, region)] * batch, **ints),
        offsets.to(device),
        shuffled_table(batch, width, device),
        torch.arange(batch + 1, **ints),
        num_tokens,
    )


def decode_case(
    shape: ModelShape, batch: int, kept: int, device: torch.device, peers: Sequence[str]
) -> Case:
    """A step of compressed requests: shares of the work once, then every layer's attention."""
    step = decode_step(shape, batch, kept, device)
    work, out = step.new_work(), torch.empty_like(step.query)
    num_bytes = step.num_tokens * shape.token_bytes
    num_bytes += shape.num_layers * 2 * out.numel() * out.element_size()
    mean_tokens = step.num_tokens // (batch * shape.num_streams)
    return Case(
        "ragged_decode",
        f"batch {batch}, {kept} kept",
        lambda: step.run(work, out),
        num_bytes,
        shape.num_layers,
        later={}
        if device.type == "meta"
        else decode_peers(peers, shape, batch, mean_tokens, device),
        extra={"batch": batch, "kept_tokens": kept},
    )
