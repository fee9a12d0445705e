"""Scores of layers by the ops that read pages, as a scorer's window plan says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.policies.base import WindowPlan


@dataclass(frozen=True)
class PagedPrompts:
    """Prompts whose keys and values are in their pages.

    Attributes:
        pool: [num_pages, b, 2 d].
        rows: [R, ROW_FIELDS] int32 descriptors.
        block_table: [R, W] int32.
        num_rated, num_candidates: [R] int32 tokens that are rated, and those that compete.
        max_rated, max_candidates: greatest number of each.
        order: element order of pages; None = plain.
    """

    pool: torch.Tensor
    rows: torch.Tensor
    block_table: torch.Tensor
    num_rated: torch.Tensor
    num_candidates: torch.Tensor
    max_rated: int
    max_candidates: int
    order: PageOrder | None = None


def can_run(plan: WindowPlan) -> bool:
    """Whether the ops take a plan's numbers; `Scorer.score` takes any."""
    widths = (plan.mean_kernel, plan.pool_kernel, plan.span_kernel)
    return max(widths) <= ops.MAX_POOL_KERNEL


def planned_scores(
    plan: WindowPlan,
    prompts: PagedPrompts,
    query: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    layer: int,
    num_layers: int,
    num_kv_heads: int,
    scale: float | torch.Tensor,
    logits_soft_cap: float | torch.Tensor,
    sinks: torch.Tensor | None,
    output_root: torch.Tensor | None,
    page_reduce: str | None,
    backend: str,
    unit_scales: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores of n layers of all prompts; 'native' takes one.

    Args:
        plan: of the scorer.
        prompts: where they are.
        query: [R, n, w, H * g, d] queries of their windows; without n it is 1.
        lse: [R, n, w, H * g] float32 of these queries, if attention has told it.
        layer, num_layers, num_kv_heads, scale, logits_soft_cap: as in `ops.window_scores`.
        sinks: [n, H, g] float32, or None.
        output_root: [n, H, d, d], if the plan weighs by values.
        page_reduce: how a page's score is made of its tokens'; None = a score per token.
        backend: of the ops.
        unit_scales: [num_layers * H] float32 ones; None = made anew.
        out: like the result, written; None = a new tensor. Not for 'native'.

    Returns:
        [R, n * H, max_candidates or pages of them] float32, entries past a prompt's own undefined.
    """
    pages = (prompts.pool, prompts.rows, prompts.block_table, prompts.num_rated, prompts.max_rated)
    where: dict[str, Any] = {"layer": layer, "num_layers": num_layers, "backend": backend}
    order, part_sums = prompts.order, None
    if plan.floor_at_mean and backend == "triton":
        num_streams = (query.shape[1] if query.dim() == 5 else 1) * num_kv_heads
        num_parts = ops.num_score_parts(prompts.max_rated, plan.mean_kernel)
        size = (query.shape[0], num_streams, num_parts)
        part_sums = torch.empty(size, dtype=torch.float32, device=query.device)
    scores = ops.window_scores(
        query,
        *pages,
        num_kv_heads=num_kv_heads,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        reduce=plan.reduce,
        power=plan.power,
        near_tokens=plan.near_tokens,
        pool_kernel=plan.mean_kernel,
        lse=lse,
        key_scale=unit_scales,
        sinks=None if sinks is None else sinks.flatten(-2),
        part_sums=part_sums,
        key_offsets=None if order is None else order.key_offsets,
        **where,
    )
    effect = None
    if plan.uses_value_effect:
        assert output_root is not None
        effect = ops.paged_value_effect(
            pages[0],
            output_root,
            *pages[1:],
            value_scale=unit_scales,
            value_offsets=None if order is None else order.value_offsets,
            **where,
        )
    return ops.join_scores(
        scores,
        prompts.num_rated,
        prompts.num_candidates,
        prompts.max_candidates,
        group_reduce=plan.group_reduce,
        pool_kernel=plan.pool_kernel,
        pool_kind=plan.pool_kind,
        pool_first=plan.pool_first,
        floor_at_mean=plan.floor_at_mean,
        effect=effect,
        span_kernel=plan.span_kernel,
        page_reduce=page_reduce,
        page_size=prompts.pool.shape[1],
        num_kv_heads=num_kv_heads,
        part_sums=part_sums,
        out=out,
        backend=backend,
    )
