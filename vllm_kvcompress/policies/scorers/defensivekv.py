"""DefensiveKV: guard against the worst case instead of the mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.policies.base import LayerScores, ScoreInputs, Scorer, WindowPlan
from vllm_kvcompress.policies.options import kernel_option, option, share_option


def worst_case(attention: torch.Tensor, pool_kernel: int) -> torch.Tensor:
    """Largest attention to each token, not below the head's mean (DefensiveKV, algorithm 1).

    Args:
        attention: [H, g, w, n] float32 weights of the window's queries.
        pool_kernel: odd width of a mean pooling of each row, brought back to its old sum.

    Returns:
        [H, n] float32.
    """
    pooled = ops.pool_scores(attention, pool_kernel, "avg")
    old_sum = attention.sum(dim=-1, keepdim=True)
    # A row that sees nothing has nothing to bring back.
    new_sum = pooled.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    worst = (pooled / new_sum * old_sum).amax(dim=(1, 2))
    return worst.clamp(min=worst.mean(dim=-1, keepdim=True))


@dataclass(frozen=True)
class DefensiveKV(Scorer):
    """Largest attention over window and query heads, weighted by projected value norms.

    Source: "Taming the Fragility of KV Cache Eviction in LLM Inference", arXiv 2510.13334,
    algorithm 1, and the authors' code: each query's attention before the window is mean-pooled
    and brought back to its old sum; maximum over the query heads, then over the window; raised
    to at least the head's mean; times ||Wo v||_1, divided by its sum over the KV heads; the
    tokens that hold the first `mass_first - b` of the mean attention come before all others,
    at most the budget. b is, as in the code, the attention on the w keys before the window.
    Parity target: that code (kvpress has no such press), which guarantees heads nothing: budgets
    'ada' with alpha 0, 'joint' with floor 0. A rank of tensor parallelism normalises over its
    own heads.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"window_query", "value", "output_weight"})

    pool_kernel: int = kernel_option(5, "width of the mean pooling along keys")
    value_norm: bool = option(True, "weigh by the norm of the projected values")
    # The authors' 0.9 loses most needles of our benchmark (docs/quality.md).
    mass_first: float = share_option(0.0, "attention mass whose tokens come first; the paper: 0.9")

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Worst-case scores; see the class."""
        assert inputs.window_query is not None and inputs.value is not None
        assert inputs.output_weight is not None
        window = inputs.window_query.shape[2]
        attention = ops.window_attention(
            inputs.window_query, inputs.key, inputs.scale, inputs.logits_soft_cap, inputs.sinks
        )[..., : inputs.key.shape[1] - window]
        scores = worst_case(attention, self.pool_kernel)
        if self.value_norm:
            norms = ops.projected_value_norm(
                inputs.value[:, : scores.shape[1]], inputs.output_weight
            )
            scores = scores * norms / norms.sum(dim=0, keepdim=True)
        if self.mass_first > 0:
            scores = self._lift_mass(scores, attention, window, inputs.budget_tokens)
        return LayerScores(scores[:, : inputs.num_candidates])

    def window_plan(self) -> WindowPlan | None:
        """The same by ops that read pages, without the L1 norms, which need whole projections."""
        if self.value_norm or self.mass_first > 0:
            return None
        return WindowPlan(
            reduce="defensive",
            mean_kernel=self.pool_kernel,
            group_reduce="max",
            floor_at_mean=True,
        )

    def _lift_mass(
        self, scores: torch.Tensor, attention: torch.Tensor, window: int, budget_tokens: int
    ) -> torch.Tensor:
        threshold = self.mass_first - attention[..., -window:].sum(dim=-1).mean()
        mean = attention.mean(dim=(1, 2))
        share = mean / mean.sum(dim=-1, keepdim=True)
        order = share.sort(dim=-1, descending=True, stable=True)
        reaches = order.values.cumsum(dim=-1) >= threshold
        # Tokens before the one that reaches it; none if rounding keeps the sum below.
        counts = reaches.int().argmax(dim=-1).clamp(max=budget_tokens)
        ranks = torch.arange(share.shape[-1], device=share.device)
        is_first = torch.zeros_like(share, dtype=torch.bool)
        is_first.scatter_(1, order.indices, ranks < counts[:, None])
        return torch.where(is_first, scores.max(), scores)
