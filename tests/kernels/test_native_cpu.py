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
from vllm_kvcompress.ops import native, reference_paged


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
    def prompts(self) -> tuple:
        return self.batch.rows, self.batch.block_table, self.rated, int(self.rated.max())

    def window_options(self, options: dict) -> dict:
        shape = self.batch.shape
        return {
            "layer": shape.num_layers - 1,
            "num_layers": shape.num_layers,
            "num_kv_heads": shape.num_kv_heads,
            "scale": shape.head_size**-0.5,
            **options,
        }

    def window_scores(self, pool: torch.Tensor, offsets=None, **options) -> torch.Tensor:
        return ops.window_scores(
            self.query,
            pool,
            *self.prompts,
            key_offsets=offsets,
            backend="native",
            **self.window_options(options),
        )

    def want_scores(self, **options) -> torch.Tensor:
        defaults = {
            "logits_soft_cap": 0.0,
            "reduce": "mean",
            "power": 1,
            "near_tokens": 0,
            "pool_kernel": 5,
            "lse": None,
            "sinks": None,
            "part_sums": None,
        }
        wanted = self.window_options({**defaults, **options})
        for name in ("scale", "logits_soft_cap"):
            wanted[name] = torch.tensor([wanted[name]], dtype=torch.float32)
        # Not by the front door, which keeps to sizes that Triton's kernels have.
        scales = torch.ones(self.batch.shape.num_streams)
        return reference_paged.window_scores(
            self.query[:, None], self.batch.pool, *self.prompts, scales, **wanted
        )

    def value_effect(self, pool: torch.Tensor, offsets=None) -> torch.Tensor:
        return ops.paged_value_effect(
            pool,
            self.root,
            *self.prompts,
            layer=0,
            num_layers=self.batch.shape.num_layers,
            value_offsets=offsets,
            backend="native",
        )


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
    got = scoring.window_scores(pool, order.key_offsets, reduce=reduce, near_tokens=4)
    want = scoring.want_scores(reduce=reduce, near_tokens=4)
    if reduce == "defensive":
        got = got.amax(dim=2, keepdim=True)
    check_rated(got, want, scoring.rated)


@any_order
@any_shape
def test_value_effect_of_any_page(instruction_set, shape, order):
    scoring, order = make_scoring(shape), order(shape)
    got = scoring.value_effect(in_order(scoring.batch.pool, order), order.value_offsets)
    want = torch.empty_like(got)
    arguments = (*scoring.prompts[:3], torch.ones(shape.num_streams), want)
    reference_paged.value_effect(
        scoring.batch.pool, scoring.root[None], *arguments, layer=0, num_layers=shape.num_layers
    )
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
                    scoring.rated,
                    int32(640, 640),
                    640,
                    group_reduce="max",
                    floor_at_mean=True,
                    effect=effect[-1],
                    span_kernel=11,
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


@pytest.mark.parametrize("granularity", ["page", "token"])
@any_order
@any_shape
def test_selection_is_copied_in_any_order(shape, order, granularity):
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
    counts = ops.joint_page_counts(
        scores,
        entries,
        totals.maximum(int32([num_streams])),
        int32([1], [0], [2]),
        per_page,
        backend="native",
    )
    # The middle one has no region to fill.
    counts[1] = 0
    pool = in_order(batch.pool, order)
    offsets = {"key_offsets": order.key_offsets, "value_offsets": order.value_offsets}
    arguments = (scores, entries, counts, pool, batch.rows, batch.block_table)
    page_offsets, indices = ops.select_and_compact(
        *arguments, max_region_blocks=3, granularity=granularity, **offsets, backend="native"
    )
    want_offsets, want = (torch.zeros_like(x) for x in (page_offsets, indices))
    reference_paged.select_entries(scores, entries, counts, want_offsets, want, per_page)
    assert torch.equal(page_offsets, want_offsets)
    for r, total in enumerate(want_offsets[:, -1].tolist()):
        assert torch.equal(indices[r, : total * per_page], want[r, : total * per_page])
    plain = batch.pool.clone()
    reference_paged.compact(plain, batch.rows, batch.block_table, want_offsets, want, per_page)
    assert torch.equal(bits(pool), bits(in_order(plain, order)))
    # In two steps, too.
    again = in_order(batch.pool, order)
    ops.compact(
        again,
        batch.rows,
        batch.block_table,
        page_offsets,
        indices,
        max_region_blocks=3,
        granularity=granularity,
        **offsets,
        backend="native",
    )
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
    counts = ops.joint_page_counts(scores, *arguments, backend="native")
    assert torch.equal(counts, ops.joint_page_counts(scores, *arguments, backend="reference"))
    chosen = ops.select_entries(scores, int32(width), counts, total, backend="native")
    wanted = ops.select_entries(scores, int32(width), counts, total, backend="reference")
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
        scoring.window_scores(pool, torch.zeros(16, 63, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="are not those of a page of 2048 elements"):
        scoring.value_effect(pool, torch.full((16, 64), 2048))
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
    scoring, offsets = make_scoring(shape), by_element(shape)
    arguments = (scoring.query, scoring.batch.pool, *scoring.prompts)
    options = scoring.window_options({"key_offsets": offsets.key_offsets})
    for backend in ("triton", "reference"):
        with pytest.raises(ValueError, match="plain pages only"):
            ops.window_scores(*arguments, **options, backend=backend)
        with pytest.raises(ValueError, match="plain pages only"):
            ops.compact(
                scoring.batch.pool,
                scoring.batch.rows,
                scoring.batch.block_table,
                scoring.batch.page_offsets,
                scoring.batch.page_offsets,
                max_region_blocks=0,
                key_offsets=offsets.key_offsets,
                value_offsets=offsets.value_offsets,
                backend=backend,
            )


def test_the_best_instruction_set_is_the_default():
    assert native.instruction_sets()[-1] == "portable"
    assert set(native.instruction_sets()) <= set(INSTRUCTION_SETS)
