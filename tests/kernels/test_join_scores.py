"""Values' effects, and scores joined to one per token or page, against the float64 references."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from paged_pool import DEVICE, Shape, random_like
from window_cases import int32, plan_of, prompts

from vllm_kvcompress import ops


@pytest.mark.parametrize(
    ("shape", "root_dtype"),
    [
        (Shape(dtype=torch.float32), torch.float32),
        (Shape(head_size=80, dtype=torch.bfloat16), torch.bfloat16),
        (Shape(head_size=256, num_kv_heads=1, dtype=torch.float16), torch.float16),
    ],
    ids=str,
)
def test_value_effect(scorer, shape, root_dtype):
    check_effect(scorer, shape, root_dtype)


def test_value_effect_of_fp8():
    shape = Shape(dtype=torch.bfloat16, pool_dtype=torch.float8_e4m3fn)
    check_effect("triton", shape, torch.bfloat16)


def check_effect(backend: str, shape: Shape, root_dtype: torch.dtype) -> None:
    batch = prompts(shape, (150, 70))
    generator = torch.Generator(DEVICE).manual_seed(3)
    size = (shape.num_kv_heads, shape.head_size, shape.head_size)
    root = random_like(size, root_dtype, generator)
    scales = torch.linspace(0.5, 2.0, shape.num_streams, device=DEVICE)
    arguments = (root, batch.paged(value_scale=scales), batch.prompts([130, 70]), 1)
    got = ops.paged_value_effect(*arguments, backend=backend)
    want = ops.paged_value_effect(*arguments, backend="reference")
    for r, rated in enumerate((130, 70)):
        exact = want[r, :, :rated]
        assert_close(got[r, :, :rated], exact, exact, torch.float32, ulps=64)


def lengths(rated: tuple[int, ...], candidates: tuple[int, ...]) -> ops.Prompts:
    """Of prompts whose rows are not read."""
    rows = ops.Rows(int32(), int32())
    numbers = (int32(*rated), int32(*candidates))
    return ops.Prompts(rows, *numbers, max(rated), max(candidates))


def raw_scores(num_requests: int, num_heads: int, num_groups: int, num_tokens: int):
    generator = torch.Generator(DEVICE).manual_seed(4)
    size = (num_requests, num_heads, num_groups, num_tokens)
    return random_like(size, torch.float32, generator).abs()


JOINS = {
    "nothing": {},
    "SnapKV": {"pool_kernel": 7},
    "kvpress": {"pool_kernel": 5, "pool_kind": "avg"},
    "Ada-KV's code": {"pool_kernel": 7, "pool_first": False},
    "KV-Compress": {"pool_kernel": 7, "group_reduce": "sum"},
    "maximum": {"group_reduce": "max", "pool_first": False, "pool_kernel": 3},
    "maximum, mean first": {"group_reduce": "max", "pool_kind": "avg", "pool_kernel": 3},
    "wide span": {"span_kernel": 31, "pool_kernel": 3},
    "best of a page": {"page_reduce": "max", "pool_kernel": 7},
    "mean of a page": {"page_reduce": "mean", "span_kernel": 3},
    "pages of 64": {"page_reduce": "rms", "page_size": 64},
}


@pytest.mark.parametrize("with_effect", [False, True])
@pytest.mark.parametrize("options", JOINS.values(), ids=JOINS)
def test_join_scores(scorer, options, with_effect):
    scores = raw_scores(3, 2, 3, 700)
    rated, candidates = (700, 290, 65), (640, 256, 64)
    # What is not rated is not read.
    for r, num_rated in enumerate(rated):
        scores[r, :, :, num_rated:] = float("nan")
    effect = raw_scores(3, 2, 1, 700)[:, :, 0] if with_effect else None
    if effect is not None:
        effect[1, :, 7] = 0.0
    pages = dict(options)
    arguments = (scores, lengths(rated, candidates), plan_of(pages))
    got = ops.join_scores(*arguments, **pages, effect=effect, backend=scorer)
    want = ops.join_scores(*arguments, **pages, effect=effect, backend="reference")
    page = options.get("page_size", 16) if "page_reduce" in options else 1
    for r, num_candidates in enumerate(candidates):
        exact = want[r, :, : num_candidates // page]
        assert_close(got[r, :, : num_candidates // page], exact, exact, torch.float32, ulps=16)


@pytest.mark.parametrize("page_reduce", [None, "rms"])
@pytest.mark.parametrize("num_parts", [1, 300])
def test_join_scores_of_span(scorer, page_reduce, num_parts):
    """The steps behind 'defensive', whose kernel leaves sums by parts."""
    scores = raw_scores(2, 4, 1, 700) ** 2
    rated, candidates = (700, 290), (640, 256)
    part_sums = torch.zeros(2, 4, num_parts, device=DEVICE)
    for r, num_rated in enumerate(rated):
        # Whichever parts they are; some are empty.
        part = torch.arange(num_rated, device=DEVICE) * num_parts // 900
        part_sums[r].index_add_(1, part, scores[r, :, 0, :num_rated])
        scores[r, :, :, num_rated:] = float("nan")
    effect = raw_scores(2, 4, 1, 700)[:, :, 0]
    # Heads of one layer, but for compiled ops of a CPU, which know no more than one.
    options = {"effect": effect, "page_reduce": page_reduce}
    options["num_kv_heads"] = 4 if scorer == "native" else 2
    plan = ops.WindowPlan(group_reduce="max", floor_at_mean=True, span_kernel=11)
    arguments = (scores, lengths(rated, candidates), plan)
    got = ops.join_scores(*arguments, **options, part_sums=part_sums, backend=scorer)
    want = ops.join_scores(*arguments, **options, backend="reference")
    for r, num_candidates in enumerate(candidates):
        num_entries = num_candidates // (16 if page_reduce else 1)
        exact = want[r, :, :num_entries]
        assert_close(got[r, :, :num_entries], exact, exact, torch.float32, ulps=16)


def test_small_scores_keep_their_order_as_pages(scorer):
    scores = torch.full((1, 1, 1, 32), 1e-30, device=DEVICE)
    scores[..., 16:] = 2e-30
    arguments = (scores, lengths((32,), (32,)), ops.WindowPlan())
    pages = ops.join_scores(*arguments, page_reduce="rms", backend=scorer)
    assert torch.allclose(pages, torch.tensor([[[1e-30, 2e-30]]], device=DEVICE), rtol=1e-5, atol=0)


def test_what_does_not_fit_is_refused():
    scores = raw_scores(1, 2, 1, 64)
    for change, message in (
        ({"group_reduce": "min"}, "unknown group reduction"),
        ({"pool_kind": "min"}, "pool kind"),
        ({"page_reduce": "min"}, "unknown page reduction"),
        ({"page_reduce": "max", "page_size": 48}, "pages of 48"),
        ({"page_reduce": "max", "page_size": 128}, "64 candidates do not fit"),
        ({"effect": torch.zeros(1, 2, 63)}, "want effect"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.join_scores(scores, lengths((64,), (64,)), plan_of(change), **change)
