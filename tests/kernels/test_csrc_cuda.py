"""The CUDA kernels of csrc/cuda against the references: exact, whatever the ties.

Every case runs the kernels' own sources on the CPU, in two orders of threads and blocks, and the
compiled ones where there is a GPU.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from types import ModuleType

import csrc_on_host
import pytest
import torch
from gpu import native
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from paged_pool import PagedBatch, Request, Shape, make_batch

from vllm_kvcompress import ops
from vllm_kvcompress.ops.native import is_installed

SEEDS = (0, 1)
needs_compiler = pytest.mark.skipif(csrc_on_host.COMPILER is None, reason="needs g++")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> None:
    """The ops run on this GPU."""
    if native.build_cuda().find_nvcc() is None and not is_installed("cuda"):
        pytest.skip("not installed, and no nvcc in $CUDA_HOME, $PATH or /usr/local/cuda")
    native.load_here(tmp_path_factory.mktemp("csrc"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("host", marks=[needs_compiler, pytest.mark.emulated]),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def target(request) -> tuple[ModuleType, torch.device]:
    """The kernels, and the device on which they take their tensors."""
    if request.param == "host":
        return csrc_on_host, torch.device("cpu")
    request.getfixturevalue("compiled")
    return native, torch.device("cuda")


def random_scores(size: tuple[int, ...], seed: int = 0, kinds: int = 0) -> torch.Tensor:
    """Uniform scores over many magnitudes; only `kinds` different ones if that is not 0."""
    scores = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return (scores * kinds).floor() / kinds if kinds else scores**8


def int32(values, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def in_several_orders(kernels: ModuleType, seeds: tuple[int, ...] = SEEDS) -> Iterator[None]:
    """Once per order of threads; on a GPU as often, in orders of its own.

    With the second one a stream's copy is cut into as many parts as can be.
    """
    for seed in seeds:
        if kernels is csrc_on_host:
            csrc_on_host.set_machine(seed, num_processors=1000 if seed else 1)
        yield


def check_counts(
    target, scores, num_entries, totals, guaranteed, page_size=1, seeds=SEEDS
) -> torch.Tensor:
    kernels, device = target
    numbers = (int32(x, device) for x in (num_entries, totals, guaranteed))
    arguments = (scores.to(device), *numbers, page_size)
    want = ops.joint_page_counts(*arguments, backend="reference")
    for _ in in_several_orders(kernels, seeds):
        assert torch.equal(kernels.joint_page_counts(*arguments), want)
    return want


def check_selection(target, scores, num_entries, num_pages, page_size=1) -> None:
    kernels, device = target
    num_pages = int32(num_pages, device)
    max_pages = int(num_pages.sum(dim=1).max())
    arguments = (scores.to(device), int32(num_entries, device), num_pages, max_pages, page_size)
    want_offsets, want_indices = ops.select_entries(*arguments, backend="reference")
    for _ in in_several_orders(kernels):
        offsets, indices = kernels.select_entries(*arguments)
        assert torch.equal(offsets, want_offsets)
        for r in range(len(num_entries)):
            num_kept = int(offsets[r, -1]) * page_size
            assert torch.equal(indices[r, :num_kept], want_indices[r, :num_kept])
            if kernels is csrc_on_host:
                # Nothing is written past a request's last entry.
                assert (indices[r, num_kept:] == -1).all()


# Keys.

FLOATS = st.integers(0, 2**32 - 1).map(lambda bits: struct.unpack("f", struct.pack("I", bits))[0])


def bits_of(number: float) -> int:
    return struct.unpack("I", struct.pack("f", number))[0]


@needs_compiler
@hypothesis_settings(max_examples=300)
@given(a=FLOATS, b=FLOATS)
@example(a=0.0, b=-0.0)
@example(a=float("nan"), b=float("-inf"))
@example(a=1e-45, b=0.0)
@example(a=-1e-45, b=-0.0)
@example(a=float("inf"), b=3.4e38)
def test_keys_are_in_the_order_of_the_scores(a, b):
    lowest = [float("-inf") if x != x else x for x in (a, b)]
    keys = [csrc_on_host.order_key(bits_of(x)) for x in (a, b)]
    assert (keys[0] < keys[1]) == (lowest[0] < lowest[1])
    assert (keys[0] == keys[1]) == (lowest[0] == lowest[1])


# Counts and selections.


@pytest.mark.parametrize("kinds", [0, 1, 3], ids=["distinct", "all equal", "many ties"])
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("guaranteed", [0, 2])
def test_joint_counts(target, kinds, num_groups, guaranteed):
    scores = random_scores((2, 6, 50), kinds=kinds)
    totals = [[60 // num_groups] * num_groups, [30 // num_groups] * num_groups]
    check_counts(target, scores, (50, 23), totals, [[guaranteed] * num_groups] * 2)


@pytest.mark.parametrize("kinds", [0, 1, 3], ids=["distinct", "all equal", "many ties"])
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("mean_pages", [1, 2])
def test_joint_counts_of_tokens_are_whole_pages(target, kinds, page_size, mean_pages):
    scores = random_scores((2, 4, 5 * page_size), kinds=kinds)
    num_entries = (5 * page_size, 3 * page_size)
    totals = [[4 * mean_pages]] * 2
    counts = check_counts(target, scores, num_entries, totals, [[3], [0]], page_size)
    assert counts.min() >= 1


def test_one_stream_takes_what_the_others_can_spare(target):
    scores = random_scores((1, 5, 96))
    scores[0, 3] += 10
    counts = check_counts(target, scores, (96,), [[10]], [[0]], page_size=16)
    assert counts.tolist() == [[1, 1, 1, 6, 1]]
    counts = check_counts(target, scores, (96,), [[50]], [[4]])
    assert counts.tolist() == [[4, 4, 4, 34, 4]]


def test_pages_are_taken_from_several_streams(target):
    # Streams with few entries are given a page; the others pay for it, some of them twice.
    scores = random_scores((1, 12, 128))
    scores[0, 2] += 2
    scores[0, 7] += 2
    scores[0, 9] += 1
    for total in range(14, 24):
        check_counts(target, scores, (128,), [[total]], [[0]], page_size=16)


@pytest.mark.parametrize("total", [5, 480], ids=["one each", "everything"])
def test_extreme_totals(target, total):
    check_counts(target, random_scores((1, 5, 96)), (96,), [[total]], [[1]])


def test_different_totals_per_group(target):
    scores = random_scores((2, 6, 40), kinds=5)
    totals, guaranteed = [[3, 80, 20], [40, 2, 11]], [[1, 10, 0], [3, 1, 2]]
    check_counts(target, scores, (40, 40), totals, guaranteed)


@pytest.mark.parametrize("page_size", [1, 16])
def test_groups_of_more_streams_than_threads(target, page_size):
    num_streams = 530
    scores = random_scores((1, num_streams, 2 * page_size), kinds=2)
    total = num_streams + 300
    check_counts(target, scores, (2 * page_size,), [[total]], [[0]], page_size, seeds=(0,))


def test_special_numbers(target):
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor(
        [[[0.0, -0.0, -1.0, inf, nan, 1.0, -inf], [nan, -inf, 1e-40, -1e-40, 0.0, inf, 1e-45]]]
    )
    for total in range(1, 15):
        counts = check_counts(target, scores, (7,), [[total]], [[0]])
        check_selection(target, scores, (7,), counts.tolist())


@pytest.mark.parametrize("poison", [100.0, float("nan")])
def test_entries_past_the_end_are_not_chosen(target, poison):
    scores = random_scores((1, 2, 64))
    scores[..., 19:] = poison
    counts = check_counts(target, scores, (19,), [[38]], [[0]])
    check_selection(target, scores, (19,), counts.tolist())
    counts = check_counts(target, scores, (19,), [[12]], [[0]])
    check_selection(target, scores, (19,), counts.tolist())


@pytest.mark.parametrize("kinds", [0, 1, 4], ids=["distinct", "all equal", "many ties"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_selection(target, kinds, page_size):
    scores = random_scores((2, 5, 40 * page_size), kinds=kinds)
    num_pages = [[0, 1, 8, 40, 3], [2, 2, 0, 20, 1]]
    check_selection(target, scores, (40 * page_size, 20 * page_size), num_pages, page_size)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("num_entries", [1, 3, 2047, 2050])
def test_rows_that_start_anywhere(target, offset, num_entries):
    # Odd row lengths: each stream's address is aligned in its own way.
    whole = random_scores((1, 3, num_entries + offset + 2), kinds=1000).to(target[1])
    whole[..., :offset] = float("inf")
    scores = whole[..., offset:]
    total = 1 + num_entries * 3 // 2
    counts = check_counts(target, scores, (num_entries,), [[total]], [[0]])
    check_selection(target, scores, (num_entries,), counts.tolist())


@pytest.mark.parametrize("kinds", [0, 2, 40], ids=["distinct", "two values", "many ties"])
def test_rows_longer_than_a_tile(target, kinds):
    scores = random_scores((1, 3, 9000), kinds=kinds)
    check_selection(target, scores, (8999,), [[100, 8999, 6000]])
    check_counts(target, scores, (8999,), [[3000]], [[7]])


def test_scores_that_differ_in_their_last_bits(target):
    # All digits but the last are equal, so every pass is needed.
    bits = 0x3F800000 + torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    scores = bits.to(torch.int32).view(torch.float32).view(1, 2, 500)
    counts = check_counts(target, scores, (500,), [[333]], [[0]])
    check_selection(target, scores, (500,), counts.tolist())


@hypothesis_settings(max_examples=30)
@given(data=st.data())
def test_any_competition(target, data):
    page_size = data.draw(st.sampled_from([1, 1, 16]))
    num_groups = data.draw(st.integers(1, 3))
    size = data.draw(st.integers(1, 5))
    max_pages = data.draw(st.integers(1, 6 if page_size > 1 else 40))
    num_entries = max_pages * page_size
    scores = random_scores(
        (1, num_groups * size, num_entries + data.draw(st.integers(0, 9))),
        seed=data.draw(st.integers(0, 999)),
        kinds=data.draw(st.sampled_from([0, 1, 2, 7])),
    )
    lower = size if page_size > 1 else 1
    totals = [data.draw(st.integers(lower, size * max_pages)) for _ in range(num_groups)]
    sure = [data.draw(st.integers(0, total * page_size // size)) for total in totals]
    counts = check_counts(target, scores, (num_entries,), [totals], [sure], page_size)
    check_selection(target, scores, (num_entries,), counts.tolist(), page_size)


# Copies.

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


def prompts_with_regions(shape: Shape, device: torch.device) -> PagedBatch:
    """Dense prompts whose rows hold a region (NaN so far), one without."""
    b = shape.block_size
    lens_and_regions = ((9 * b + 3, 3), (7 * b, 0), (6 * b, 1), (11 * b + 1, 2))
    requests = [
        Request(length, num_region_blocks=n, boundary_block=length // b if n else 0)
        for length, n in lens_and_regions
    ]
    return make_batch(shape, requests, device)


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
        pool,
        batch.rows,
        batch.block_table,
        *selection,
        max_region_blocks=max_region_blocks,
        granularity="page" if page_size == 1 else "token",
        backend="reference",
    )
    return pool, *selection


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
    rows[:, 1] = 0
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


# On a GPU only.


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_streams", "num_entries"),
    [(256, 2047), (640, 8192), (6144, 300), (8192, 300), (80, 131072)],
)
@pytest.mark.usefixtures("compiled")
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


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
def test_the_library_runs_on_this_gpu():
    assert ops.native_problem("cuda") is None


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
def test_a_graph_replays_all_ops_without_the_host():
    device = torch.device("cuda")
    batch = prompts_with_regions(BASE, device)
    num_requests, num_streams, num_entries = len(batch.requests), BASE.num_streams, 6
    scores = fresh_scores(batch, num_entries)
    lens = int32([num_entries] * num_requests, device)
    regions = batch.rows[:, 1:2]
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


@pytest.mark.gpu
@pytest.mark.usefixtures("compiled")
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
