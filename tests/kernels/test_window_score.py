"""Window scores, and all steps from queries to pages, against the float64 references."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from closeness import assert_close
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from paged_pool import DEVICE, Shape, random_like
from window_cases import int32, plan_of, prompts, window_lse, window_query

from vllm_kvcompress import ops
from vllm_kvcompress.ops.rows_reference import prompt_entries

BASE = Shape()


def check_scores(
    backend: str,
    shape: Shape,
    lens: tuple[int, ...],
    num_rated: tuple[int, ...],
    window: int,
    with_lse: bool = False,
    **options,
) -> None:
    batch = prompts(shape, lens)
    query = window_query(shape, len(lens), window)
    layer, scale = shape.num_layers - 1, shape.head_size**-0.5
    if with_lse:
        options["lse"] = window_lse(batch, query, layer, scale, options.get("sinks"))
    lse, plan = options.pop("lse", None), plan_of(options)
    pool = batch.paged(key_scale=options.pop("key_scale", None))
    arguments = (query, pool, batch.prompts(num_rated), layer, ops.Logits(scale, **options), plan)
    got = ops.window_scores(*arguments, lse=lse, backend=backend)
    want = ops.window_scores(*arguments, lse=lse, backend="reference")
    if plan.reduce == "defensive":
        got = got.amax(dim=2, keepdim=True)
    for r, rated_here in enumerate(num_rated):
        # Inputs are multiplied exactly and summed in float32.
        exact = want[r, ..., :rated_here]
        assert_close(got[r, ..., :rated_here], exact, exact, torch.float32, ulps=64)


CASES = {
    "float32": (Shape(dtype=torch.float32), 16),
    "bfloat16": (Shape(dtype=torch.bfloat16), 16),
    "head size 80, group 3": (Shape(head_size=80, group=3, dtype=torch.float16), 8),
    "head size 96, window 32": (Shape(head_size=96, group=1), 32),
    "head size 128, block size 32": (Shape(head_size=128, block_size=32, num_layers=1), 16),
    "head size 256, block size 128": (Shape(head_size=256, block_size=128, num_kv_heads=1), 5),
    "group 16 in several tiles": (Shape(group=16, num_kv_heads=1, num_layers=1), 16),
    "group 16 of head size 256": (Shape(head_size=256, group=16, num_kv_heads=1, num_layers=1), 9),
    "group 5 in several tiles, window 64": (Shape(group=5, num_kv_heads=1, num_layers=1), 64),
}


@pytest.mark.parametrize("reduce", ["mean", "defensive"])
@pytest.mark.parametrize(("shape", "window"), CASES.values(), ids=CASES)
def test_matches_reference(scorer, shape, window, reduce):
    lens = (150, 3 * shape.block_size + window, window + 1)
    check_scores(
        scorer, shape, lens, (150 - window, 3 * shape.block_size, 1), window, reduce=reduce
    )


@pytest.mark.parametrize("loudness", [14, 16, 18])
@pytest.mark.parametrize("with_lse", [False, True])
def test_keys_that_hardly_anybody_looks_at_do_not_win(scorer, with_lse, loudness):
    # All but a millionth of the attention is on keys that are not rated, and what is left on the
    # last rated one. In float32 the others' sum does not tell what it has, nor what pooling takes.
    shape, window, num_rated = Shape(group=8, dtype=torch.float32, num_layers=1), 16, 100
    batch = prompts(shape, (300,))
    generator = torch.Generator(DEVICE).manual_seed(1)
    direction = random_like((shape.head_size,), torch.float32, generator)
    query = 0.3 * random_like((1, window, shape.num_heads, shape.head_size), shape.dtype, generator)
    query += direction
    scale = shape.head_size**-0.5
    key = direction * loudness / (direction.square().sum() * scale)
    for position in range(300):
        block = int(batch.block_table[0, position // shape.block_size])
        pages = slice(block * shape.num_streams, (block + 1) * shape.num_streams)
        keys = batch.pool[pages, position % shape.block_size, : shape.head_size]
        if position < num_rated - 1:
            keys *= 0.1
        else:
            keys[:] = key if position >= num_rated else 0.45 * key
    plan = ops.WindowPlan(reduce="defensive")
    arguments = (query, batch.paged(), batch.prompts([num_rated]), 0, ops.Logits(scale), plan)
    lse = window_lse(batch, query, 0, scale) if with_lse else None
    want = ops.window_scores(*arguments, lse=lse, backend="reference").amax(dim=2)
    got = ops.window_scores(*arguments, lse=lse, backend=scorer).amax(dim=2)
    assert (got.amax(dim=2) <= 2 * want.amax(dim=2)).all()
    if not with_lse:
        torch.testing.assert_close(got, want.float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"reduce": "sum"},
        {"reduce": "max"},
        {"reduce": "sum", "power": 2},
        {"reduce": "mean", "near_tokens": 3},
        {"reduce": "defensive", "near_tokens": 8},
        {"reduce": "defensive", "mean_kernel": 1},
        {"reduce": "defensive", "mean_kernel": 9, "near_tokens": 20},
    ],
    ids=str,
)
def test_reductions(scorer, options, with_lse):
    # Keys of the window itself are rated, and every length around a tile's.
    check_scores(scorer, BASE, (64, 200, 129), (60, 192, 128), 12, with_lse, **options)


def test_soft_cap_and_scales(scorer):
    scales = torch.linspace(0.5, 2.0, BASE.num_streams, device=DEVICE)
    check_scores(scorer, BASE, (90,), (80,), 8, soft_cap=3.0, key_scale=scales)


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("reduce", ["mean", "defensive"])
@pytest.mark.parametrize("group", [4, 5])
def test_sinks(scorer, reduce, with_lse, group):
    shape = Shape(group=group)
    # Below all logits, among them, and far above them.
    sinks = torch.linspace(-30.0, 30.0, shape.num_heads, device=DEVICE)
    check_scores(scorer, shape, (90, 40), (80, 30), 8, with_lse, reduce=reduce, sinks=sinks)


@pytest.mark.parametrize("pool_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_pool(pool_dtype):
    shape = Shape(dtype=torch.bfloat16, pool_dtype=pool_dtype)
    check_scores("triton", shape, (90, 40), (80, 16), 8, reduce="defensive")


@pytest.mark.gpu
@pytest.mark.parametrize("reduce", ["mean", "defensive"])
def test_long_prompts(scorer, reduce):
    shape = Shape(num_kv_heads=8, head_size=128, num_layers=4, dtype=torch.bfloat16)
    check_scores(scorer, shape, (8192, 5000, 33), (8160, 4960, 16), 32, reduce=reduce)


class Layers:
    """Layers 1 and 2 of three, which differ in all that layers may differ in."""

    shape = Shape(num_layers=3, num_kv_heads=2, group=3)
    first, num_layers, window = 1, 2, 12
    rated, candidates = (138, 73, 28), (128, 64, 16)

    def __init__(self, reduce: str, with_lse: bool) -> None:
        shape, size = self.shape, (self.num_layers, self.shape.num_heads)
        self.batch = prompts(shape, (150, 90, 40))
        # As engines keep them: layers apart, prompts of a layer together.
        generator = torch.Generator(DEVICE).manual_seed(2)
        kept = (self.num_layers, 3, self.window, shape.num_heads, shape.head_size)
        self.query = 2.0 * random_like(kept, shape.dtype, generator).transpose(0, 1)
        self.scale = torch.tensor([0.1, 0.2], device=DEVICE)
        self.sinks = torch.linspace(-5.0, 5.0, size[0] * size[1], device=DEVICE).view(size)
        self.sinks[1, :4] = float("-inf")
        self.lse, self.soft_cap = None, torch.tensor([0.0, 4.0], device=DEVICE)
        if with_lse:
            # The test's own knows of no cap.
            self.soft_cap = 0.0
            lses = [
                window_lse(self.batch, self.query[:, i], 1 + i, float(self.scale[i]), self.sinks[i])
                for i in range(self.num_layers)
            ]
            self.lse = torch.stack(lses).transpose(0, 1)
        roots = (3, 2, shape.head_size, shape.head_size)
        self.roots = random_like(roots, shape.dtype, generator)[self.first :]
        self.key_scale = torch.linspace(0.9, 1.1, shape.num_streams, device=DEVICE)
        if with_lse:
            self.key_scale = None
        self.reduce = reduce

    def scores(self, backend: str, layers: slice, out: torch.Tensor) -> None:
        """Everything from queries to pages, of some of the two layers."""
        num_layers, soft_cap, part_sums = layers.stop - layers.start, self.soft_cap, None
        prompts = self.batch.prompts(self.rated, self.candidates)
        where = (self.batch.paged(key_scale=self.key_scale), prompts, self.first + layers.start)
        plan = ops.WindowPlan(
            reduce=self.reduce,
            near_tokens=3,
            group_reduce="max",
            floor_at_mean=self.reduce == "defensive",
            span_kernel=11,
        )
        logits = ops.Logits(
            self.scale[layers],
            soft_cap if isinstance(soft_cap, float) else soft_cap[layers],
            self.sinks[layers],
        )
        if self.reduce == "defensive":
            num_parts = ops.num_score_parts(max(self.rated), 5)
            part_sums = torch.empty(3, num_layers * 2, num_parts, device=DEVICE)
        scores = ops.window_scores(
            self.query[:, layers],
            *where,
            logits,
            plan,
            lse=None if self.lse is None else self.lse[:, layers],
            part_sums=part_sums,
            backend=backend,
        )
        effect = ops.paged_value_effect(self.roots[layers], *where, backend=backend)
        ops.join_scores(
            scores,
            prompts,
            plan,
            effect=effect,
            page_reduce="mean",
            num_kv_heads=self.shape.num_kv_heads,
            part_sums=part_sums,
            out=out,
            backend=backend,
        )

    def all_scores(self, backend: str, num_together: int) -> list[torch.Tensor]:
        """Per prompt [4, pages] scores of both layers."""
        room = torch.full((3, 6, 16), float("nan"), device=DEVICE)
        for start in range(0, self.num_layers, num_together):
            end = start + num_together
            self.scores(backend, slice(start, end), room[:, 2 + 2 * start : 2 + 2 * end, :8])
        assert room[:, :2].isnan().all() and room[..., 8:].isnan().all()
        return [room[r, 2:, : n // 16] for r, n in enumerate(self.candidates)]


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("reduce", ["mean", "defensive"])
def test_layers_together_get_what_each_gets_alone(reduce, with_lse):
    layers = Layers(reduce, with_lse)
    together, alone = layers.all_scores("triton", 2), layers.all_scores("triton", 1)
    for got, want, exact in zip(together, alone, layers.all_scores("reference", 2), strict=True):
        assert torch.equal(got, want)
        assert_close(got, exact, exact, torch.float32, ulps=128)


@pytest.mark.parametrize("num_parts", [9, 40])
def test_part_sums_are_of_all_scores(num_parts):
    """Whatever the longest prompt is, and however the tiles are shared among programs."""
    batch = prompts(BASE, (num_parts * 60 + 8, 70))
    query, rated = window_query(BASE, 2, 8), (num_parts * 60 - 1, 61)
    part_sums = torch.full((2, 4, num_parts), float("nan"), device=DEVICE)
    query = torch.stack([query, -query], dim=1)
    plan = ops.WindowPlan(reduce="defensive")
    arguments = (query, batch.paged(), batch.prompts(rated), 0, ops.Logits(0.125), plan)
    scores = ops.window_scores(*arguments, part_sums=part_sums)
    for r, n in enumerate(rated):
        want = scores[r, :, 0, :n].double().sum(dim=1)
        torch.testing.assert_close(part_sums[r].double().sum(dim=1), want, rtol=1e-5, atol=0)
        parts = [p.sum(dim=1) for p in scores[r, :, 0, :n].split(60, dim=1)]
        expected = torch.zeros_like(part_sums[r])
        expected[:, : len(parts)] = torch.stack(parts, dim=1)
        torch.testing.assert_close(part_sums[r], expected)


def test_same_as_the_policies_steps(scorer):
    """The fused steps of span give what the scorer on the CPU gives."""
    from vllm_kvcompress.policies.base import ScoreInputs
    from vllm_kvcompress.policies.scorers.span import Span

    window, num_tokens, num_candidates = 16, 150, 128
    shape = Shape(dtype=torch.float32)
    batch = prompts(shape, (num_tokens,))
    query = window_query(shape, 1, window)
    generator = torch.Generator(DEVICE).manual_seed(3)
    root = random_like((2, 64, 64), torch.float32, generator)
    got = ops.planned_scores(
        Span().window_plan(),
        query,
        batch.paged(),
        batch.prompts([num_tokens - window], [num_candidates]),
        0,
        ops.Logits(0.125),
        output_root=root,
        page_reduce=None,
        backend=scorer,
    )
    entries = torch.stack(
        [
            prompt_entries(
                batch.pool,
                batch.requests[0].descriptor,
                batch.block_table[0].tolist(),
                head,
                4,
            )
            for head in range(2)
        ]
    ).float()
    want = Span().score(
        ScoreInputs(
            key=entries[..., :64].cpu(),
            value=entries[..., 64:].cpu(),
            window_query=query[0].view(window, 2, 4, 64).permute(1, 2, 0, 3).cpu(),
            output_root=root.cpu(),
            num_candidates=num_candidates,
            budget_tokens=32,
            scale=0.125,
            logits_soft_cap=0.0,
            layer=0,
            earlier_scores=[],
        )
    )
    assert torch.allclose(got[0].cpu(), want.first, rtol=1e-4, atol=1e-7)


@hypothesis_settings(max_examples=10)
@given(
    window=st.integers(1, 40),
    group=st.integers(1, 6),
    extra=st.lists(st.integers(0, 140), min_size=1, max_size=3),
    reduce=st.sampled_from(["mean", "max", "defensive"]),
    near_tokens=st.integers(0, 12),
    with_lse=st.booleans(),
)
def test_any_prompt(scorer, window, group, extra, reduce, near_tokens, with_lse):
    shape = Shape(num_layers=1, num_kv_heads=2, group=group)
    lens = tuple(window + n for n in extra)
    num_rated = tuple(max(1, n) for n in extra)
    check_scores(
        scorer, shape, lens, num_rated, window, with_lse, reduce=reduce, near_tokens=near_tokens
    )


def test_what_does_not_fit_is_refused():
    batch = prompts(BASE, (40,))
    query = window_query(BASE, 1, 8)
    prompts_, logits = batch.prompts([32]), ops.Logits(1.0)
    for change, message in (
        ({"reduce": "median"}, "unknown window reduction 'median'"),
        ({"reduce": "defensive", "power": 2}, "power 2 does not go with 'defensive'"),
        ({"mean_kernel": 4}, "must be odd"),
        ({"near_tokens": -1}, "must not be negative"),
        ({"layer": 2}, "layer 2 is not among 2"),
        ({"lse": torch.zeros(1, 8, 3)}, "want lse"),
    ):
        layer, plan = change.pop("layer", 0), plan_of(change)
        with pytest.raises(ValueError, match=message):
            ops.window_scores(query, batch.paged(), prompts_, layer, logits, plan, **change)
    wrong = dataclasses.replace(prompts_, num_rated=int32(3, 4))
    with pytest.raises(ValueError, match="want num_rated"):
        ops.window_scores(query, batch.paged(), wrong, 0, logits, ops.WindowPlan())
