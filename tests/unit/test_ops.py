"""Ops that score and select against their references, and every argument they must refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress import ops
from vllm_kvcompress.ops.scoring import reference

INF = float("inf")
# Few distinct values, so that ties are the rule.
TIED_SCORES = st.sampled_from([-INF, -1.0, 0.0, 0.5, 1.0, INF])


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@st.composite
def score_tables(draw):
    num_rows = draw(st.integers(1, 4))
    num_entries = draw(st.integers(1, 9))
    row = st.lists(TIED_SCORES, min_size=num_entries, max_size=num_entries)
    return torch.tensor(draw(st.lists(row, min_size=num_rows, max_size=num_rows)))


def test_uninitialised_floats_are_nan_here():
    # Guards the fixture in conftest.py that the tests below lean on.
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3, dtype=torch.bfloat16)).isnan().all()
    assert torch.zeros(3).new_empty((2, 2)).isnan().all()
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64


# Window attention: H, g, w, n, d.
ATTENTION_SHAPES = {
    "gqa_1_to_1": (4, 1, 8, 40, 16),
    "gqa_3_to_1_odd_lengths": (3, 3, 7, 61, 12),
    "gqa_4_to_1": (2, 4, 16, 33, 64),
    "gqa_8_to_1": (1, 8, 5, 129, 32),
    "window_is_the_prompt": (2, 2, 16, 16, 16),
    "one_key_before_the_window": (2, 2, 15, 16, 16),
    "one_token": (1, 1, 1, 1, 8),
}


def attention_inputs(shape, dtype, generator):
    """Query and key as the engine hands them over: views, token axis outermost."""
    num_heads, group, window, num_keys, head_size = shape
    query = torch.randn(window, num_heads, group, head_size, generator=generator)
    key = torch.randn(num_keys, num_heads, head_size, generator=generator)
    return query.to(dtype).permute(1, 2, 0, 3), key.to(dtype).transpose(0, 1)


def plain_attention(query, key, scale, cap):
    """The same-dtype torch way, float32 at least: its error is the yardstick."""
    logits = torch.einsum("hgwd,hnd->hgwn", query.float(), key.float()) * scale
    if cap:
        logits = cap * torch.tanh(logits / cap)
    window, num_keys = logits.shape[2:]
    visible = torch.arange(num_keys) <= torch.arange(num_keys - window, num_keys)[:, None]
    return torch.where(visible, logits, -INF).softmax(dim=-1)


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES.values(), ids=ATTENTION_SHAPES)
def test_window_attention(shape, dtype, cap, generator):
    num_keys, window = shape[3], shape[2]
    query, key = attention_inputs(shape, dtype, generator)
    expected = ops.window_attention(query, key, 1.5, cap, backend="reference")
    actual = ops.window_attention(query, key, 1.5, cap)
    assert actual.dtype == torch.float32
    assert actual.shape == (*shape[:4],)
    assert actual.isfinite().all()
    future = torch.arange(num_keys) > torch.arange(num_keys - window, num_keys)[:, None]
    assert not actual[..., future].any()
    yardstick = (plain_attention(query, key, 1.5, cap) - expected).abs().max()
    floor = 8 * torch.finfo(torch.float32).eps
    assert (actual - expected).abs().max() <= 2 * yardstick + floor
    torch.testing.assert_close(actual.sum(dim=-1), torch.ones(shape[:3]))


def test_window_attention_soft_cap_bounds_the_weights():
    key = torch.tensor([[[1000.0], [-1000.0], [0.0]]])
    query = torch.ones(1, 1, 1, 1)
    weights = ops.window_attention(query, key, 1.0, logits_soft_cap=2.0).flatten()
    expected = torch.tensor([2.0, -2.0, 0.0]).softmax(dim=0)
    torch.testing.assert_close(weights, expected)


def test_window_attention_does_not_write_to_its_arguments(generator):
    query, key = attention_inputs(ATTENTION_SHAPES["gqa_4_to_1"], torch.float32, generator)
    query_before, key_before = query.clone(), key.clone()
    ops.window_attention(query, key, 0.3, 1.0)
    assert torch.equal(query, query_before)
    assert torch.equal(key, key_before)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("kernel", [1, 3, 7, 63])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 17), (4, 1), (2, 64)], ids=str)
def test_pool_scores(shape, kernel, kind, generator):
    scores = torch.randn(shape, generator=generator)
    actual = ops.pool_scores(scores, kernel, kind)
    expected = ops.pool_scores(scores, kernel, kind, backend="reference")
    assert actual.shape == scores.shape
    if kind == "max":
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected)


def test_pool_scores_by_hand():
    scores = torch.tensor([0.0, 3.0, 0.0, 0.0, -6.0])
    assert ops.pool_scores(scores, 3, "max").tolist() == [3, 3, 3, 0, 0]
    assert ops.pool_scores(scores, 3, "avg").tolist() == [1, 1, 1, -2, -2]
    assert ops.pool_scores(torch.full((4,), -2.0), 7, "max").tolist() == [-2] * 4


def test_pool_scores_of_a_view_and_of_nothing(generator):
    scores = torch.randn(9, 4, generator=generator).t()
    expected = ops.pool_scores(scores, 5, "max", backend="reference")
    assert torch.equal(ops.pool_scores(scores, 5, "max"), expected)
    assert ops.pool_scores(torch.zeros(2, 0), 5, "max").shape == (2, 0)


# Projected value norm: H, g, n, d, m.
NORM_SHAPES = {
    "gqa_1_to_1": (4, 1, 9, 8, 32),
    "gqa_3_to_1_odd_lengths": (3, 3, 61, 12, 35),
    "gqa_4_to_1": (2, 4, 17, 16, 128),
    "gqa_8_to_1": (1, 8, 5, 4, 30),
    "one_token": (2, 2, 1, 8, 16),
    "no_token": (2, 2, 0, 8, 16),
}


def norm_inputs(shape, dtype, generator):
    """Value and output weight as the engine hands them over: views, token axis outermost."""
    num_heads, group, num_tokens, head_size, hidden_size = shape
    value = torch.randn(num_tokens, num_heads, head_size, generator=generator).to(dtype)
    weight = torch.randn(hidden_size, num_heads, group, head_size, generator=generator).to(dtype)
    return value.transpose(0, 1), weight.permute(1, 2, 3, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES.values(), ids=NORM_SHAPES)
def test_projected_value_norm(shape, dtype, generator):
    value, weight = norm_inputs(shape, dtype, generator)
    value_before, weight_before = value.clone(), weight.clone()
    expected = ops.projected_value_norm(value, weight, backend="reference")
    actual = ops.projected_value_norm(value, weight)
    assert actual.dtype == torch.float32
    assert actual.shape == (shape[0], shape[2])
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)
    assert torch.equal(value, value_before)
    assert torch.equal(weight, weight_before)


def test_projected_value_norm_by_hand():
    value = torch.tensor([[[1.0, -2.0], [0.0, 0.0]]])
    # Two query heads: one passes the value on, the other adds its elements and triples them.
    weight = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [3.0, 0.0]]]])
    for backend in ("torch", "reference"):
        # |1| + |-2| = 3 and |-3| = 3.
        norms = ops.projected_value_norm(value, weight, backend=backend)
        assert norms.tolist() == [[3.0, 0.0]]


def test_projected_value_norm_follows_each_query_head(generator):
    value, weight = norm_inputs((2, 3, 7, 8, 20), torch.float32, generator)
    per_head = [ops.projected_value_norm(value, weight[:, g : g + 1]) for g in range(3)]
    torch.testing.assert_close(ops.projected_value_norm(value, weight), sum(per_head) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES.values(), ids=NORM_SHAPES)
def test_value_effect(shape, dtype, generator):
    value, weight = norm_inputs(shape, dtype, generator)
    root = ops.output_root(weight)
    squares = torch.einsum("hgdm,hgem->hde", weight.double(), weight.double()) / shape[1]
    torch.testing.assert_close(root.double() @ root.mT.double(), squares, rtol=1e-5, atol=1e-4)
    effect = ops.value_effect(value, root)
    assert effect.dtype == torch.float32
    torch.testing.assert_close(
        effect, ops.value_effect(value, root, backend="reference"), rtol=2e-6, atol=0
    )
    # What it stands for: each query head's projected value, without the root.
    moved = torch.einsum("hnd,hgdm->hgnm", value.double(), weight.double())
    expected = (moved**2).sum(dim=-1).mean(dim=1).sqrt()
    torch.testing.assert_close(effect.double(), expected, rtol=1e-4, atol=1e-4)


def test_value_effect_by_hand():
    value = torch.tensor([[[1.0, -2.0], [0.0, 0.0]]])
    # Two query heads: one passes the value on, the other adds its elements and triples them.
    weight = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [3.0, 0.0]]]])
    # (1 + 4) and 9, their mean is 7.
    effect = ops.value_effect(value, ops.output_root(weight))
    torch.testing.assert_close(effect, torch.tensor([[7.0**0.5, 0.0]]))


@pytest.mark.parametrize("shape", [(16,), (3, 48), (2, 3, 32), (2, 0)], ids=str)
def test_page_scores(shape, generator):
    scores = torch.randn(shape, generator=generator)
    actual = ops.page_scores(scores, 16)
    assert actual.shape == (*shape[:-1], shape[-1] // 16)
    assert torch.equal(actual, ops.page_scores(scores, 16, backend="reference"))


@pytest.mark.parametrize("reduce", ["mean", "rms"])
def test_page_scores_reduced(reduce, generator):
    scores = torch.rand(2, 3, 48, generator=generator)
    scores[0, 0, :16] = 0
    # Squares of these are zero in float32.
    scores[0, 1] *= 1e-30
    scores[1, 2, 5] = INF
    actual = ops.page_scores(scores, 16, reduce)
    expected = ops.page_scores(scores, 16, reduce, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert (actual[0, 1] > 0).all()


def test_page_scores_reduced_by_hand():
    scores = torch.tensor([3.0, 4, 1, 1])
    assert ops.page_scores(scores, 2, "mean").tolist() == [3.5, 1]
    assert ops.page_scores(scores, 2, "rms").tolist() == pytest.approx([12.5**0.5, 1])


def test_page_scores_by_hand():
    scores = torch.tensor([[-5.0, -1.0, 2.0, INF], [0.0, 0.0, -INF, -INF]])
    assert ops.page_scores(scores, 2).tolist() == [[-1, INF], [0, -INF]]


@pytest.mark.parametrize(
    ("scores", "total", "guaranteed", "expected"),
    [
        pytest.param([[9, 8, 7], [6, 5, 4]], 3, 0, [3, 0], id="one_row_wins_all"),
        pytest.param([[9, 8, 7], [6, 5, 4]], 3, 1, [2, 1], id="guarantee_of_one"),
        pytest.param([[9, 1, 5], [6, 5.5, 4]], 4, 1, [2, 2], id="interleaved"),
        pytest.param([[9, 8, 7], [6, 5, 4]], 6, 0, [3, 3], id="everything"),
        pytest.param([[9, 8, 7], [6, 5, 4]], 6, 3, [3, 3], id="everything_guaranteed"),
        pytest.param([[9, 8, 7], [6, 5, 4]], 0, 0, [0, 0], id="nothing"),
        pytest.param([[1, 2, 3], [INF, 0, INF]], 2, 0, [0, 2], id="infinite_first"),
        pytest.param([[-INF, -INF], [-1, -INF]], 1, 0, [0, 1], id="minus_infinite_last"),
    ],
)
def test_joint_top_counts_by_hand(scores, total, guaranteed, expected):
    table = torch.tensor(scores, dtype=torch.float32)
    for backend in ("torch", "reference"):
        counts = ops.joint_top_counts(table, total, guaranteed, backend=backend)
        assert counts.dtype == torch.int64
        assert counts.tolist() == expected


@given(score_tables(), st.data())
def test_joint_top_counts_with_ties(scores, data):
    num_rows, num_entries = scores.shape
    guaranteed = data.draw(st.integers(0, num_entries))
    total = data.draw(st.integers(num_rows * guaranteed, scores.numel()))
    counts = ops.joint_top_counts(scores, total, guaranteed)
    assert torch.equal(counts, reference.joint_top_counts(scores, total, guaranteed))
    assert int(counts.sum()) == total
    assert int(counts.min()) >= guaranteed
    # No entry left out beats one that is in beyond its row's guarantee.
    ranked = scores.sort(dim=1, descending=True).values
    left_out = [row[n] for row, n in zip(ranked, counts.tolist(), strict=True) if n < num_entries]
    last_in = [row[n - 1] for row, n in zip(ranked, counts.tolist(), strict=True) if n > guaranteed]
    if left_out and last_in:
        assert max(left_out) <= min(last_in)


@pytest.mark.parametrize(
    ("scores", "counts", "expected"),
    [
        pytest.param([[3, 1, 2]], [2], [0, 2], id="ascending_positions"),
        pytest.param([[3, 1, 2], [1, 2, 3]], [0, 1], [2], id="ragged_with_an_empty_row"),
        pytest.param([[3, 1, 2], [1, 2, 3]], [3, 0], [0, 1, 2], id="all_and_none"),
        pytest.param([[3, 1, 2], [1, 2, 3]], [0, 0], [], id="nothing"),
        pytest.param([[5, 5, 5, 5]], [2], [0, 1], id="ties_by_position"),
        pytest.param([[1, INF, 1, INF, INF]], [2], [1, 3], id="infinite_ties_by_position"),
        pytest.param([[0, 9, 0, 0]], [3], [0, 1, 2], id="ties_behind_the_best"),
    ],
)
def test_select_top_by_hand(scores, counts, expected):
    table = torch.tensor(scores, dtype=torch.float32)
    for backend in ("torch", "reference"):
        indices = ops.select_top(table, torch.tensor(counts), backend=backend)
        assert indices.dtype == torch.int64
        assert indices.tolist() == expected


@given(score_tables(), st.data())
def test_select_top_with_ties(scores, data):
    num_rows, num_entries = scores.shape
    count = st.integers(0, num_entries)
    counts = torch.tensor(data.draw(st.lists(count, min_size=num_rows, max_size=num_rows)))
    indices = ops.select_top(scores, counts)
    assert torch.equal(indices, reference.select_top(scores, counts))
    for row, chosen in zip(scores, indices.split(counts.tolist()), strict=True):
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        rest = [i for i in range(num_entries) if i not in chosen.tolist()]
        # Chosen entries are better, or equal and earlier.
        assert all((row[i], -i) > (row[j], -j) for i in chosen.tolist() for j in rest)


ZEROS = torch.zeros


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.window_attention(ZEROS(2, 3, 4), ZEROS(2, 9, 8), 1.0), r"\(2, 3, 4\)"),
        (lambda: ops.window_attention(ZEROS(2, 1, 4, 8), ZEROS(9, 8), 1.0), r"\(9, 8\)"),
        (lambda: ops.window_attention(ZEROS(2, 1, 4, 8), ZEROS(3, 9, 8), 1.0), r"\(3, 9, 8\)"),
        (lambda: ops.window_attention(ZEROS(2, 1, 4, 8), ZEROS(2, 9, 6), 1.0), "8 .*6"),
        (lambda: ops.window_attention(ZEROS(2, 1, 4, 8), ZEROS(2, 3, 8), 1.0), "window 4 .*3"),
        (lambda: ops.pool_scores(ZEROS(4), 2, "max"), "odd and positive, got 2"),
        (lambda: ops.pool_scores(ZEROS(4), 0, "max"), "odd and positive, got 0"),
        (lambda: ops.pool_scores(ZEROS(4), -3, "max"), "odd and positive, got -3"),
        (lambda: ops.pool_scores(ZEROS(4), 3, "min"), "'min'"),
        (lambda: ops.projected_value_norm(ZEROS(9, 8), ZEROS(2, 1, 8, 4)), r"\(9, 8\)"),
        (lambda: ops.value_effect(ZEROS(2, 9, 8), ZEROS(2, 8, 7)), r"\(2, 8, 7\)"),
        (lambda: ops.value_effect(ZEROS(9, 8), ZEROS(2, 8, 8)), r"\(9, 8\)"),
        (lambda: ops.output_root(ZEROS(2, 8, 8)), r"\(2, 8, 8\)"),
        (lambda: ops.projected_value_norm(ZEROS(2, 9, 8), ZEROS(2, 8, 4)), r"\(2, 8, 4\)"),
        (
            lambda: ops.projected_value_norm(ZEROS(2, 9, 8), ZEROS(3, 1, 8, 4)),
            r"\(2, 9, 8\), \(3, 1, 8, 4\)",
        ),
        (lambda: ops.projected_value_norm(ZEROS(2, 9, 8), ZEROS(2, 1, 6, 4)), r"\(2, 1, 6, 4\)"),
        (lambda: ops.page_scores(ZEROS(2, 33), 16), "33 .*16"),
        (lambda: ops.page_scores(ZEROS(2, 32), 16, "sum"), "page reduction 'sum'"),
        (lambda: ops.joint_top_counts(ZEROS(2, 3), 7, 0), "7 of 2 x 3"),
        (lambda: ops.joint_top_counts(ZEROS(2, 3), 3, 2), "3 of 2 x 3 entries, 2 sure"),
        (lambda: ops.joint_top_counts(ZEROS(2, 3), 6, 4), "4 sure"),
        (lambda: ops.joint_top_counts(ZEROS(2, 3), 4, -1), "-1 sure"),
        (lambda: ops.select_top(ZEROS(2, 3), torch.tensor([1])), r"2 counts .*\[1\]"),
        (lambda: ops.select_top(ZEROS(2, 3), torch.tensor([1, 4])), r"\[0, 3\].*\[1, 4\]"),
        (lambda: ops.select_top(ZEROS(2, 3), torch.tensor([1, -1])), r"\[1, -1\]"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda backend: ops.window_attention(
            ZEROS(1, 1, 1, 2), ZEROS(1, 1, 2), 1.0, backend=backend
        ),
        lambda backend: ops.pool_scores(ZEROS(4), 3, "max", backend=backend),
        lambda backend: ops.projected_value_norm(
            ZEROS(1, 1, 2), ZEROS(1, 1, 2, 3), backend=backend
        ),
        lambda backend: ops.value_effect(ZEROS(1, 1, 2), ZEROS(1, 2, 2), backend=backend),
        lambda backend: ops.page_scores(ZEROS(4), 2, backend=backend),
        lambda backend: ops.joint_top_counts(ZEROS(1, 2), 1, 0, backend=backend),
        lambda backend: ops.select_top(ZEROS(1, 2), torch.tensor([1]), backend=backend),
    ],
    ids=[
        "window_attention",
        "pool_scores",
        "projected_value_norm",
        "value_effect",
        "page_scores",
        "joint_top_counts",
        "select_top",
    ],
)
def test_unknown_backend_is_refused_with_the_known_ones(call):
    with pytest.raises(ValueError, match=r"'gpu'; known: torch, (native, )?reference"):
        call("gpu")
