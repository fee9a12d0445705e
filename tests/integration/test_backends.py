"""Every platform's backend step by step: builder, layers and compaction without a model runner.

See `engine_rig`: every layer's output is checked against attention in float64, every region and
every page offset against what the policies choose on plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cache_shapes import cache_shape

pytest.importorskip("vllm")

from cpu_side import CPUSide
from cuda_side import CUDASide
from engine_rig import METHODS, Request, Rig
from paged_pool import DEVICE
from plain_side import PlainSide
from rig_side import Side

from vllm_kvcompress.compaction import score_memory
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.vllm_integration.worker.pool import flat_pool

WINDOW = 8
SHAPES = {
    "gqa_3_to_1": cache_shape(2, 2, 3, 64, 16),
    "gqa_3_to_1_wide_pages": cache_shape(3, 2, 3, 64, 32),
    "mha_wide_pages": cache_shape(2, 2, 1, 64, 32),
    "gqa_8_to_1": cache_shape(1, 1, 8, 128, 16),
    "gqa_8_to_1_small_heads": cache_shape(2, 1, 8, 32, 16),
}
CPU_SHAPES = ("gqa_3_to_1_wide_pages", "mha_wide_pages", "gqa_8_to_1_small_heads")
CUDA_SHAPES = ("gqa_3_to_1", "mha_wide_pages", "gqa_8_to_1")
# A new platform's side has a line here, and one in `QUICK_SIDES`.
SIDES: dict[str, Side] = {
    "cpu-torch": CPUSide("torch"),
    "cpu-native": CPUSide("native"),
    "cuda-reference": CUDASide("reference"),
    "cuda-triton": CUDASide("triton"),
    "plain": PlainSide(),
}
CPU_SIDES = ("cpu-torch", "cpu-native")
# What Triton's interpreter need not run.
QUICK_SIDES = (*CPU_SIDES, "cuda-reference", "plain")
on_quick_sides = pytest.mark.parametrize("side", QUICK_SIDES, indirect=True)
# Triton's interpreter takes a minute for the larger shapes.
ON_GPU_ONLY = ("gqa_3_to_1", "mha_wide_pages") if DEVICE.type != "cuda" else ()
SKIP = pytest.mark.skip(reason="Triton's interpreter is too slow for it; runs on a GPU")


@pytest.fixture
def side(request) -> Iterator[Side]:
    """Of `SIDES`, by name."""
    chosen = SIDES[request.param]
    with chosen.guard():
        yield chosen


@pytest.fixture(params=["page", "token"])
def granularity(request):
    return request.param


def config_of(method, block, granularity="page", **options):
    options = (("granularity", granularity), *options.items())
    return KVCompressConfig(method, budget=4 * block, window=WINDOW, options=options)


def shapes_of_sides(sides):
    """(side, shape name) for the shapes that are tested there."""
    for side in sides:
        for name in CPU_SHAPES if side in CPU_SIDES else CUDA_SHAPES:
            yield side, name


def all_kinds():
    """Sides, shapes, types and whether there are sinks."""
    for side, name in shapes_of_sides(SIDES):
        if side in CPU_SIDES:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                yield side, name, dtype, False
                yield side, name, dtype, True
            continue
        marks = SKIP if side == "cuda-triton" and name in ON_GPU_ONLY else ()
        yield pytest.param(side, name, None, False, marks=marks)
    for side in ("cuda-reference", "plain"):
        yield side, "gqa_3_to_1", None, True


@pytest.mark.parametrize(
    ("side", "name", "dtype", "with_sinks"), [*all_kinds()], indirect=["side"], ids=str
)
def test_all_kinds_of_steps(monkeypatch, side, name, dtype, with_sinks, granularity):
    shape = SHAPES[name]
    block = shape.block_size
    config = config_of("ada-pyramidkv", block, granularity)
    rig = Rig(monkeypatch, side, shape, config, dtype, with_sinks)
    long, even, short, late = (
        Request("long", 10 * block + 5),
        Request("even", 8 * block),
        Request("short", block + 3),
        Request("late", 9 * block + block - 1),
    )
    # Mixed prefill; the last chunk of `long` is shorter than the window, and its boundary lies
    # in the chunk before.
    rig.step([(long, 6 * block), (short, block + 3)])
    rig.step([(long, 4 * block + 2), (short, 1), (even, 3 * block)])
    assert long.selection is None
    # Two prompts of different lengths end in one step.
    rig.step([(short, 1), (long, 3), (even, 5 * block)])
    assert long.selection is not None and even.selection is not None
    # Two compressed and a dense row beside a prompt of a single step.
    rig.step([(long, 1), (short, 1), (even, 1), (late, late.prompt_len)])
    # Several tokens over a region (a resumed request), in more pieces than one.
    rig.step([(even, 19), (late, 1), (long, 2)])
    # Tails grow over blocks.
    for _ in range(block + 2):
        rig.step([(even, 1), (late, 1), (long, 1)])
    rig.step([(late, 1), (long, 1)])
    records = rig.stats.snapshot()["requests"]
    assert {r["request_id"]: r["compressed"] for r in records} == {
        "short": False,
        "even": True,
        "long": True,
        "late": True,
    }
    # The step in which two end has the whole window of `even` only. Ops take that one first.
    ends = ["even", "long"] if rig.engine.compactor.scoring.is_fused else ["long", "even"]
    assert [r["request_id"] for r in records] == ["short", *ends, "late"]
    by_id = {r["request_id"]: r["kept_per_head"] for r in records}
    kept = sum(sum(heads) for heads in by_id["long"])
    assert kept / shape.pages_per_block == rig.geometry(long).num_kept_tokens


def finish_two_prompts(rig):
    """Two prompts in two chunks each, and what is read of them. The rig checks every step."""
    first, second = Request("first", 12 * 16 + 9), Request("second", 9 * 16)
    rig.step([(second, 50), (first, 150)])
    rig.step([(first, 12 * 16 + 9 - 150), (second, 9 * 16 - 50)])
    rig.step([(first, 1), (second, 1)])
    return first, second


@pytest.mark.parametrize("side", [*CPU_SIDES, "cuda-triton", "plain"], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_what_its_policy_chooses(monkeypatch, side, method, granularity):
    config = config_of(method, 16, granularity)
    requests = finish_two_prompts(Rig(monkeypatch, side, SHAPES["gqa_3_to_1"], config))
    assert all(request.selection is not None for request in requests)


@on_quick_sides
@pytest.mark.parametrize("method", ["span", "ada-criticalkv", "h2o"])
def test_half_precision_keeps_what_the_policy_chooses(monkeypatch, side, method, granularity):
    """As on a GPU, whose FlashAttention takes nothing else."""
    config = config_of(method, 16, granularity)
    rig = Rig(monkeypatch, side, SHAPES["gqa_3_to_1"], config, torch.bfloat16)
    assert all(request.selection is not None for request in finish_two_prompts(rig))


@on_quick_sides
@pytest.mark.parametrize("begun", [False, True], ids=["before", "in_between"])
@pytest.mark.parametrize("method", ["span", "ada-criticalkv"])
def test_new_weights_serve_a_prompt(monkeypatch, side, method, begun):
    config = config_of(method, 16, "token")
    rig, request = Rig(monkeypatch, side, SHAPES["gqa_3_to_1"], config), Request("a", 205)
    old = rig.parameters
    rig.parameters = [rig.random_parameters() for _ in old]
    if not begun:
        rig.engine.configure(config, rig.parameters)
    rig.step([(request, 100)])
    if begun:
        rig.engine.use_parameters(rig.parameters)
    # Compared with what the policy chooses by the rig's parameters.
    rig.step([(request, 105)])
    rig.step([(request, 1)])
    by_old = rig.expected_selection(request, old)
    assert not torch.equal(by_old.indices, request.selection.indices)


@on_quick_sides
@pytest.mark.parametrize(
    "method", ["snapkv", "h2o", "expected-attention", "ada-criticalkv", "span"]
)
def test_chunks_of_a_prompt_select_what_a_single_step_does(monkeypatch, side, method, granularity):
    selections = []
    for is_whole in (True, False):
        config = config_of(method, 16, granularity)
        rig = Rig(monkeypatch, side, SHAPES["gqa_3_to_1"], config)
        # A token whose query is collected may be alone on a CPU only.
        lone = 1 if rig.engine.shows_single else 2
        chunks = (205,) if is_whole else (70, 33, lone, 98 - lone, 4)
        # The same tokens, however they are cut.
        whole = rig.random_tokens(205)
        request, start = Request("a", 205), 0
        for count in chunks:
            # Blocks are handed out differently, too.
            other = Request(f"other-{start}", 20)
            part = [tuple(x[start : start + count] for x in layer) for layer in whole]
            rig.step([(request, count), (other, 20)], given={"a": part})
            start += count
        rig.step([(request, 1)])
        selections.append(request.selection)
    assert torch.equal(selections[0].num_pages, selections[1].num_pages)
    assert torch.equal(selections[0].indices, selections[1].indices)


@pytest.mark.parametrize(
    ("side", "name", "dtype"),
    [
        ("cuda-reference", "gqa_3_to_1", None),
        *((side, name, None) for side, name in shapes_of_sides(CPU_SIDES)),
        *((side, name, torch.bfloat16) for side, name in shapes_of_sides(CPU_SIDES)),
    ],
    indirect=["side"],
    ids=str,
)
def test_a_suffix_attends_to_what_was_kept(monkeypatch, side, name, dtype, granularity):
    shape = SHAPES[name]
    block = shape.block_size
    suffix = block + 5
    config = config_of("ada-snapkv", block, granularity, suffix_tokens=suffix)
    rig = Rig(monkeypatch, side, shape, config, dtype)
    # Compacted in the middle of a block, at a block's end, and never.
    odd, even, short = (
        Request("odd", 9 * block + 3 + suffix),
        Request("even", 8 * block + suffix),
        Request("short", suffix + WINDOW),
    )
    rig.step([(odd, 9 * block + 3), (short, suffix)])
    # A suffix in one chunk beside a compaction, and one in two chunks beside single tokens.
    rig.step([(short, WINDOW), (odd, suffix), (even, 8 * block)])
    rig.step([(odd, 1), (even, suffix - 1), (short, 1)])
    # Its last token is alone.
    rig.step([(even, 1), (odd, 1)])
    for _ in range(block + 2):
        rig.step([(odd, 1), (even, 1), (short, 1)])
    evicted = {r["request_id"]: r["evicted_tokens"] > 0 for r in rig.stats.snapshot()["requests"]}
    assert evicted == {"odd": True, "short": False, "even": True}


@on_quick_sides
@pytest.mark.parametrize("method", ["snapkv", "span"])
def test_a_preempted_request_compacts_again(monkeypatch, side, method, granularity):
    config = config_of(method, 16, granularity)
    rig = Rig(monkeypatch, side, SHAPES["gqa_3_to_1"], config)
    first, other = Request("a", 200), Request("b", 180)
    rig.step([(first, 200)])
    rig.step([(first, 1), (other, 180)])
    rig.engine.forget(["a"])
    again = Request("a", 200)
    rig.step([(other, 1), (again, 150)])
    # The chunk holds the rest of the prompt and three tokens that were generated before.
    rig.step([(other, 1), (again, 53)])
    rig.step([(again, 1), (other, 1)])
    snapshot = rig.stats.snapshot()
    assert {r["request_id"]: r["num_prefills"] for r in snapshot["requests"]} == {"a": 2, "b": 1}
    assert snapshot["totals"]["prompts"] == 2
    assert snapshot["totals"]["recomputed_prompts"] == 1
    rig.engine.forget(["a", "b"])
    assert len(rig.engine.requests) == 0


@on_quick_sides
def test_rows_of_the_page_offsets_are_given_back(monkeypatch, side):
    rig = Rig(monkeypatch, side, SHAPES["gqa_8_to_1"], config_of("snapkv", 16))
    for i in range(20):
        request = Request(f"r{i}", 100 + i)
        rig.step([(request, request.prompt_len)])
        rig.step([(request, 1)])
        rig.engine.forget([request.name])
        rig.free += request.row
    assert len(rig.engine.requests) == 0


@on_quick_sides
def test_prompts_are_compacted_in_batches_that_fit_memory(monkeypatch, side):
    rig = Rig(monkeypatch, side, SHAPES["gqa_8_to_1"], config_of("span", 16, "token"))
    requests = [Request(f"r{n}", n) for n in (150, 230, 160, 155)]
    sizes, batch = [], rig.engine.compactor.batch

    def count(prompts, *args):
        sizes.append([prompt.geometry.prompt_len for prompt in prompts])
        return batch(prompts, *args)

    monkeypatch.setattr(rig.engine.compactor, "batch", count)
    # Room for two of the short ones, and less than the long one takes.
    limit = 2 * rig.engine.compactor.memory.prompt_bytes(rig.geometry(requests[2]))
    monkeypatch.setattr(score_memory, "MOST_SCORE_BYTES", limit)
    rig.step([(request, request.prompt_len) for request in requests])
    assert sizes == [[150, 160], [155], [230]]
    rig.step([(request, 1) for request in requests])
    assert rig.stats.snapshot()["totals"]["compressed_prompts"] == 4


@on_quick_sides
def test_going_on_without_compaction_is_refused(monkeypatch, side):
    rig = Rig(monkeypatch, side, SHAPES["gqa_8_to_1"], config_of("snapkv", 16))
    request = Request("a", 100, num_computed=100)
    with pytest.raises(RuntimeError, match="never compacted here"):
        rig.metadata([(request, 1)])


def one_shot_cases():
    """Sides, shapes, types and whether there are sinks."""
    for side, name in shapes_of_sides(CPU_SIDES):
        for with_sinks in (False, True):
            yield side, name, None, with_sinks
            if name == "gqa_3_to_1_wide_pages":
                yield side, name, torch.bfloat16, with_sinks
    yield "cuda-reference", "gqa_3_to_1", None, False


@pytest.mark.parametrize(
    ("side", "name", "dtype", "with_sinks"), [*one_shot_cases()], indirect=["side"], ids=str
)
@pytest.mark.parametrize("method", ["span", "ada-criticalkv", "h2o"])
def test_one_shot_prompts_beside_all_kinds_of_rows(
    monkeypatch, side, name, dtype, with_sinks, method, granularity
):
    """Their regions are checked like those of prompts that have blocks for all they compute."""
    shape = SHAPES[name]
    block = shape.block_size
    config = config_of(method, block, granularity)
    rig = Rig(monkeypatch, side, shape, config, dtype, with_sinks)
    one, two = (
        Request("one", 9 * block + 7, is_one_shot=True),
        Request("two", 8 * block, is_one_shot=True),
    )
    short, old, late = (
        Request("short", 20),
        Request("old", 7 * block + 1),
        Request("late", 8 * block + 3),
    )
    rig.step([(old, old.prompt_len), (short, 10)])
    # Dense and one-shot rows in turn; prompts of both kinds end together.
    rig.step(
        [(one, one.prompt_len), (old, 1), (late, late.prompt_len), (two, 8 * block), (short, 10)]
    )
    for _ in range(block + 1):
        rig.step([(one, 1), (two, 1), (late, 1), (short, 1), (old, 1)])
    # Computed again ahead of a single token; two tokens that were generated before follow.
    rig.engine.forget(["two"])
    again = Request("two", 8 * block, is_one_shot=True)
    rig.step([(again, 8 * block), (one, 1)])
    rig.step([(again, 2), (one, 1), (old, 7)])
    rig.step([(one, 1), (again, 1), (old, 1)])
    records = {r["request_id"]: r for r in rig.stats.snapshot()["requests"]}
    staged = {name for name, record in records.items() if record["one_shot"]}
    assert staged == {"one", "two"}
    assert records["two"]["num_prefills"] == 2
    blocks = ("blocks_returned", "blocks_not_taken")
    spared = {n: tuple(records[n][b] for b in blocks) for n in ("one", "late")}
    first_kept = {r.name: rig.geometry(r).first_kept_block for r in (one, late)}
    assert spared == {"one": (0, first_kept["one"]), "late": (first_kept["late"], 0)}


@on_quick_sides
def test_a_suffix_follows_a_one_shot_prompt(monkeypatch, side):
    config = config_of("span", 16, suffix_tokens=20)
    rig = Rig(monkeypatch, side, SHAPES["gqa_3_to_1"], config)
    request = Request("a", 200, is_one_shot=True)
    rig.step([(request, 180)])
    rig.step([(request, 20)])
    rig.step([(request, 1)])
    (record,) = rig.stats.snapshot()["requests"]
    assert record["one_shot"] and record["evicted_tokens"] > 0


@on_quick_sides
def test_nothing_evicted_is_written_to_the_pool(monkeypatch, side):
    rig = Rig(monkeypatch, side, SHAPES["gqa_3_to_1"], config_of("span", 16))
    request = Request("a", 200, is_one_shot=True)
    rig.step([(request, 200)])
    geometry = rig.geometry(request)
    written = (~rig.buffer.isnan()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    assert sorted(written) == sorted(request.row[geometry.first_kept_block :])


@on_quick_sides
def test_a_one_shot_prompt_that_is_not_whole_is_refused(monkeypatch, side):
    rig = Rig(monkeypatch, side, SHAPES["gqa_3_to_1"], config_of("span", 16))
    request = Request("a", 200, is_one_shot=True)
    with pytest.raises(RuntimeError, match="computes tokens 0 to 150 of 200"):
        rig.metadata([(request, 150)])


def test_pool_views_that_are_no_slices_of_one_buffer_are_refused():
    shape = SHAPES["mha_wide_pages"]
    separate = [torch.zeros(4, 2, 32, 128) for _ in range(2)]
    with pytest.raises(RuntimeError, match="not a slice of one"):
        flat_pool(separate, shape)
