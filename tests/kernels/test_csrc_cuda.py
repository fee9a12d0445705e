"""The CUDA kernels that count and select against the references: exact, whatever the ties.

Every case runs the sources of csrc/cuda on the CPU, in several orders of threads and blocks, and
the compiled kernels where there is a GPU.
"""

from __future__ import annotations

import struct

import csrc_on_host
import pytest
import torch
from csrc_cases import SEEDS, in_several_orders, int32, random_scores
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vllm_kvcompress import ops

needs_compiler = pytest.mark.skipif(csrc_on_host.COMPILER is None, reason="needs g++")


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
