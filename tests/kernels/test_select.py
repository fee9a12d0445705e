"""Page counts and selection against the references: exact, whatever the ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from paged_pool import DEVICE

from vllm_kvcompress import ops


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random_scores(size: tuple[int, ...], seed: int = 0, kinds: int = 0) -> torch.Tensor:
    """Uniform scores over many magnitudes; only `kinds` different ones if that is not 0."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    scores = torch.rand(size, generator=generator, device=DEVICE)
    if kinds:
        return (scores * kinds).floor() / kinds
    return scores**8


def check_counts(backend, scores, num_entries, totals, guaranteed, page_size=1) -> torch.Tensor:
    arguments = (scores, int32(num_entries), int32(totals), int32(guaranteed), page_size)
    counts = ops.joint_page_counts(*arguments, backend=backend)
    assert torch.equal(counts, ops.joint_page_counts(*arguments, backend="reference"))
    groups = counts.view(len(num_entries), len(totals[0]), -1)
    assert torch.equal(groups.sum(dim=2), int32(totals).long())
    return counts


def check_selection(backend, scores, num_entries, num_pages, page_size=1) -> None:
    max_pages = int(num_pages.sum(dim=1).max())
    arguments = (scores, int32(num_entries), num_pages, max_pages, page_size)
    offsets, indices = ops.select_entries(*arguments, backend=backend)
    want_offsets, want_indices = ops.select_entries(*arguments, backend="reference")
    assert torch.equal(offsets, want_offsets)
    for r in range(len(num_entries)):
        num_kept = int(offsets[r, -1]) * page_size
        assert torch.equal(indices[r, :num_kept], want_indices[r, :num_kept])


@pytest.mark.parametrize("kinds", [0, 1, 3], ids=["distinct", "all equal", "many ties"])
@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("guaranteed", [0, 2])
def test_joint_counts(selector, kinds, num_groups, guaranteed):
    scores = random_scores((2, 6, 50), kinds=kinds)
    totals = [[60 // num_groups] * num_groups, [30 // num_groups] * num_groups]
    check_counts(selector, scores, (50, 23), totals, [[guaranteed] * num_groups] * 2)


@pytest.mark.parametrize("kinds", [0, 1, 3], ids=["distinct", "all equal", "many ties"])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("mean_pages", [1, 2])
def test_joint_counts_of_tokens_are_whole_pages(selector, kinds, page_size, mean_pages):
    scores = random_scores((2, 4, 5 * page_size), kinds=kinds)
    num_entries = (5 * page_size, 3 * page_size)
    counts = check_counts(
        selector, scores, num_entries, [[4 * mean_pages]] * 2, [[3], [0]], page_size
    )
    assert counts.min() >= 1


def test_one_stream_takes_what_the_others_can_spare(selector):
    scores = random_scores((1, 5, 96))
    scores[0, 3] += 10
    counts = check_counts(selector, scores, (96,), [[10]], [[0]], page_size=16)
    assert counts.tolist() == [[1, 1, 1, 6, 1]]
    # Every entry of one stream beats all others, and each stream is sure of four.
    counts = check_counts(selector, scores, (96,), [[50]], [[4]])
    assert counts.tolist() == [[4, 4, 4, 34, 4]]


@pytest.mark.parametrize("total", [5, 480], ids=["one each", "everything"])
def test_extreme_totals(selector, total):
    check_counts(selector, random_scores((1, 5, 96)), (96,), [[total]], [[1]])


def test_different_totals_per_group(selector):
    scores = random_scores((2, 6, 40), kinds=5)
    check_counts(selector, scores, (40, 40), [[3, 80, 20], [40, 2, 11]], [[1, 10, 0], [3, 1, 2]])


def test_special_numbers(selector):
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor(
        [
            [
                [0.0, -0.0, -1.0, inf, nan, 1.0],
                [-inf, nan, 1e-40, -1e-40, 0.0, inf],
                [nan, -inf, -nan, 1.0, -inf, nan],
            ]
        ],
        device=DEVICE,
    )
    for total in range(1, 19):
        counts = check_counts(selector, scores, (6,), [[total]], [[0]])
        check_selection(selector, scores, (6,), counts)


# Four are read at once.
@pytest.mark.parametrize("num_entries", [17, 18, 19, 20])
def test_entries_past_the_end_are_not_chosen(selector, num_entries):
    scores = random_scores((1, 2, 64))
    scores[..., num_entries:] = 100.0
    counts = check_counts(selector, scores, (num_entries,), [[12]], [[0]])
    check_selection(selector, scores, (num_entries,), counts)


@pytest.mark.parametrize("kinds", [0, 1, 4], ids=["distinct", "all equal", "many ties"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_selection(selector, kinds, page_size):
    scores = random_scores((2, 5, 8 * page_size + 32 * page_size), kinds=kinds)
    num_pages = int32([[0, 1, 8, 40, 3], [2, 2, 0, 20, 1]])
    check_selection(selector, scores, (40 * page_size, 20 * page_size), num_pages, page_size)


def test_rows_longer_than_a_tile(selector):
    scores = random_scores((1, 3, 2600), kinds=40)
    check_selection(selector, scores, (2500,), int32([[100, 2500, 1]]))
    check_counts(selector, scores, (2500,), [[3000]], [[7]])


@pytest.mark.gpu
@pytest.mark.parametrize(("num_streams", "num_entries"), [(256, 2048), (640, 2500)])
def test_model_sizes(selector, num_streams, num_entries):
    scores = random_scores((2, num_streams, num_entries), kinds=10_000)
    totals = [[num_streams * 100], [num_streams * 17]]
    counts = check_counts(selector, scores, (num_entries, num_entries - 5), totals, [[5], [0]])
    check_selection(selector, scores, (num_entries, num_entries - 5), counts)


@hypothesis_settings(max_examples=25)
@given(data=st.data())
def test_any_competition(selector, data):
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
    counts = check_counts(selector, scores, (num_entries,), [totals], [sure], page_size)
    check_selection(selector, scores, (num_entries,), counts, page_size)


def test_what_does_not_fit_is_refused():
    scores = random_scores((1, 4, 32))
    entries, total = int32([32]), int32([[8]])
    for arguments, message in (
        ((scores.double(), entries, total, total), "float32"),
        ((scores[0], entries, total, total), r"\[R, S, N\]"),
        ((scores, entries.long(), total, total), "num_entries"),
        ((scores, entries, total[0], total), "total_pages"),
        ((scores, entries, total, total.long()), "guaranteed"),
        ((scores, entries, int32([[1] * 3]), int32([[1] * 3])), "not 3 equal groups"),
        ((scores, entries, total, total, 8), "pages of 8 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.joint_page_counts(*arguments)
    with pytest.raises(ValueError, match="want num_pages"):
        ops.select_entries(scores, entries, int32([[1, 1]]), 2)
