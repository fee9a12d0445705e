"""Results of every kernel are the same to the bit, in whatever order its programs run.

Runs in Triton's interpreter only: a GPU does not let itself be told an order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from gpu.recording import record
from paged_pool import DEVICE, Request, Shape, compressed, make_batch, random_like
from shuffled_grid import interleaved_grid, shuffled_grid

from vllm_kvcompress import ops, triton_kernels

pytestmark = pytest.mark.skipif(
    not triton_kernels.is_interpreted(), reason="needs Triton's interpreter"
)

BASE = Shape(group=2, dtype=torch.float32)
# (how, seed): each is a run of the interpreter as long as the one in ascending order.
ORDERS = ((shuffled_grid, 0), (shuffled_grid, 1), (interleaved_grid, 2))
MANY_ORDERS = tuple(
    (change, seed) for change in (shuffled_grid, interleaved_grid) for seed in range(9)
)
Run = Callable[[], tuple[torch.Tensor, ...]]


@pytest.fixture(autouse=True)
def labels():
    """None here: labels and shuffled grids both stand in the interpreter's place."""


@pytest.fixture(autouse=True)
def same_garbage(monkeypatch):
    """What nobody writes is the same each time, and no number that would do."""

    def filled(allocate):
        def allocate_filled(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 113)

        return allocate_filled

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def bits(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [tensor.contiguous().view(torch.uint8) for tensor in tensors]


def orders_that_change(run: Run, orders=ORDERS) -> list[str]:
    """Which orders of programs give other bits than the ascending one."""
    want = bits(run())
    differing = []
    for change, seed in orders:
        with change(seed) as launches:
            got = bits(run())
        assert launches.has_shuffled
        assert launches.num_switches > 0 or change is shuffled_grid
        if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
            differing.append(f"{change.__name__}({seed})")
    return differing


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def ragged_requests(shape: Shape, query_len: int) -> list[Request]:
    """Dense, ragged and empty rows, one of them long enough for several programs to share."""
    b = shape.block_size
    return [
        Request(seq_len=13 * b + 5, query_len=query_len),
        compressed(shape, 8 * b + 3, 3, 8 * b + 3 + query_len, query_len=query_len, seed=1),
        Request(0, query_len=0),
        compressed(shape, 9 * b + 1, 2, 11 * b + 1, query_len=query_len, window=b + 2, seed=4),
    ]


def decode(
    query_len: int = 1,
    shape: Shape = BASE,
    requests: list[Request] | None = None,
    num_programs: int = 11,
    sinks: torch.Tensor | None = None,
) -> Run:
    """Both kernels; streams are cut into many pieces, which the last program to end merges."""
    batch = make_batch(shape, requests or ragged_requests(shape, query_len), "cpu")

    def run() -> tuple[torch.Tensor, ...]:
        work = ops.new_decode_work(
            len(batch.requests),
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            group=shape.group,
            head_size=shape.head_size,
            pool_dtype=shape.dtype,
            device=DEVICE,
            max_query_len=query_len,
            num_programs=num_programs,
        )
        work = replace(work, tiles=replace(work.tiles, least_tiles=1))
        heads, b = shape.num_kv_heads, shape.block_size
        ops.decode_work(batch.op_rows, num_kv_heads=heads, block_size=b, out=work)
        outs = [
            ops.ragged_decode(
                batch.query,
                batch.paged(),
                batch.op_rows,
                layer,
                ops.Logits(0.125, sinks=sinks),
                max_query_len=query_len,
                work=work,
            )
            for layer in range(shape.num_layers)
        ]
        lists = (work.tile_starts, work.num_tiles, work.first_streams)
        return (*outs, *lists, work.tickets, work.pieces, work.piece_lse)

    return run


def slots() -> Run:
    batch = make_batch(BASE, [Request(20 + i, query_len=i % 7) for i in range(90)], "cpu")
    num_tokens = int(batch.query_start_loc[-1]) + 150
    return lambda: (ops.token_slots(batch.op_rows, num_tokens, 16),)


def prompts():
    """Two dense prompts, one with a region in its row, and window queries of two layers."""
    boundary = 100 // BASE.block_size
    requests = [Request(190), Request(100, num_region_blocks=2, boundary_block=boundary)]
    batch = make_batch(BASE, requests, "cpu")
    generator = torch.Generator().manual_seed(9)
    query = 2 * random_like((2, 2, 12, BASE.num_heads, 64), BASE.dtype, generator)
    return batch, query


def score(with_lse: bool = False, **plan) -> Run:
    batch, query = prompts()
    # Whether it fits these queries does not matter here.
    lse = (
        torch.linspace(2.0, 9.0, 2 * 2 * 12 * BASE.num_heads).view(2, 2, 12, -1)
        if with_lse
        else None
    )
    return lambda: (
        ops.window_scores(
            query,
            batch.paged(),
            batch.prompts([178, 88]),
            0,
            ops.Logits(0.125),
            ops.WindowPlan(**plan),
            lse=lse,
        ),
    )


def effect() -> Run:
    batch, _ = prompts()
    root = random_like((2, 2, 64, 64), BASE.dtype, torch.Generator().manual_seed(3))
    arguments = (root, batch.paged(), batch.prompts([178, 88]), 0)
    return lambda: (ops.paged_value_effect(*arguments),)


def join(num_groups: int = 3, page_reduce: str = "max", **steps) -> Run:
    """Of two layers of one head."""
    generator = torch.Generator().manual_seed(4)
    scores = random_like((2, 2, num_groups, 1100), torch.float32, generator).abs()
    values = random_like((2, 2, 1100), torch.float32, generator).abs()
    rows = ops.Rows(int32([]), int32([]))
    prompts = ops.Prompts(rows, int32([1100, 290]), int32([1088, 256]), 1100, 1088)
    plan, options = ops.WindowPlan(**steps), {"effect": values, "num_kv_heads": 1}
    if plan.floor_at_mean:
        size = (2, 2, ops.num_score_parts(1100, 5))
        options["part_sums"] = random_like(size, torch.float32, generator).abs()
    return lambda: (ops.join_scores(scores, prompts, plan, page_reduce=page_reduce, **options),)


def tied_scores() -> torch.Tensor:
    """[2, 4, 1100], of which only 40 are different."""
    scores = torch.rand((2, 4, 1100), generator=torch.Generator().manual_seed(5))
    return (scores * 40).floor() / 40


def counts(totals: list[list[int]], page_size: int = 1) -> Run:
    scores, entries = tied_scores(), int32([1088, 320])
    sure = torch.ones_like(int32(totals))
    return lambda: (ops.joint_page_counts(scores, entries, int32(totals), sure, page_size),)


def select(page_size: int) -> Run:
    scores, entries = tied_scores(), int32([1088, 320])
    num_pages = int32([[0, 1, 60, 3], [20, 2, 0, 1]])
    return lambda: ops.select_entries(scores, entries, num_pages, 64, page_size)


def compact(granularity: str) -> Run:
    shape = Shape(dtype=torch.bfloat16)
    b, streams = shape.block_size, shape.num_streams
    requests = [
        Request(9 * b + 3, num_region_blocks=3, boundary_block=9),
        Request(7 * b),
        Request(11 * b + 1, num_region_blocks=2, boundary_block=11),
    ]
    batch = make_batch(shape, requests, "cpu")
    entries_per_page = 1 if granularity == "page" else b
    scores = torch.rand((3, streams, 7 * b), generator=torch.Generator().manual_seed(6))
    num_pages = int32([[6, 0, 5, 1], [0] * 4, [1, 4, 2, 1]])
    entries = int32([7 * entries_per_page] * 3)
    selection = ops.select_entries(scores, entries, num_pages, 3 * streams, entries_per_page)

    def run() -> tuple[torch.Tensor, ...]:
        pool = batch.pool.clone()
        ops.compact(
            batch.paged(pool),
            batch.op_rows,
            *selection,
            max_region_blocks=3,
            granularity=granularity,
        )
        return (pool,)

    return run


def move() -> Run:
    generator = torch.Generator().manual_seed(2)
    source = random_like((120, 2048), torch.bfloat16, generator)
    source_index = torch.randint(-10, 120, (90,), generator=generator)
    target_index = torch.randperm(150, generator=generator)[:90]

    def run() -> tuple[torch.Tensor, ...]:
        target = torch.zeros(150, 2048, dtype=torch.bfloat16)
        ops.move_entries(source, source_index, target, target_index)
        return (target,)

    return run


CASES: dict[str, Callable[[], Run]] = {
    "ragged_decode": decode,
    "ragged_decode, 3 queries, sinks": lambda: decode(
        3, sinks=torch.linspace(-3, 5, BASE.num_heads)
    ),
    "token_slots": slots,
    **{
        f"window_scores, {kind}": lambda kind=kind: score(True, reduce=kind)
        for kind in ("mean", "max")
    },
    "window_scores, sum of squares": lambda: score(True, reduce="sum", power=2),
    "window_scores, defensive": lambda: score(reduce="defensive", near_tokens=8),
    "window_scores, defensive, lse given": lambda: score(True, reduce="defensive"),
    "value_effect": effect,
    "join_scores, SnapKV": lambda: join(pool_kernel=7),
    "join_scores, span": lambda: join(
        1, "rms", group_reduce="max", floor_at_mean=True, span_kernel=11
    ),
    "joint_page_counts": lambda: counts([[300], [90]]),
    "joint_page_counts, two groups": lambda: counts([[300, 20], [90, 90]]),
    "joint_page_counts of tokens": lambda: counts([[30], [9]], 16),
    "select_entries": lambda: select(1),
    "select_entries of tokens": lambda: select(16),
    "compact": lambda: compact("page"),
    "compact of tokens": lambda: compact("token"),
    "move_entries": move,
}


@pytest.mark.parametrize("case", CASES)
def test_results_do_not_depend_on_the_order_of_programs(case):
    assert orders_that_change(CASES[case]()) == []


def test_decoding_is_cut_into_pieces_in_these_cases():
    *_, tickets, _, piece_lse = decode()()
    assert (~piece_lse.isnan()).sum() > piece_lse.numel() / 2
    assert not tickets.any()


def test_pieces_are_there_when_they_are_merged():
    """One stream, and a piece from every program, each interrupted between any two steps."""
    shape = Shape(num_layers=2, num_kv_heads=1, group=1, dtype=torch.float32)
    run = decode(shape=shape, requests=[Request(12 * 32 - 5)], num_programs=12)
    assert orders_that_change(run, [(interleaved_grid, seed) for seed in range(12)]) == []


def test_every_kernel_of_the_package_is_among_the_cases():
    package = triton_kernels.__name__ + "."
    modules = [module for name, module in sys.modules.items() if name.startswith(package)]
    every = {name.strip("_") for module in modules for name in vars(module) if is_kernel(name)}
    launched = {launch.name for case in CASES.values() for launch in record(case())}
    assert launched == every


def is_kernel(name: str) -> bool:
    return name.endswith("_kernel")


@triton.jit
def _sum_of_earlier_kernel(out_ptr, x_ptr):
    """Planted: a program adds to what the one before it has written."""
    i = tl.program_id(0)
    before = tl.load(out_ptr + i)
    tl.store(out_ptr + i + 1, before + tl.load(x_ptr + i))


@triton.jit
def _last_merges_kernel(out_ptr, partial_ptr, x_ptr, TILE: tl.constexpr, NUM: tl.constexpr):
    """Planted: the program with the last number merges, as if it were the last to end."""
    i = tl.program_id(0)
    part = tl.sum(tl.load(x_ptr + i * TILE + tl.arange(0, TILE)), axis=0)
    tl.store(partial_ptr + i, part)
    if i == NUM - 1:
        tl.store(out_ptr, tl.sum(tl.load(partial_ptr + tl.arange(0, NUM)), axis=0))


@triton.jit
def _float_sum_kernel(out_ptr, x_ptr):
    """Planted: the order of additions decides how they are rounded."""
    tl.atomic_add(out_ptr, tl.load(x_ptr + tl.program_id(0)))


@triton.jit
def _early_ticket_kernel(
    out_ptr, ticket_ptr, partial_ptr, x_ptr, TILE: tl.constexpr, NUM: tl.constexpr
):
    """Planted: a ticket is drawn before what it vouches for is written."""
    i = tl.program_id(0)
    part = tl.sum(tl.load(x_ptr + i * TILE + tl.arange(0, TILE)), axis=0)
    ticket = tl.atomic_add(ticket_ptr, 1)
    tl.store(partial_ptr + i, part)
    if ticket == NUM - 1:
        tl.store(out_ptr, tl.sum(tl.load(partial_ptr + tl.arange(0, NUM)), axis=0))


@triton.jit
def _ticket_kernel(out_ptr, ticket_ptr, partial_ptr, x_ptr, TILE: tl.constexpr, NUM: tl.constexpr):
    """As it should be: the last program to have written merges."""
    i = tl.program_id(0)
    part = tl.sum(tl.load(x_ptr + i * TILE + tl.arange(0, TILE)), axis=0)
    tl.store(partial_ptr + i, part)
    ticket = tl.atomic_add(ticket_ptr, 1)
    if ticket == NUM - 1:
        tl.store(out_ptr, tl.sum(tl.load(partial_ptr + tl.arange(0, NUM)), axis=0))


NUM_PROGRAMS, TILE = 16, 8
INPUT = torch.rand(NUM_PROGRAMS * TILE, generator=torch.Generator().manual_seed(7)) ** 9


def earlier() -> tuple[torch.Tensor, ...]:
    out = torch.zeros(NUM_PROGRAMS + 1)
    _sum_of_earlier_kernel[(NUM_PROGRAMS,)](out, INPUT)
    return (out,)


def last_merges() -> tuple[torch.Tensor, ...]:
    out, partial = torch.zeros(1), torch.zeros(NUM_PROGRAMS)
    _last_merges_kernel[(NUM_PROGRAMS,)](out, partial, INPUT, TILE=TILE, NUM=NUM_PROGRAMS)
    return (out,)


def float_sum() -> tuple[torch.Tensor, ...]:
    out = torch.zeros(1)
    _float_sum_kernel[(NUM_PROGRAMS * TILE,)](out, INPUT)
    return (out,)


def ticketed(kernel) -> Run:
    def run() -> tuple[torch.Tensor, ...]:
        out, partial = torch.zeros(1), torch.zeros(NUM_PROGRAMS)
        ticket = torch.zeros(1, dtype=torch.int32)
        kernel[(NUM_PROGRAMS,)](out, ticket, partial, INPUT, TILE=TILE, NUM=NUM_PROGRAMS)
        return (out,)

    return run


@pytest.mark.parametrize("planted", [earlier, last_merges, float_sum])
def test_a_kernel_that_needs_an_order_is_noticed(planted):
    differing = orders_that_change(planted, MANY_ORDERS)
    assert any(order.startswith("shuffled") for order in differing)
    assert any(order.startswith("interleaved") for order in differing)


def test_a_ticket_drawn_too_early_is_noticed():
    """Only where programs are interrupted: one after another, whoever draws last is the last."""
    differing = orders_that_change(ticketed(_early_ticket_kernel), MANY_ORDERS)
    assert len(differing) >= 2
    assert all(order.startswith("interleaved") for order in differing)
    assert orders_that_change(ticketed(_ticket_kernel), MANY_ORDERS) == []


@triton.jit
def _failing_kernel(out_ptr):
    tl.store(out_ptr + tl.program_id(0), nobody_knows)  # noqa: F821


@pytest.mark.parametrize("change", [shuffled_grid, interleaved_grid])
def test_what_a_program_raises_is_raised(change):
    with change(0), pytest.raises(Exception, match="nobody_knows"):
        _failing_kernel[(4,)](torch.zeros(4))
