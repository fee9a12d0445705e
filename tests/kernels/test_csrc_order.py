"""The CUDA kernels of csrc/cuda rely on no order that CUDA does not promise.

They run on the CPU, blocks and threads interleaved, and every access to memory is checked: whoever
reads what another thread has written must be behind it by barriers, fences and atomics. Taking away
any one of these must be noticed.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

import csrc_on_host
import pytest
import torch
from csrc_cases import SEEDS, int32
from csrc_on_host import SOURCES, OrderError, Place
from paged_pool import Request, Shape, make_batch

from vllm_kvcompress import ops

pytestmark = [
    pytest.mark.skipif(csrc_on_host.COMPILER is None, reason="needs g++"),
    pytest.mark.emulated,
]


def random_scores(*size: int, kinds: int) -> torch.Tensor:
    scores = torch.rand(size, generator=torch.Generator().manual_seed(0))
    return (scores * kinds).floor() / kinds


def nearly_equal_scores(num_streams: int, num_entries: int) -> torch.Tensor:
    """Equal but for their last bits, so that all three digits are needed."""
    order = torch.randperm(num_streams * num_entries, generator=torch.Generator().manual_seed(0))
    return (0x3F800000 + order).int().view(torch.float32).view(1, num_streams, num_entries)


# Inputs that are small and take every path on which threads meet. Each returns whether the result
# is right.


def joint_case(scores, num_entries, totals, guaranteed, page_size) -> bool:
    arguments = (scores, *map(int32, (num_entries, totals, guaranteed)), page_size)
    want = ops.joint_page_counts(*arguments, backend="reference")
    return torch.equal(csrc_on_host.joint_page_counts(*arguments), want)


def joint_counts_of_pages() -> bool:
    scores = random_scores(2, 4, 50, kinds=3)
    return joint_case(scores, (50, 23), [[40, 30], [20, 25]], [[2, 0], [0, 1]], 1)


def joint_counts_of_tokens() -> bool:
    """Two streams are given a page, for which the others pay."""
    scores = random_scores(1, 4, 64, kinds=1000)
    scores[0, 1:3] += 2
    return joint_case(scores, (64,), [[6]], [[0]], 16)


def joint_counts_by_remainders() -> bool:
    """Shares are no whole pages, so that some streams get one more."""
    return joint_case(random_scores(1, 4, 80, kinds=1000), (80,), [[11]], [[0]], 16)


def selection_case(scores, num_pages) -> bool:
    pages = int32(num_pages)
    num_entries = int32([scores.shape[2]])
    arguments = (scores, num_entries, pages, int(pages.sum()))
    want = ops.select_entries(*arguments, backend="reference")
    got = csrc_on_host.select_entries(*arguments)
    return all(torch.equal(*both) for both in zip(got, want, strict=True))


def selection() -> bool:
    return selection_case(nearly_equal_scores(3, 40), [[20, 0, 7]])


def selection_over_two_tiles() -> bool:
    return selection_case(random_scores(1, 1, 2100, kinds=9), [[2050]])


def copies(page_size: int) -> bool:
    """Selection and compaction of two requests, in two launches and in one."""
    shape = Shape(num_layers=1, head_size=4, dtype=torch.float16)
    b = shape.block_size
    requests = [Request(n * b, num_region_blocks=2, boundary_block=n) for n in (6, 5)]
    batch = make_batch(shape, requests, torch.device("cpu"))
    num_streams, num_entries = shape.num_streams, 5 * page_size
    scores = random_scores(2, num_streams, num_entries, kinds=20)
    counts = int32([[5] * (2 * num_streams // 5) + [2 * num_streams % 5]] * 2)
    counts = torch.nn.functional.pad(counts, (0, num_streams - counts.shape[1]))
    options = {"max_region_blocks": 2}
    selected = (scores, int32([num_entries] * 2), counts, 2 * num_streams)
    want = ops.select_entries(*selected, page_size, backend="reference")
    rows = (batch.rows, batch.block_table)
    granularity = "page" if page_size == 1 else "token"
    pools = [batch.pool.clone() for _ in range(3)]
    pool = batch.paged(pools[0])
    whole = {"granularity": granularity, "backend": "reference"}
    ops.compact(pool, batch.op_rows, *want, **options, **whole)
    csrc_on_host.compact(pools[1], *rows, *want, **options, granularity=granularity)
    got = csrc_on_host.select_and_compact(
        *selected, pools[2], *rows, page_size=page_size, **options
    )
    bits = [pool.view(torch.uint8) for pool in pools]
    return (
        torch.equal(bits[1], bits[0])
        and torch.equal(bits[2], bits[0])
        and all(torch.equal(*both) for both in zip(got, want, strict=True))
    )


def copies_of_pages() -> bool:
    return copies(1)


def copies_of_tokens() -> bool:
    return copies(16)


JOINT = (joint_counts_of_pages, joint_counts_of_tokens, joint_counts_by_remainders)
SELECT = (selection, selection_over_two_tiles, copies_of_pages, copies_of_tokens)
CASES = (*JOINT, *SELECT)
# Where a fault in a file shows first.
FIRST_CASES = {"compact.cu": (copies_of_pages,), "select.cu": SELECT}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_all_accesses_are_ordered(case: Callable[[], bool], seed: int):
    csrc_on_host.set_machine(seed, num_processors=1000, is_checked=True)
    assert case()


def places() -> list[Place]:
    """Every barrier, fence and atomic of the sources."""
    pattern = re.compile(r"__sync\w+\(|__threadfence\w*\(|\batomic\w+\(")
    return [
        Place(path.name, number)
        for path in sorted(SOURCES.glob("*.cu*"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line.split("//")[0])
    ]


def test_all_kinds_are_found():
    files = {path.name: path.read_text(encoding="utf-8").splitlines() for path in SOURCES.iterdir()}
    lines = [files[place.file][place.line - 1] for place in places()]
    for kind in ("__syncthreads(", "__threadfence(", "atomicAdd("):
        assert any(kind in line for line in lines)


@pytest.mark.parametrize("place", places(), ids=lambda place: f"{place.file}:{place.line}")
def test_nothing_can_be_left_out(place: Place):
    for seed in SEEDS[:2]:
        csrc_on_host.set_machine(seed, num_processors=1000, is_checked=True, without=place)
        with pytest.raises(OrderError):
            for case in FIRST_CASES.get(place.file, CASES):
                case()


# The emulation itself, on small kernels.


class Handover(ctypes.Structure):
    """`Handover` of order_examples.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "ticket", "sum")),
        *(
            (name, ctypes.c_bool)
            for name in (
                "all_fence_first",
                "barrier_before",
                "fence_before",
                "fence_after",
                "barrier_after",
                "all_fence_last",
            )
        ),
    )


RIGHT = {"barrier_before", "fence_before", "fence_after", "barrier_after"}
NUM_BLOCKS, NUM_THREADS = 3, 512


def hand_over(steps: set[str], seed: int) -> int:
    """The sum that the last block adds up, done in these steps."""
    csrc_on_host.set_machine(seed, num_processors=1, is_checked=True)
    memory = (
        torch.full((NUM_BLOCKS * NUM_THREADS,), -1, dtype=torch.int32),
        int32([0]),
        int32([0]),
    )
    way = Handover(*(tensor.data_ptr() for tensor in memory), **dict.fromkeys(steps, True))
    csrc_on_host.run("run_handover", ctypes.byref(way), NUM_BLOCKS, memory=memory)
    return int(memory[2])


@pytest.mark.parametrize("seed", range(6))
def test_a_fence_on_both_sides_of_a_ticket_orders_blocks(seed):
    assert hand_over(RIGHT, seed) == NUM_BLOCKS * sum(range(NUM_THREADS))


@pytest.mark.parametrize(
    "steps",
    [
        *(RIGHT - {step} for step in sorted(RIGHT)),
        # Each thread fences for itself, and none for the one that has the ticket.
        {"all_fence_first", "barrier_before", "barrier_after", "all_fence_last"},
        {"all_fence_first", "barrier_before", "fence_after", "barrier_after"},
        {"barrier_before", "fence_before", "barrier_after", "all_fence_last"},
    ],
    ids=lambda steps: " ".join(sorted(steps)),
)
def test_any_less_orders_nothing(steps):
    for seed in range(6):
        with pytest.raises(OrderError, match=r"no order between|never come|different barriers"):
            hand_over(steps, seed)


FAULTS = {
    "shuffle for a barrier": r"no order between this (read|write) at order_examples.cpp:\d+ of",
    "plain addition": r"no order between this (read|write) at order_examples.cpp:\d+ of thread",
    "past the end": r"4 bytes of memory that is not the kernel's are touched at order_examples",
    "gone early": "threads wait for others that never come",
    "two barriers": "threads of a block are at different barriers",
    "no end": "the grid does not come to an end",
}


def sum_after(fault: int, seed: int) -> int:
    """Number of a fault, from 1, or 0 if there is none."""
    csrc_on_host.set_machine(seed, num_processors=1, is_checked=True)
    total = int32([0])
    arguments = (ctypes.c_void_p(total.data_ptr()), fault, NUM_BLOCKS)
    csrc_on_host.run("run_example", *arguments, memory=(total,))
    return int(total)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault):
    for seed in range(2):
        assert sum_after(0, seed) == NUM_BLOCKS * sum(range(1, NUM_THREADS, 32))
        with pytest.raises(OrderError, match=FAULTS[fault]):
            sum_after(list(FAULTS).index(fault) + 1, seed)


def num_last(in_two: bool, seed: int) -> int:
    """How many blocks took themselves for the last one."""
    csrc_on_host.set_machine(seed, num_processors=1, is_checked=True)
    taken = int32([0, 0])
    arguments = (ctypes.c_void_p(taken.data_ptr()), in_two, NUM_BLOCKS)
    csrc_on_host.run("run_ticket", *arguments, memory=(taken,))
    assert taken[0] == NUM_BLOCKS
    return int(taken[1])


def test_blocks_come_in_between_two_atomics():
    """No access is unordered here: what two atomics get wrong only the schedule shows."""
    assert {num_last(False, seed) for seed in range(40)} == {1}
    assert {num_last(True, seed) for seed in range(40)} == {0, 1}
