"""`ops.compact` against the reference, and selection, compaction and decoding together."""

from __future__ import annotations

import pytest
import torch
from compiled_ops import need_compiled_ops
from paged_pool import DEVICE, PagedBatch, Request, Shape, compressed, make_batch

from vllm_kvcompress import ops
from vllm_kvcompress.ops.rows_reference import prompt_entries

BASE = Shape()


def prompts_with_regions(shape: Shape) -> PagedBatch:
    """Dense prompts whose rows hold a region (NaN so far), one without."""
    b = shape.block_size
    lens_and_regions = ((9 * b + 3, 3), (7 * b, 0), (6 * b, 1), (11 * b + 1, 2))
    requests = [
        Request(length, num_region_blocks=n, boundary_block=length // b if n else 0)
        for length, n in lens_and_regions
    ]
    return make_batch(shape, requests, DEVICE)


def random_selection(batch: PagedBatch, granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged page counts, one stream with none, and ascending entries of each."""
    shape = batch.shape
    entries_per_page = 1 if granularity == "page" else shape.block_size
    generator = torch.Generator(DEVICE).manual_seed(1)
    num_requests, num_streams = len(batch.requests), shape.num_streams
    scores = torch.rand(
        num_requests, num_streams, 6 * entries_per_page, generator=generator, device=DEVICE
    )
    counts = torch.zeros(num_requests, num_streams, dtype=torch.int32, device=DEVICE)
    for r, request in enumerate(batch.requests):
        num_region_blocks = request.num_region_blocks
        parts = compressed(shape, 0, num_region_blocks, 0, window=0, seed=r).pages
        counts[r] = torch.tensor([min(6, x) for x in parts], device=DEVICE)
        # Whatever a stream cannot take goes to the ones before it.
        missing = num_region_blocks * num_streams - int(counts[r].sum())
        for stream in range(num_streams):
            more = min(missing, 6 - int(counts[r, stream]))
            counts[r, stream] += more
            missing -= more
    num_entries = torch.full((num_requests,), 6 * entries_per_page, dtype=torch.int32)
    return ops.select_entries(
        scores,
        num_entries.to(DEVICE),
        counts,
        3 * num_streams,
        entries_per_page,
        backend="reference",
    )


SHAPES = {
    "float32": Shape(dtype=torch.float32),
    "bfloat16": Shape(dtype=torch.bfloat16, num_layers=3),
    "fp8": Shape(dtype=torch.bfloat16, pool_dtype=torch.float8_e4m3fn),
    "head size 80": Shape(head_size=80, dtype=torch.float16),
    "head size 256, block size 64": Shape(head_size=256, block_size=64, num_layers=1),
    "block size 128": Shape(block_size=128, num_kv_heads=3, num_layers=1),
    "one stream": Shape(num_layers=1, num_kv_heads=1),
}


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_reference(selector, shape, granularity):
    batch = prompts_with_regions(shape)
    selection = random_selection(batch, granularity)
    pools = {}
    for backend in (selector, "reference"):
        pools[backend] = batch.pool.clone()
        ops.compact(
            batch.paged(pools[backend]),
            batch.op_rows,
            *selection,
            max_region_blocks=3,
            granularity=granularity,
            backend=backend,
        )
    got, want = (pools[name].view(torch.uint8) for name in (selector, "reference"))
    assert torch.equal(got, want)
    assert not torch.equal(want, batch.pool.view(torch.uint8))
    # Regions are full of numbers now; nothing else has changed.
    for r, request in enumerate(batch.requests):
        first = request.boundary_block
        region = batch.block_table[r, first : first + request.num_region_blocks].long()
        pages = region[:, None] * shape.num_streams + torch.arange(shape.num_streams, device=DEVICE)
        assert pools[selector][pages].float().isfinite().all()
        got[pages] = batch.pool.view(torch.uint8)[pages]
    assert torch.equal(got, batch.pool.view(torch.uint8))


@pytest.mark.parametrize("backend", ["triton", "native", "torch", "reference"])
@pytest.mark.parametrize(("num_elements", "dtype"), [(3, torch.int8), (2048, torch.bfloat16)])
def test_entries_move_from_anywhere_to_anywhere(backend, num_elements, dtype):
    if backend == "native":
        need_compiled_ops()
    generator = torch.Generator().manual_seed(2)
    size = (120, num_elements)
    source = torch.randint(-100, 100, size, generator=generator).to(dtype)
    target = torch.zeros(150, num_elements, dtype=dtype)
    source_index = torch.randint(120, (90,), generator=generator)
    target_index = torch.randperm(150, generator=generator)[:90]
    is_moved = torch.rand(2, 90, generator=generator) < 0.8
    want = target.clone()
    for i in is_moved.all(dim=0).nonzero().flatten().tolist():
        want[target_index[i]] = source[source_index[i]]
    source_index[~is_moved[0]] = -1
    target_index[~is_moved[1]] = -7
    arguments = [x.to(DEVICE) for x in (source, source_index, target, target_index)]
    ops.move_entries(*arguments, backend=backend)
    assert torch.equal(arguments[2].cpu(), want)


def test_moves_that_do_not_fit_are_refused():
    entries, index = torch.zeros(8, 4), torch.arange(3)
    for source, source_index, target, target_index, message in (
        (entries.t(), index, entries, index, "contiguous source"),
        (entries, index, entries[:, :2], index, "contiguous target"),
        (entries, index, entries.half(), index, "contiguous target"),
        (entries, index.int(), entries, index, "source index"),
        (entries, index, entries, index[:2], "target index"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.move_entries(source, source_index, target, target_index, backend="reference")


def test_a_compacted_prompt_is_decoded():
    """Scores to attention on the device: the region holds the best pages of every stream."""
    shape = Shape(num_layers=2, num_kv_heads=2, group=2, dtype=torch.float32)
    b, length, num_region_blocks, window = 16, 9 * 16 + 3, 3, 20
    first_kept_block = (length - window) // b
    batch = make_batch(
        shape,
        [Request(length, num_region_blocks=num_region_blocks, boundary_block=length // b)],
        DEVICE,
    )
    generator = torch.Generator(DEVICE).manual_seed(5)
    scores = torch.rand(1, 4, first_kept_block, generator=generator, device=DEVICE)
    one = {"dtype": torch.int32, "device": DEVICE}
    num_entries = torch.tensor([first_kept_block], **one)
    total = torch.tensor([[num_region_blocks * 4]], **one)
    counts = ops.joint_page_counts(scores, num_entries, total, torch.ones_like(total))
    offsets, indices = ops.select_entries(scores, num_entries, counts, num_region_blocks * 4)
    before = [
        prompt_entries(
            batch.pool, batch.requests[0].descriptor, batch.block_table[0].tolist(), stream, 4
        )
        for stream in range(4)
    ]
    ops.compact(
        batch.paged(),
        batch.op_rows,
        offsets,
        indices,
        max_region_blocks=num_region_blocks,
    )
    rows = batch.rows.clone()
    rows[0, ops.ROW_FIELDS.index("first_kept_block")] = first_kept_block
    # The evicted blocks are gone.
    evicted = batch.block_table[0, :first_kept_block].long()
    batch.pool.view(-1, 4, b, 2 * shape.head_size)[evicted] = float("nan")
    for layer in range(2):
        out = ops.ragged_decode(
            batch.query,
            batch.paged(),
            ops.Rows(rows, batch.block_table, offsets, batch.query_start_loc),
            layer,
            ops.Logits(0.125),
        )
        for head in range(2):
            stream = layer * 2 + head
            kept = scores[0, stream].topk(int(counts[0, stream])).indices.tolist()
            tokens = [t for page in kept for t in range(page * b, (page + 1) * b)]
            tokens += range(first_kept_block * b, length)
            entries = before[stream][tokens]
            for q in range(head * 2, head * 2 + 2):
                logits = entries[:, :64] @ batch.query[0, q].double() * 0.125
                want = logits.softmax(0) @ entries[:, 64:]
                assert torch.allclose(out[0, q].double(), want, atol=1e-5)


def test_what_does_not_fit_is_refused():
    batch = prompts_with_regions(BASE)
    offsets, indices = random_selection(batch, "page")
    options = {"max_region_blocks": 3}
    for arguments, change, message in (
        ((batch.pool[:, ::2], offsets, indices), {}, "contiguous pool"),
        ((batch.pool[1:], offsets, indices), {}, "not whole blocks"),
        ((batch.pool, offsets.long(), indices), {}, "page offsets"),
        ((batch.pool, offsets, indices[:, 1:]), {}, "want indices"),
        ((batch.pool, offsets, indices), {"granularity": "token"}, "want indices"),
        ((batch.pool, offsets, indices), {"granularity": "block"}, "unknown granularity"),
    ):
        pool, *selection = arguments
        with pytest.raises(ValueError, match=message):
            ops.compact(batch.paged(pool), batch.op_rows, *selection, **{**options, **change})
