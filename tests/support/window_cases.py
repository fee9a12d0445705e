"""Prompts, queries and plans for tests of the ops that score."""

from __future__ import annotations

import dataclasses

import torch
from paged_pool import DEVICE, PagedBatch, Request, Shape, make_batch, random_like

from vllm_kvcompress import ops
from vllm_kvcompress.ops.rows_reference import prompt_entries


def prompts(shape: Shape, lens: tuple[int, ...]) -> PagedBatch:
    """Dense prompts; every other one has region blocks in its row already."""
    requests = []
    for i, length in enumerate(lens):
        boundary = length // shape.block_size
        region = {"num_region_blocks": 2, "boundary_block": boundary} if i % 2 else {}
        requests.append(Request(length, **region))
    return make_batch(shape, requests, DEVICE, seed=len(lens))


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def window_query(shape: Shape, num_requests: int, window: int, sharpness: float = 2.0):
    generator = torch.Generator(DEVICE).manual_seed(9)
    size = (num_requests, window, shape.num_heads, shape.head_size)
    return sharpness * random_like(size, shape.dtype, generator)


def window_lse(
    batch: PagedBatch,
    query: torch.Tensor,
    layer: int,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Natural lse of each window query over the keys that it sees, and the sink."""
    shape, window = batch.shape, query.shape[1]
    lse = torch.empty(query.shape[:3], dtype=torch.float64, device=query.device)
    for r, request in enumerate(batch.requests):
        for head in range(shape.num_heads):
            entries = prompt_entries(
                batch.pool,
                request.descriptor,
                batch.block_table[r].tolist(),
                layer * shape.num_kv_heads + head // shape.group,
                shape.num_streams,
            )
            logits = query[r, :, head].double() @ entries[:, : shape.head_size].T * scale
            positions = torch.arange(request.seq_len - window, request.seq_len)
            future = torch.arange(request.seq_len) > positions[:, None]
            hidden = logits.masked_fill(future.to(logits.device), float("-inf"))
            lse[r, :, head] = hidden.logsumexp(dim=1)
            if sinks is not None:
                lse[r, :, head] = torch.logaddexp(lse[r, :, head], sinks[head].double())
    return lse.float()


def plan_of(options: dict) -> ops.WindowPlan:
    """Of those options that are a plan's, which are taken away."""
    names = [field.name for field in dataclasses.fields(ops.WindowPlan)]
    return ops.WindowPlan(**{name: options.pop(name) for name in names if name in options})
