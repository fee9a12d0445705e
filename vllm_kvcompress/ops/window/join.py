"""One score per KV head and token or page, of scores per query head."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.dispatch import Provider, by_native, by_triton, choose
from vllm_kvcompress.ops.limits import BLOCK_SIZES
from vllm_kvcompress.ops.scoring.tokens import PAGE_REDUCTIONS
from vllm_kvcompress.ops.structs import Prompts
from vllm_kvcompress.ops.window import reference
from vllm_kvcompress.ops.window.checks import check_lengths
from vllm_kvcompress.ops.window.memory import empty_scores
from vllm_kvcompress.ops.window.plan import GROUP_REDUCTIONS, POOL_KINDS, WindowPlan


def join_scores(
    scores: torch.Tensor,
    prompts: Prompts,
    plan: WindowPlan,
    *,
    page_reduce: str | None = None,
    page_size: int = 16,
    num_kv_heads: int | None = None,
    effect: torch.Tensor | None = None,
    part_sums: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str = "triton",
) -> torch.Tensor:
    """One score per KV head and token or page, from what `window_scores` returns.

    What a `WindowPlan` says of joining the group, then one score per page.

    Args:
        scores: [R, n * H, G, N] float32.
        prompts: num_candidates are whole pages if pages are asked for; max_candidates is at most N.
            Their rows are not read.
        plan: what to do.
        page_reduce: 'max', 'mean' or 'rms' of a page's tokens; None = a score per token.
        page_size: tokens per page, 16 to 128; any number for 'native'.
        num_kv_heads: H, heads of a layer, among which effects are shared; None = n is 1.
        effect: [R, n * H, N] float32 of `paged_value_effect`.
        part_sums: [R, n * H, parts] float32 of `window_scores`: what 'triton' makes means of, for
            one group that is not pooled. The others need none.
        out: like the result, written; rows whole. None = a new tensor. Not for 'native'.
        backend: 'triton', 'native' (compiled, CPU) or 'reference'.

    Returns:
        [R, n * H, max_candidates or max_candidates / page_size] float32, entries past the
        candidates undefined. No host sync, graph-safe, deterministic.

    Raises:
        ValueError: on shapes, types or options that do not fit.
        RuntimeError: if the backend cannot run here.
    """
    _check_scores(scores, effect, num_kv_heads, backend)
    num_kv_heads = scores.shape[1] if num_kv_heads is None else num_kv_heads
    check_lengths(prompts, scores.shape[0])
    plan.check_join()
    _check_pages(prompts, scores.shape[3], page_reduce, page_size, backend)
    num_requests, num_streams, _, _ = scores.shape
    max_candidates = prompts.max_candidates
    width = max_candidates if page_reduce is None else max_candidates // page_size
    size = (num_requests, num_streams, width)
    check(
        out is None
        or (
            backend != "native"
            and out.shape == size
            and out.dtype == torch.float32
            and out.stride(2) == 1
        ),
        f"want out {size} float32",
    )
    if out is None:
        out = empty_scores(*size, device=scores.device, backend=backend)
    choose(_JOIN, backend)(
        scores,
        prompts.num_rated,
        prompts.num_candidates,
        effect,
        out,
        plan=plan,
        page_reduce=page_reduce or "token",
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        part_sums=part_sums,
    )
    return out


def _check_scores(
    scores: torch.Tensor, effect: torch.Tensor | None, num_kv_heads: int | None, backend: str
) -> None:
    check(
        scores.dim() == 4 and scores.dtype == torch.float32 and scores.stride(3) == 1,
        f"want scores [R, H, G, N] float32, got {tuple(scores.shape)} {scores.dtype}",
    )
    num_requests, num_streams, _, max_rated = scores.shape
    num_kv_heads = num_streams if num_kv_heads is None else num_kv_heads
    check(
        num_kv_heads > 0
        and num_streams % num_kv_heads == 0
        and (num_streams == num_kv_heads or backend != "native"),
        f"{num_streams} streams are not whole layers of {num_kv_heads} heads (one, for 'native')",
    )
    check(
        effect is None
        or (effect.shape == (num_requests, num_streams, max_rated) and effect.stride(2) == 1),
        f"want effect [{num_requests}, {num_streams}, {max_rated}]",
    )


def _check_pages(
    prompts: Prompts, max_rated: int, page_reduce: str | None, page_size: int, backend: str
) -> None:
    check(page_reduce in (None, *PAGE_REDUCTIONS), f"unknown page reduction {page_reduce!r}")
    check(
        page_size in BLOCK_SIZES or (backend == "native" and page_size > 0),
        f"pages of {page_size} tokens are not supported",
    )
    max_candidates = prompts.max_candidates
    check(
        0 <= max_candidates <= max_rated
        and (page_reduce is None or max_candidates % page_size == 0),
        f"{max_candidates} candidates do not fit {max_rated} scores and pages of {page_size}",
    )


def _by_native(
    *tensors: torch.Tensor | None,
    plan: WindowPlan,
    page_reduce: str,
    page_size: int,
    num_kv_heads: int,
    part_sums: torch.Tensor | None,
) -> None:
    by_native("join_scores", only="cpu")(
        *tensors,
        group_reduce=GROUP_REDUCTIONS.index(plan.group_reduce),
        pool_kernel=plan.pool_kernel,
        pool_kind=POOL_KINDS.index(plan.pool_kind),
        pool_first=plan.pool_first,
        floor_at_mean=plan.floor_at_mean,
        span_kernel=plan.span_kernel,
        page_reduce=("token", *PAGE_REDUCTIONS).index(page_reduce),
        page_size=page_size,
    )


def _by_triton(
    scores: torch.Tensor,
    num_rated: torch.Tensor,
    num_candidates: torch.Tensor,
    effect: torch.Tensor | None,
    out: torch.Tensor,
    *,
    plan: WindowPlan,
    page_size: int,
    part_sums: torch.Tensor | None,
    **options: Any,
) -> None:
    num_requests, num_streams, num_groups, _ = scores.shape
    check(
        not plan.floor_at_mean
        or (
            num_groups == plan.pool_kernel == 1
            and part_sums is not None
            and part_sums.shape[:2] == (num_requests, num_streams)
            and part_sums.dtype == torch.float32
            and part_sums.is_contiguous()
        ),
        f"a mean needs part_sums [{num_requests}, {num_streams}, parts] float32 of one group "
        "that is not pooled",
    )
    is_page = options["page_reduce"] != "token"
    by_triton("join_scores")(
        scores,
        num_rated,
        num_candidates,
        effect,
        out,
        max_candidates=out.shape[2] * (page_size if is_page else 1),
        page_size=page_size,
        part_sums=part_sums,
        group_reduce=plan.group_reduce,
        pool_kernel=plan.pool_kernel,
        pool_kind=plan.pool_kind,
        pool_first=plan.pool_first,
        floor_at_mean=plan.floor_at_mean,
        span_kernel=plan.span_kernel,
        **options,
    )


_JOIN: dict[str, Provider] = {
    "triton": _by_triton,
    "native": _by_native,
    "reference": reference.join_scores,
}
