"""The CUDA kernels that copy against the references: bit for bit.

Every case runs the sources of csrc/cuda on the CPU, in several orders of threads and blocks, and
the compiled kernels where there is a GPU.
"""

from __future__ import annotations

import pytest
import torch
from csrc_cases import (
    fresh_scores,
    in_several_orders,
    int32,
    prompts_with_regions,
    reference_region,
)
from paged_pool import PagedBatch, Request, Shape, make_batch

from vllm_kvcompress import ops

BASE = Shape()
SHAPES = {
    "float32": BASE,
    "bfloat16": Shape(dtype=torch.bfloat16, num_layers=3),
    "fp8": Shape(dtype=torch.bfloat16, pool_dtype=torch.float8_e4m3fn),
    "head size 80": Shape(head_size=80, dtype=torch.float16),
    "tokens of 12 bytes": Shape(head_size=3, dtype=torch.float16),
    "tokens of 10 bytes": Shape(head_size=5, pool_dtype=torch.float8_e4m3fn),
    "block size 128": Shape(block_size=128, num_kv_heads=3, num_layers=1, head_size=16),
    "one stream": Shape(num_layers=1, num_kv_heads=1),
}


def uneven_counts(batch: PagedBatch, max_pages: int) -> torch.Tensor:
    """[R, S] int32 pages: the first stream has none where that is possible, the others differ."""
    num_streams = batch.shape.num_streams
    counts = torch.zeros(len(batch.requests), num_streams, dtype=torch.int32)
    for r, request in enumerate(batch.requests):
        missing = request.num_region_blocks * num_streams
        for stream in reversed(range(num_streams)):
            counts[r, stream] = min(missing, max_pages - stream % 2)
            missing -= int(counts[r, stream])
        assert missing == 0
    return counts


def check_copies(
    target, batch: PagedBatch, num_entries: int, counts, max_region_blocks: int, page_size: int
) -> None:
    """Compaction, and both in one, against the references."""
    kernels, device = target
    scores, counts = fresh_scores(batch, num_entries), counts.to(device)
    lens = int32([num_entries] * len(batch.requests), device)
    max_pages = max_region_blocks * batch.shape.num_streams
    want, *selection = reference_region(batch, scores, lens, counts, max_region_blocks, page_size)
    assert not torch.equal(want.view(torch.uint8), batch.pool.view(torch.uint8))
    granularity = "page" if page_size == 1 else "token"
    rows = (batch.rows, batch.block_table)
    options = {"max_region_blocks": max_region_blocks}
    for _ in in_several_orders(kernels):
        pool = batch.pool.clone()
        kernels.compact(pool, *rows, *selection, granularity=granularity, **options)
        assert torch.equal(pool.view(torch.uint8), want.view(torch.uint8))
        pool = batch.pool.clone()
        offsets, indices = kernels.select_and_compact(
            scores,
            lens,
            counts,
            max_pages,
            pool,
            *rows,
            page_size=page_size,
            **options,
        )
        assert torch.equal(pool.view(torch.uint8), want.view(torch.uint8))
        assert torch.equal(offsets, selection[0])
        for r in range(len(batch.requests)):
            num_kept = int(offsets[r, -1]) * page_size
            assert torch.equal(indices[r, :num_kept], selection[1][r, :num_kept])


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_copies(target, shape, granularity):
    page_size = 1 if granularity == "page" else shape.block_size
    batch = prompts_with_regions(shape, target[1])
    check_copies(target, batch, 6 * page_size, uneven_counts(batch, 6), 3, page_size)


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize(
    ("shape", "num_pages"),
    [
        # By tokens in two launches: the scores are many.
        (Shape(num_layers=1, num_kv_heads=2, head_size=16), 380),
        (Shape(num_layers=1, num_kv_heads=2, head_size=64), 60),
        (Shape(num_layers=1, num_kv_heads=2, head_size=4, pool_dtype=torch.float8_e4m3fn), 380),
    ],
    ids=["many blocks", "large pages", "several lists in one block"],
)
def test_long_streams(target, shape, num_pages, granularity):
    b, num_region_blocks = 16, num_pages // 2
    length = num_pages * b
    request = Request(length, num_region_blocks=num_region_blocks, boundary_block=num_pages)
    batch = make_batch(shape, [request], target[1])
    total = shape.num_streams * num_region_blocks
    counts = int32([[total // 8, total - total // 8]], torch.device("cpu"))
    page_size = 1 if granularity == "page" else b
    check_copies(target, batch, num_pages * page_size, counts, num_region_blocks, page_size)


def test_requests_without_a_region_are_selected_only(target):
    kernels, device = target
    batch = prompts_with_regions(BASE, device)
    rows = batch.rows.clone()
    rows[:, ops.ROW_FIELDS.index("num_region_blocks")] = 0
    scores = fresh_scores(batch, 6)
    num_streams = BASE.num_streams
    counts = torch.ones(len(batch.requests), num_streams, dtype=torch.int32, device=device)
    lens = int32([6] * len(batch.requests), device)
    pool = batch.pool.clone()
    arguments = (scores, lens, counts, 3 * num_streams, pool, rows, batch.block_table)
    offsets, indices = kernels.select_and_compact(*arguments, max_region_blocks=3)
    assert torch.equal(pool.view(torch.uint8), batch.pool.view(torch.uint8))
    assert offsets.tolist() == [list(range(num_streams + 1))] * len(batch.requests)
    assert torch.equal(indices[:, :num_streams], scores.argmax(dim=2).int())
    # Nothing to keep in the whole batch.
    arguments = (scores, lens, torch.zeros_like(counts), 0, *arguments[4:])
    offsets, _ = kernels.select_and_compact(*arguments, max_region_blocks=0)
    assert torch.equal(pool.view(torch.uint8), batch.pool.view(torch.uint8))
    assert not offsets.any()


@pytest.mark.parametrize("fused", [False, True])
def test_a_pool_past_32_bits(target, fused):
    """Blocks whose bytes, and whose elements, lie past 2^32; only theirs are touched."""
    kernels, device = target
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of GPU memory")
    num_streams, b, width = 2, 128, 256
    num_blocks = 2**32 // (num_streams * b * width) + 8
    pool = torch.empty(num_blocks * num_streams, b, width, dtype=torch.uint8, device=device)
    table = int32([[num_blocks - 1 - i for i in range(5)]], device)
    pages = pool.view(num_blocks, num_streams, b, width)
    source = torch.arange(3 * num_streams * b * width, device=device).view(3, num_streams, b, width)
    pages[table[0, :3].long()] = (source % 251).to(torch.uint8)
    rows = int32([[3 * b, 2, 3, 0]], device)
    counts, lens = int32([[3, 1]], device), int32([3], device)
    scores = torch.tensor([[[1.0, 2.0, 3.0], [1.0, 3.0, 2.0]]], device=device)
    if fused:
        arguments = (scores, lens, counts, 4, pool, rows, table)
        kernels.select_and_compact(*arguments, max_region_blocks=2)
    else:
        selection = kernels.select_entries(scores, lens, counts, 4)
        kernels.compact(pool, rows, table, *selection, max_region_blocks=2)
    region = pages[table[0, 3:5].long()].view(4, b, width)
    want = torch.stack([source[0, 0], source[1, 0], source[2, 0], source[1, 1]]) % 251
    assert torch.equal(region, want.to(torch.uint8))
