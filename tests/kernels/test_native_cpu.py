"""The compiled CPU ops where they do more than Triton's: page orders, any sizes, threads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from closeness import assert_close
from compiled_ops import INSTRUCTION_SETS, need_compiled_ops, using
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from paged_pool import PagedBatch, Request, Shape, make_batch, random_like

from vllm_kvcompress import ops
from vllm_kvcompress.ops import native
from vllm_kvcompress.ops.move import reference as move_reference
from vllm_kvcompress.ops.select import reference as select_reference
from vllm_kvcompress.ops.window import reference as window_reference


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def instruction_set(request):
    with using(request.param):
        yield request.param


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    need_compiled_ops()


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def by_token(shape: Shape) -> ops.PageOrder:
    """Plain pages, written down."""
    offsets = torch.arange(2 * shape.block_size * shape.head_size).view(shape.block_size, -1)
    key, value = offsets.chunk(2, dim=1)
    return ops.PageOrder(key.contiguous(), value.contiguous())


def by_element(shape: Shape) -> ops.PageOrder:
    """As vLLM's CPU kernel stores keys: the tokens of one element together; values by token."""
    size = shape.block_size * shape.head_size
    key = torch.arange(size).view(shape.head_size, shape.block_size).t().contiguous()
    return ops.PageOrder(key, size + torch.arange(size).view(shape.block_size, shape.head_size))


def values_by_element(shape: Shape) -> ops.PageOrder:
    """The other way round."""
    order = by_element(shape)
    size = shape.block_size * shape.head_size
    return ops.PageOrder(order.value_offsets - size, order.key_offsets + size)


def shuffled(shape: Shape) -> ops.PageOrder:
    generator = torch.Generator().manual_seed(77)
    numbers = torch.randperm(2 * shape.block_size * shape.head_size, generator=generator)
    return ops.PageOrder(*numbers.view(2, shape.block_size, shape.head_size))


ORDERS = {
    "by token": by_token,
    "by element": by_element,
    "values by element": values_by_element,
    "shuffled": shuffled,
}
SHAPES = {
    "bfloat16, 32 tokens": Shape(block_size=32, dtype=torch.bfloat16),
    "float16, 48 tokens": Shape(block_size=48, dtype=torch.float16, group=3),
    "float32, 4 tokens of 6": Shape(block_size=4, head_size=6),
    "bfloat16, 5 tokens of 33": Shape(block_size=5, head_size=33, dtype=torch.bfloat16, group=1),
    "float32, 24 tokens of 40": Shape(block_size=24, head_size=40, num_kv_heads=3, num_layers=1),
}
any_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
any_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def in_order(pool: torch.Tensor, order: ops.PageOrder) -> torch.Tensor:
    """Plain pages [pages, b, 2 d] with their elements in another order, in the same shape."""
    key, value = pool.chunk(2, dim=2)
    moved = torch.empty_like(pool).flatten(1)
    moved[:, order.key_offsets.flatten()] = key.flatten(1)
    moved[:, order.value_offsets.flatten()] = value.flatten(1)
    return moved.view(pool.shape)


@dataclass
class Scoring:
    """Two prompts, one with a region in its row, and what the scoring ops take of them."""

    batch: PagedBatch
    query: torch.Tensor
    root: torch.Tensor
    rated: torch.Tensor

    @property
    def prompts(self) -> ops.Prompts:
        return self.batch.prompts(self.rated.tolist())

    def window_arguments(self, logits_soft_cap=0.0, **plan) -> tuple:
        shape = self.batch.shape
        logits = ops.Logits(shape.head_size**-0.5, logits_soft_cap)
        return self.prompts, shape.num_layers - 1, logits, ops.WindowPlan(**plan)

    def window_scores(self, pool: torch.Tensor, order=None, **options) -> torch.Tensor:
        pool = self.batch.paged(pool, order=order)
        arguments = self.window_arguments(**options)
        return ops.window_scores(self.query, pool, *arguments, backend="native")

    def want_scores(self, **options) -> torch.Tensor:
        # Not by the front door, which keeps to sizes that Triton's kernels have.
        return window_reference.window_scores(
            self.query[:, None], self.batch.paged(), *self.window_arguments(**options)
        )

    def value_effect(self, pool: torch.Tensor, order=None) -> torch.Tensor:
        pool = self.batch.paged(pool, order=order)
        return ops.paged_value_effect(self.root, pool, self.prompts, 0, backend="native")


def make_scoring(shape: Shape, lens=(150, 70), window=9) -> Scoring:
    requests = [
        Request(length, num_region_blocks=2 * i, boundary_block=i * length // shape.block_size)
        for i, length in enumerate(lens)
    ]
    generator = torch.Generator().manual_seed(8)
    size = (len(lens), shape.num_heads, window, shape.head_size)
    # As engines keep them: tokens of one head after another.
    query = 2 * random_like(size, shape.dtype, generator).transpose(1, 2)
    heads = (shape.num_kv_heads, shape.head_size, shape.head_size)
    root = random_like(heads, torch.float32, generator)
    rated = int32(*(length - window // 2 for length in lens))
    return Scoring(make_batch(shape, requests, "cpu"), query, root, rated)


def check_rated(got: torch.Tensor, want: torch.Tensor, rated: torch.Tensor) -> None:
    for r, num_rated in enumerate(rated.tolist()):
        exact = want[r, ..., :num_rated]
        assert_close(got[r, ..., :num_rated], exact, exact, torch.float32, ulps=64)


@pytest.mark.parametrize("reduce", ["mean", "defensive"])
@any_order
@any_shape
def test_window_scores_of_any_page(instruction_set, shape, order, reduce):
    scoring, order = make_scoring(shape), order(shape)
    pool = in_order(scoring.batch.pool, order)
    got = scoring.window_scores(pool, order, reduce=reduce, near_tokens=4)
    want = scoring.want_scores(reduce=reduce, near_tokens=4)
    if reduce == "defensive":
        got = got.amax(dim=2, keepdim=True)
    check_rated(got, want, scoring.rated)


@any_order
@any_shape
def test_value_effect_of_any_page(instruction_set, shape, order):
    scoring, order = make_scoring(shape), order(shape)
    got = scoring.value_effect(in_order(scoring.batch.pool, order), order)
    want = torch.empty_like(got)
    arguments = (scoring.batch.paged(), scoring.prompts, 0, want)
    window_reference.value_effect(scoring.root[None], *arguments)
    check_rated(got, want, scoring.rated)


def test_queries_and_pages_of_different_types(instruction_set):
    shape = Shape(dtype=torch.bfloat16, head_size=80)
    for dtype in (torch.float32, torch.float16):
        scoring = make_scoring(shape)
        scoring.query = scoring.query.to(dtype)
        check_rated(scoring.window_scores(scoring.batch.pool), scoring.want_scores(), scoring.rated)


def test_logits_far_apart(instruction_set):
    scoring = make_scoring(Shape(dtype=torch.bfloat16))
    scoring.query *= 60
    for soft_cap in (0.0, 30.0):
        got = scoring.window_scores(scoring.batch.pool, logits_soft_cap=soft_cap)
        want = scoring.want_scores(logits_soft_cap=soft_cap)
        check_rated(got, want, scoring.rated)
        # One key has nearly all of some query's attention, unless its logits are squashed.
        assert (want[0, ..., : int(scoring.rated[0])].max() > 0.1) == (soft_cap == 0)


def test_float16_pages_of_every_number(instruction_set):
    # Denormals and the largest, but no NaN.
    numbers = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    numbers = numbers[numbers.isfinite()]
    shape = Shape(num_layers=1, num_kv_heads=1, group=1, block_size=16, dtype=torch.float16)
    num_tokens = numbers.numel() // 64
    scoring = make_scoring(shape, lens=(num_tokens,), window=1)
    table = scoring.batch.block_table[0].long()
    blocks = scoring.batch.pool[table[: num_tokens // 16]]
    blocks[..., 64:] = numbers.view(-1, 16, 64)
    scoring.batch.pool[table[: num_tokens // 16]] = blocks
    scoring.root = torch.eye(64)[None].contiguous()
    got = scoring.value_effect(scoring.batch.pool)[0, 0]
    want = numbers.view(-1, 64).double().norm(dim=1).float()
    assert torch.allclose(got, want[: got.numel()], rtol=1e-6, atol=0)


def test_any_number_of_threads_gives_the_same_bits(instruction_set):
    shape = Shape(num_kv_heads=3, group=3, dtype=torch.bfloat16, block_size=32)
    scoring = make_scoring(shape, lens=(1500, 700))
    effect, scores = [], []
    counts, joint = [], []
    try:
        for num_threads in (1, 2, 3, 5):
            torch.set_num_threads(num_threads)
            effect.append(scoring.value_effect(scoring.batch.pool).nan_to_num())
            scores.append(scoring.window_scores(scoring.batch.pool, reduce="defensive"))
            for r, num_rated in enumerate(scoring.rated.tolist()):
                scores[-1][r, ..., num_rated:] = 0
                effect[-1][r, ..., num_rated:] = 0
            joint.append(
                ops.join_scores(
                    scores[-1],
                    scoring.batch.prompts(scoring.rated.tolist(), [640, 640]),
                    ops.WindowPlan(group_reduce="max", floor_at_mean=True, span_kernel=11),
                    effect=effect[-1],
                    backend="native",
                )
            )
            counts.append(
                ops.joint_page_counts(
                    joint[-1],
                    int32(640, 640),
                    int32([600], [90]),
                    int32([9], [0]),
                    backend="native",
                )
            )
    finally:
        torch.set_num_threads(1)
    for results in (scores, effect, joint, counts):
        for other in results[1:]:
            assert torch.equal(results[0], other)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("granularity", ["page", "token"])
@any_order
@any_shape
def test_selection_is_copied_in_any_order(shape, order, granularity, backend):
    order = order(shape)
    b, num_streams = shape.block_size, shape.num_streams
    requests = [
        Request(9 * b + 1, num_region_blocks=2, boundary_block=9),
        Request(4 * b, num_region_blocks=0),
        Request(8 * b, num_region_blocks=3, boundary_block=8),
    ]
    batch = make_batch(shape, requests, "cpu")
    per_page = 1 if granularity == "page" else b
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(3, num_streams, 9 * per_page, generator=generator)
    entries, totals = int32(8, 4, 7), int32([2 * num_streams], [1], [3 * num_streams])
    entries *= per_page
    shared = (totals.maximum(int32([num_streams])), int32([1], [0], [2]), per_page)
    counts = ops.joint_page_counts(scores, entries, *shared, backend=backend)
    assert torch.equal(counts, ops.joint_page_counts(scores, entries, *shared, backend="native"))
    # The middle one has no region to fill.
    counts[1] = 0
    pool = in_order(batch.pool, order)
    arguments = (scores, entries, counts, batch.paged(pool, order=order), batch.op_rows)
    options = {"max_region_blocks": 3, "granularity": granularity, "backend": backend}
    page_offsets, indices = ops.select_and_compact(*arguments, **options)
    want_offsets, want = (torch.zeros_like(x) for x in (page_offsets, indices))
    selected = (scores, entries, counts, want_offsets, want)
    select_reference.select_entries(*selected, page_size=per_page)
    assert torch.equal(page_offsets, want_offsets)
    for r, total in enumerate(want_offsets[:, -1].tolist()):
        assert torch.equal(indices[r, : total * per_page], want[r, : total * per_page])
    plain = batch.pool.clone()
    copied = (plain, batch.rows, batch.block_table, want_offsets, want)
    move_reference.compact(*copied, max_region_blocks=3, entries_per_page=per_page)
    assert torch.equal(bits(pool), bits(in_order(plain, order)))
    # In two steps, too.
    again = in_order(batch.pool, order)
    selection = (page_offsets, indices)
    ops.compact(batch.paged(again, order=order), batch.op_rows, *selection, **options)
    assert torch.equal(bits(again), bits(pool))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


@hypothesis_settings(max_examples=60)
@given(data=st.data())
def test_ties_and_special_numbers(data):
    inf, nan = float("inf"), float("nan")
    kinds = st.sampled_from([0.0, -0.0, 1.0, 1.0, 2.0, -1.0, 1e-40, -1e-40, inf, -inf, nan])
    num_streams, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    numbers = st.lists(kinds, min_size=num_streams * width, max_size=num_streams * width)
    scores = torch.tensor(data.draw(numbers)).view(1, num_streams, width)
    total = data.draw(st.integers(0, num_streams * width))
    arguments = (
        int32(width),
        int32([total]),
        int32([data.draw(st.integers(0, total // num_streams))]),
    )
    want = ops.joint_page_counts(scores, *arguments, backend="reference")
    wanted = ops.select_entries(scores, int32(width), want, total, backend="reference")
    for backend in ("native", "torch"):
        counts = ops.joint_page_counts(scores, *arguments, backend=backend)
        assert torch.equal(counts, want)
        chosen = ops.select_entries(scores, int32(width), counts, total, backend=backend)
        assert torch.equal(chosen[0], wanted[0]) and torch.equal(chosen[1], wanted[1])


def test_many_streams_and_long_rows():
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(1, 640, 3001, generator=generator) ** 8 * 500).floor()
    arguments = (scores, int32(3000), int32([40_000]), int32([7]))
    counts = ops.joint_page_counts(*arguments, backend="native")
    assert torch.equal(counts[0].long(), ops.joint_top_counts(scores[0, :, :3000], 40_000, 7))
    _, indices = ops.select_entries(scores, int32(3000), counts, 40_000, backend="native")
    assert torch.equal(indices[0].long(), ops.select_top(scores[0, :, :3000], counts[0].long()))


def test_what_would_read_or_write_elsewhere_is_refused():
    shape = Shape(num_layers=1)
    scoring = make_scoring(shape)
    pool = scoring.batch.pool
    scoring.rated[1] = 151
    with pytest.raises(RuntimeError, match="151 rated tokens of a prompt of 70"):
        scoring.window_scores(pool)
    scoring.rated[1] = 60
    scoring.batch.rows[0, 0] = 16 * scoring.batch.block_table.shape[1] + 1
    with pytest.raises(RuntimeError, match="does not fit"):
        scoring.value_effect(pool)
    scoring.batch.rows[0, 0] = 8
    scoring.rated[0] = 3
    with pytest.raises(RuntimeError, match="a prompt of 8 tokens has no window of 9"):
        scoring.window_scores(pool)
    with pytest.raises(ValueError, match="want offsets"):
        scoring.window_scores(pool, by_token(Shape(head_size=63)))
    # Not by the front door, whose page orders are whole.
    rows, rated = scoring.batch.rows, scoring.rated
    prompts = (rows, scoring.batch.block_table, rated)
    effect = torch.empty(2, 2, int(rated.max()))
    with pytest.raises(RuntimeError, match="are not those of a page of 2048 elements"):
        native.native_ops(pool).paged_value_effect(
            pool, scoring.root, *prompts, torch.full((16, 64), 2048), None, effect, 0, 1
        )
    with pytest.raises(ValueError, match="bf16, fp16 or fp32"):
        scoring.window_scores(pool.double())
    scores = torch.zeros(1, 2, 8)
    with pytest.raises(RuntimeError, match="9 entries do not fit"):
        ops.select_entries(scores, int32(9), int32([1, 1]), 2, backend="native")
    with pytest.raises(RuntimeError, match="stream 1 has 8 entries, not 9 pages"):
        ops.select_entries(scores, int32(8), int32([1, 9]), 20, backend="native")
    with pytest.raises(RuntimeError, match="3 pages of 1 entries do not fit"):
        ops.select_entries(scores, int32(8), int32([1, 2]), 2, backend="native")


def test_page_orders_are_refused_by_other_backends():
    shape = Shape()
    scoring = make_scoring(shape)
    batch = scoring.batch
    pool = batch.paged(order=by_element(shape))
    selection = (batch.page_offsets, batch.page_offsets)
    for backend in ("triton", "reference"):
        with pytest.raises(ValueError, match="plain pages only"):
            ops.window_scores(scoring.query, pool, *scoring.window_arguments(), backend=backend)
        with pytest.raises(ValueError, match="plain pages only"):
            ops.compact(pool, batch.op_rows, *selection, max_region_blocks=0, backend=backend)


def test_the_best_instruction_set_is_the_default():
    assert native.instruction_sets()[-1] == "portable"
    assert set(native.instruction_sets()) <= set(INSTRUCTION_SETS)
