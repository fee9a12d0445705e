"""Inputs of the CUDA kernels' tests, and what the references make of them."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import csrc_on_host
import torch
from paged_pool import PagedBatch, Request, Shape, make_batch

from vllm_kvcompress import ops

# Of the schedules of emulated threads and blocks.
SEEDS = (0, 1, 2)


def random_scores(size: tuple[int, ...], seed: int = 0, kinds: int = 0) -> torch.Tensor:
    """Uniform scores over many magnitudes; only `kinds` different ones if that is not 0."""
    scores = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return (scores * kinds).floor() / kinds if kinds else scores**8


def int32(values, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def in_several_orders(kernels: ModuleType, seeds: tuple[int, ...] = SEEDS) -> Iterator[None]:
    """Once per order of threads; on a GPU as often, in orders of its own.

    With all but the first a stream's copy is cut into as many parts as can be.
    """
    for seed in seeds:
        if kernels is csrc_on_host:
            csrc_on_host.set_machine(seed, num_processors=1000 if seed else 1)
        yield


def prompts_with_regions(shape: Shape, device: torch.device) -> PagedBatch:
    """Dense prompts whose rows hold a region (NaN so far), one without."""
    b = shape.block_size
    lens_and_regions = ((9 * b + 3, 3), (7 * b, 0), (6 * b, 1), (11 * b + 1, 2))
    requests = [
        Request(length, num_region_blocks=n, boundary_block=length // b if n else 0)
        for length, n in lens_and_regions
    ]
    return make_batch(shape, requests, device)


def fresh_scores(batch: PagedBatch, num_entries: int) -> torch.Tensor:
    size = (len(batch.requests), batch.shape.num_streams, num_entries)
    return random_scores(size, kinds=50).to(batch.pool.device)


def reference_region(
    batch: PagedBatch, scores, num_entries, counts, max_region_blocks: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pool, offsets and indices after selection and compaction, all by the references."""
    pool = batch.pool.clone()
    selection = ops.select_entries(
        scores,
        num_entries,
        counts,
        max_region_blocks * batch.shape.num_streams,
        page_size,
        backend="reference",
    )
    ops.compact(
        batch.paged(pool),
        batch.op_rows,
        *selection,
        max_region_blocks=max_region_blocks,
        granularity="page" if page_size == 1 else "token",
        backend="reference",
    )
    return pool, *selection
