"""Scores of layers by the ops that read pages, as a scorer's window plan says."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.structs import Logits, Pool, Prompts
from vllm_kvcompress.ops.window.effect import paged_value_effect
from vllm_kvcompress.ops.window.join import join_scores
from vllm_kvcompress.ops.window.plan import WindowPlan
from vllm_kvcompress.ops.window.scores import num_score_parts, window_scores


def planned_scores(
    plan: WindowPlan,
    query: torch.Tensor,
    pool: Pool,
    prompts: Prompts,
    layer: int,
    logits: Logits,
    *,
    lse: torch.Tensor | None = None,
    output_root: torch.Tensor | None = None,
    page_reduce: str | None,
    out: torch.Tensor | None = None,
    backend: str,
) -> torch.Tensor:
    """Scores of n layers of all prompts; 'native' takes one.

    Args:
        plan: of the scorer.
        query: [R, n, w, H * g, d] queries of their windows; without n it is 1.
        pool, prompts, layer, logits: as in `window_scores`.
        lse: [R, n, w, H * g] float32 of these queries, if attention has told it.
        output_root: [n, H, d, d], if the plan weighs by values.
        page_reduce: how a page's score is made of its tokens'; None = a score per token.
        out: like the result, written; None = a new tensor. Not for 'native'.
        backend: of the ops.

    Returns:
        [R, n * H, max_candidates or pages of them] float32, entries past a prompt's own undefined.
    """
    part_sums = None
    if plan.floor_at_mean and backend == "triton":
        num_scored = query.shape[1] if query.dim() == 5 else 1
        num_parts = num_score_parts(prompts.max_rated, plan.mean_kernel)
        size = (query.shape[0], num_scored * pool.num_kv_heads, num_parts)
        part_sums = torch.empty(size, dtype=torch.float32, device=query.device)
    scores = window_scores(
        query, pool, prompts, layer, logits, plan, lse=lse, part_sums=part_sums, backend=backend
    )
    effect = None
    if plan.uses_value_effect:
        assert output_root is not None
        effect = paged_value_effect(output_root, pool, prompts, layer, backend=backend)
    return join_scores(
        scores,
        prompts,
        plan,
        page_reduce=page_reduce,
        page_size=pool.block_size,
        num_kv_heads=pool.num_kv_heads,
        effect=effect,
        part_sums=part_sums,
        out=out,
        backend=backend,
    )
