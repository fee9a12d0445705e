"""Every op against its reference or a loop written here, and every argument it must refuse."""

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


def random_order(block_size, head_size, generator):
    offsets = torch.randperm(2 * block_size * head_size, generator=generator)
    return ops.PageOrder(*offsets.view(2, block_size, head_size))


def plain_order(block_size, head_size, generator=None):
    """Keys, then values, as a tensor [2, token, element] has them."""
    offsets = torch.arange(2 * block_size * head_size)
    return ops.PageOrder(*offsets.view(2, block_size, head_size))


def transposed_key_order(block_size, head_size, generator=None):
    """As vLLM's CPU kernel: keys [element, token], then values [token, element]."""
    offsets = torch.arange(2 * block_size * head_size).view(2, -1)
    keys = offsets[0].view(head_size, block_size).t().contiguous()
    return ops.PageOrder(keys, offsets[1].view(block_size, head_size))


def interleaved_order(block_size, head_size, generator=None):
    """A token's key, its value, the next token's key."""
    offsets = torch.arange(2 * block_size * head_size).view(block_size, 2, head_size)
    return ops.PageOrder(offsets[:, 0], offsets[:, 1])


ORDERS = (random_order, plain_order, transposed_key_order, interleaved_order)


def test_regular_orders_are_recognised(generator):
    assert random_order(4, 6, generator).key_strides is None
    assert plain_order(4, 6).value_strides == (24, 6, 1)
    assert transposed_key_order(4, 6).key_strides == (0, 1, 4)
    assert interleaved_order(4, 6).value_strides == (6, 12, 1)
    # The same first steps, but not regular.
    offsets = plain_order(4, 6).key_offsets.clone()
    offsets[3, 4:] = offsets[3, 4:].flip(0)
    assert ops.PageOrder(offsets, plain_order(4, 6).value_offsets).key_strides is None
    # Backwards is for the general way.
    assert ops.PageOrder(*(o.flip(0) for o in vars(plain_order(4, 6)).values())).key_strides is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make_order", ORDERS)
def test_pack_and_unpack_under_any_element_order(make_order, dtype, generator):
    block_size, head_size = 4, 6
    order = make_order(block_size, head_size, generator)
    assert (order.block_size, order.head_size) == (block_size, head_size)
    pool = torch.full((11, 2 * block_size * head_size), float("nan"), dtype=dtype)
    page_ids = torch.tensor([7, 0, 10])
    key = torch.randn(3 * block_size, head_size, generator=generator).to(dtype)
    value = torch.randn(3 * block_size, head_size, generator=generator).to(dtype)
    ops.pack_pages(pool, page_ids, key, value, order)
    for token in range(3 * block_size):
        page, slot = page_ids[token // block_size], token % block_size
        for element in range(head_size):
            assert pool[page, order.key_offsets[slot, element]] == key[token, element]
            assert pool[page, order.value_offsets[slot, element]] == value[token, element]
    others = [page for page in range(11) if page not in page_ids.tolist()]
    assert pool[others].isnan().all()
    assert torch.equal(ops.unpack_pages(pool, page_ids, order, "key"), key)
    assert torch.equal(ops.unpack_pages(pool, page_ids, order, "value"), value)
    slots = torch.tensor([3, 0, 1])
    rows = torch.tensor([3, 4, 9])
    gathered = ops.gather_tokens(pool, page_ids, slots, order)
    assert torch.equal(gathered[0], key[rows]) and torch.equal(gathered[1], value[rows])


@pytest.mark.parametrize("make_order", ORDERS)
def test_unpack_several_streams(make_order, generator):
    order = make_order(4, 6, generator)
    pool = torch.randn(11, 48, generator=generator)
    page_ids = torch.tensor([[3, 9], [9, 1], [0, 0]])
    keys = ops.unpack_pages(pool, page_ids, order, "key")
    assert keys.shape == (3, 8, 6)
    for stream in range(3):
        for token in range(8):
            page = pool[page_ids[stream, token // 4]]
            assert torch.equal(keys[stream, token], page[order.key_offsets[token % 4]])


def test_pack_takes_views(generator):
    order = random_order(4, 6, generator)
    pool = torch.zeros(3, 48)
    both = torch.randn(4, 2, 6, generator=generator)
    ops.pack_pages(pool, torch.tensor([2]), both[:, 0], both[:, 1], order)
    assert torch.equal(pool[2, order.key_offsets], both[:, 0])
    assert torch.equal(pool[2, order.value_offsets], both[:, 1])


def test_copy_pages_moves_bits_and_nothing_else(generator):
    pool = torch.randn(9, 5, generator=generator)
    pool[6] = float("nan")
    before = pool.clone()
    ops.copy_pages(pool, torch.tensor([4, 6, 4]), torch.tensor([8, 0, 3]))
    expected = before[[6, 1, 2, 4, 4, 5, 6, 7, 4]]
    assert torch.equal(pool.view(torch.int32), expected.view(torch.int32))
    ops.copy_pages(pool, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert torch.equal(pool.view(torch.int32), expected.view(torch.int32))


def test_pages_past_2_to_the_31_elements():
    # Untouched memory of the 2 GiB pool is never backed by the system.
    page_elements = 2**12
    last = 2**31 // page_elements + 1
    pool = torch.empty((last + 1, page_elements), dtype=torch.int8)
    numbers = torch.arange(page_elements).remainder(127).to(torch.int8)
    pool[1] = numbers
    pool[0] = 0
    ops.copy_pages(pool, torch.tensor([1]), torch.tensor([last]))
    order = plain_order(8, page_elements // 16)
    first_half = ops.unpack_pages(pool, torch.tensor([last]), order, "key")
    assert torch.equal(first_half.flatten(), numbers[: page_elements // 2])
    assert not pool[0].any()


def test_region_page_ids():
    ids = ops.region_page_ids(torch.tensor([7, 2], dtype=torch.int32), 3)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [21, 22, 23, 6, 7, 8]
    assert ops.region_page_ids(torch.zeros(0, dtype=torch.int32), 3).numel() == 0
    # A 32-bit product would overflow.
    assert ops.region_page_ids(torch.tensor([2**30], dtype=torch.int32), 4).min() == 2**32


def test_ragged_page_table_example():
    table = ops.ragged_page_table(
        torch.tensor([14, 15, 16, 17]), torch.tensor([0, 1, 3]), torch.tensor([3]), 3
    )
    assert table.dtype == torch.int32
    assert table.tolist() == [[14, 6, 0], [15, 16, 7]]


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.lists(st.integers(0, 50), max_size=4, unique=True),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_ragged_page_table_against_loops(counts, tail_blocks, spare, random):
    num_streams = len(counts)
    ids = random.sample(range(1000, 2000), sum(counts))
    offsets = torch.tensor([sum(counts[:s]) for s in range(num_streams + 1)])
    width = max(counts) + len(tail_blocks) + spare
    expected = []
    for stream, count in enumerate(counts):
        start = sum(counts[:stream])
        row = ids[start : start + count]
        row += [block * num_streams + stream for block in tail_blocks]
        expected.append(row + [0] * (width - len(row)))
    actual = ops.ragged_page_table(
        torch.tensor(ids, dtype=torch.int64),
        offsets,
        torch.tensor(tail_blocks, dtype=torch.int32),
        width,
    )
    assert actual.tolist() == expected


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
        (
            lambda: ops.copy_pages(ZEROS(4, 2), torch.tensor([0, 1]), torch.tensor([2])),
            r"\(2,\) and \(1,\)",
        ),
        (
            lambda: ops.copy_pages(ZEROS(4, 2), torch.tensor([[0]]), torch.tensor([[2]])),
            r"\(1, 1\) and \(1, 1\)",
        ),
        (
            lambda: ops.ragged_page_table(
                torch.arange(3), torch.tensor([0, 1, 3]), torch.tensor([5]), 2
            ),
            "3 pages .*2",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("num_tokens", [3, 5], ids=["too_few", "too_many"])
@pytest.mark.parametrize("wrong", ["key", "value"])
def test_pack_refuses_tokens_that_do_not_fill_the_pages(num_tokens, wrong, generator):
    order = random_order(4, 6, generator)
    tokens = {"key": ZEROS(4, 6), "value": ZEROS(4, 6), wrong: ZEROS(num_tokens, 6)}
    with pytest.raises(ValueError, match=rf"\(4, 6\).*\({num_tokens}, 6\)"):
        ops.pack_pages(ZEROS(2, 48), torch.tensor([1]), **tokens, order=order)


@pytest.mark.parametrize(
    ("key_offsets", "value_offsets"),
    [
        pytest.param([[0, 1]], [[1, 2]], id="twice"),
        pytest.param([[0, 1]], [[2, 4]], id="hole"),
        pytest.param([[0, -1]], [[1, 2]], id="negative"),
    ],
)
def test_page_order_must_be_a_permutation(key_offsets, value_offsets):
    with pytest.raises(ValueError, match="not a permutation"):
        ops.PageOrder(torch.tensor(key_offsets), torch.tensor(value_offsets))


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
