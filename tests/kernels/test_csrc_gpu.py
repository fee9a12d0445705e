"""The compiled CUDA kernels of csrc/cuda on a GPU: real sizes, graphs, and what is refused."""

from __future__ import annotations

import pytest
import torch
from csrc_cases import fresh_scores, int32, prompts_with_regions, random_scores, reference_region
from gpu import native
from paged_pool import Shape

from vllm_kvcompress import ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiled")]
BASE = Shape()


@pytest.mark.parametrize(
    ("num_streams", "num_entries"),
    [(256, 2047), (640, 8192), (6144, 300), (8192, 300), (80, 131072)],
)
def test_model_sizes(num_streams, num_entries):
    scores = random_scores((2, num_streams, num_entries), kinds=10_000).cuda()
    lens = int32([num_entries, num_entries - 5], scores.device)
    kept = num_entries // 8
    totals = int32([[num_streams * kept], [num_streams * (kept // 2)]], scores.device)
    sure = int32([[5], [0]], scores.device)
    counts = native.joint_page_counts(scores, lens, totals, sure)
    assert torch.equal(counts.sum(dim=1, keepdim=True), totals)
    # The references take hours at these sizes; the Triton kernels are checked by their own tests.
    assert torch.equal(counts, ops.joint_page_counts(scores, lens, totals, sure))
    max_pages = num_streams * kept
    selection = native.select_entries(scores, lens, counts, max_pages)
    want = ops.select_entries(scores, lens, counts, max_pages)
    assert torch.equal(selection[0], want[0])
    for r in range(2):
        num_kept = int(totals[r])
        assert torch.equal(selection[1][r, :num_kept], want[1][r, :num_kept])


def test_the_library_runs_on_this_gpu():
    assert ops.native_problem("cuda") is None


def test_a_graph_replays_all_ops_without_the_host():
    device = torch.device("cuda")
    batch = prompts_with_regions(BASE, device)
    num_requests, num_streams, num_entries = len(batch.requests), BASE.num_streams, 6
    scores = fresh_scores(batch, num_entries)
    lens = int32([num_entries] * num_requests, device)
    regions = batch.rows[:, [ops.ROW_FIELDS.index("num_region_blocks")]]
    # A request without a region is selected too, and then not copied.
    totals = (regions.clamp(min=1) * num_streams).contiguous()
    sure = torch.ones_like(totals)
    pools = [batch.pool.clone() for _ in range(2)]
    rows = (batch.rows, batch.block_table)

    def run():
        counts = native.joint_page_counts(scores, lens, totals, sure)
        selection = native.select_entries(scores, lens, counts, 3 * num_streams)
        native.compact(pools[0], *rows, *selection, max_region_blocks=3)
        fused = native.select_and_compact(
            scores, lens, counts, 3 * num_streams, pools[1], *rows, max_region_blocks=3
        )
        return counts, selection, fused

    run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            counts, selection, fused = run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    for seed in range(3):
        size = (num_requests, num_streams, num_entries)
        scores.copy_(random_scores(size, seed=10 + seed, kinds=9))
        for pool in pools:
            pool.copy_(batch.pool)
        graph.replay()
        want = ops.joint_page_counts(scores, lens, totals, sure, backend="reference")
        assert torch.equal(counts, want)
        pool, *want_selection = reference_region(batch, scores, lens, want, 3, 1)
        for offsets, indices in (selection, fused):
            assert torch.equal(offsets, want_selection[0])
            for r in range(num_requests):
                num_kept = int(offsets[r, -1])
                assert torch.equal(indices[r, :num_kept], want_selection[1][r, :num_kept])
        for got in pools:
            assert torch.equal(got.view(torch.uint8), pool.view(torch.uint8))


def test_what_does_not_fit_is_refused():
    device = torch.device("cuda")
    batch = prompts_with_regions(BASE, device)
    num_requests, num_streams = len(batch.requests), BASE.num_streams
    scores = fresh_scores(batch, 6)
    lens = int32([6] * num_requests, device)
    counts = torch.ones(num_requests, num_streams, dtype=torch.int32, device=device)
    total = int32([[num_streams]] * num_requests, device)
    long = torch.empty(600_000_000, device=device).expand(num_requests, num_streams, -1)
    registered = torch.ops.vllm_kvcompress
    for arguments, message in (
        ((scores.double(), lens, total, total, counts, 1), r"want scores \[R, S, N\] Float, got"),
        ((scores.cpu(), lens, total, total, counts, 1), "scores must be on a CUDA device"),
        ((scores, lens.long(), total, total, counts, 1), r"num_entries \[4\] Int, got \[4\] Long"),
        ((scores, lens.cpu(), total, total, counts, 1), "num_entries must be on CUDA device"),
        ((scores, lens, total[:1], total, counts, 1), r"total_pages \[4, 1\] Int, got \[1, 1\]"),
        ((scores, lens, counts[:, :3], counts[:, :3], counts, 1), "4 streams are not 3 equal"),
        ((scores, lens, total, total, counts.t(), 1), "num_pages must be contiguous"),
        ((scores.transpose(1, 2), lens, total, total, counts, 1), "a last stride of 1, got 6"),
        ((scores, lens, total, total, counts, 24), "page_size is 24, want a power of two"),
        ((long, lens, total, total, counts, 1), "entries of a group is 2400000000, want 0 to"),
    ):
        with pytest.raises(RuntimeError, match=message):
            registered.joint_page_counts(*arguments)
    offsets, indices = native.select_entries(scores, lens, counts, 3 * num_streams)
    pages = (batch.pool, batch.rows, batch.block_table)
    order = torch.zeros(1, device=device)
    for arguments, message in (
        ((*pages, offsets, indices, order, None, 3, 1), "key_offsets and value_offsets must be"),
        ((*pages, offsets, indices, None, None, 3, 8), "entries per page are 8, want 1 or"),
        ((*pages, offsets, indices, None, None, 4, 1), "at least 16 indices per request, got 12"),
        ((*pages, offsets, indices, None, None, -1, 1), "entries of a region is -4"),
        ((*pages, offsets[:, 1:], indices, None, None, 3, 1), "not whole blocks of 3 streams"),
        ((pages[0][:, ::2], *pages[1:], offsets, indices, None, None, 3, 1), "pool must be contig"),
    ):
        with pytest.raises(RuntimeError, match=message):
            registered.compact(*arguments)
    selection = (scores, lens, counts, offsets, indices)
    with pytest.raises(RuntimeError, match="at least 16 indices per request, got 12"):
        registered.select_and_compact(*selection, *pages, None, None, 4, 1)
