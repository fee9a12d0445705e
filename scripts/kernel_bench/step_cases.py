"""What a decode step does: attention of all layers, and new tokens into their pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from gpu.peers import decode_peers
from gpu.shapes import ModelShape

from kernel_bench.case import Case, new_pool, normal, shuffled_table
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


def decode_case(
    shape: ModelShape, batch: int, kept: int, device: torch.device, peers: Sequence[str]
) -> Case:
    """A step of compressed requests: shares of the work once, then every layer's attention.

    Each request has `kept` tokens per KV head in its region, on average, and a tail.
    """
    b, num_layers = shape.block_size, shape.num_layers
    region = kept // b
    width = region + triton.cdiv(TAIL_TOKENS, b)
    pool = new_pool(shape, batch * width, device)
    table = shuffled_table(batch, width, device)
    offsets = torch.zeros(batch, shape.num_streams + 1, dtype=torch.int32)
    for r in range(batch):
        offsets[r, 1:] = ragged_pages(region, shape.num_streams, r).cumsum(0)
    num_tokens = int(offsets[:, -1].sum()) * b + batch * shape.num_streams * TAIL_TOKENS
    offsets = offsets.to(device)
    # Boundary 0: the row is the region, then the tail.
    rows = torch.tensor([[TAIL_TOKENS, region, 0, 0]] * batch, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    query = normal(batch, shape.num_heads, shape.head_size, device=device, dtype=shape.dtype)
    out = torch.empty_like(query)
    work = ops.new_decode_work(
        batch,
        num_layers=num_layers,
        num_kv_heads=shape.num_kv_heads,
        group=shape.group,
        head_size=shape.head_size,
        pool_dtype=shape.pool_dtype,
        device=device,
    )

    def step() -> torch.Tensor:
        ops.decode_work(
            rows, offsets, starts, num_kv_heads=shape.num_kv_heads, block_size=b, out=work
        )
        for layer in range(num_layers):
            ops.ragged_decode(
                query,
                pool,
                rows,
                offsets,
                table,
                starts,
                layer=layer,
                num_kv_heads=shape.num_kv_heads,
                scale=shape.head_size**-0.5,
                work=work,
                out=out,
            )
        return out

    num_bytes = num_tokens * shape.token_bytes
    num_bytes += num_layers * 2 * query.numel() * query.element_size()
    mean_tokens = num_tokens // (batch * shape.num_streams)
    return Case(
        "ragged_decode",
        f"batch {batch}, {kept} kept",
        step,
        num_bytes,
        num_layers,
        {} if device.type == "meta" else decode_peers(peers, shape, batch, mean_tokens, device),
        {"batch": batch, "kept_tokens": kept},
    )


def store_case(shape: ModelShape, batch: int, device: torch.device) -> Case:
    """New tokens of one step into the pages of every layer."""
    num_layers = shape.num_layers
    pool = new_pool(shape, batch, device)
    key = normal(batch, shape.num_kv_heads, shape.head_size, device=device, dtype=shape.dtype)
    slots = torch.arange(batch, dtype=torch.int64, device=device) * shape.block_size

    def step() -> None:
        for layer in range(num_layers):
            ops.store_tokens(key, key, pool, slots, layer=layer, num_layers=num_layers)

    num_bytes = num_layers * 2 * key.numel() * (key.element_size() + pool.element_size())
    return Case(
        "store_tokens", f"batch {batch}", step, num_bytes, num_layers, extra={"batch": batch}
    )
