"""Span: worst-case attention times what the values do, widened so that facts stay whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.policies.base import LayerScores, ScoreInputs, Scorer, WindowPlan
from vllm_kvcompress.policies.options import kernel_option, option
from vllm_kvcompress.policies.scorers.defensivekv import worst_case


@dataclass(frozen=True)
class Span(Scorer):
    """Largest attention over window and query heads, weighted by the values' effect.

    Source: ours; see docs/quality.md for the trials behind each step. As in DefensiveKV (arXiv
    2510.13334), each query's attention is mean-pooled and brought back to its old sum, the
    maximum over query heads and window is taken and raised to at least the head's mean. Then:

    - the effect of a value on the layer's output is its L2 norm under the output projection,
      averaged (root mean square) over the query heads: one [d, d] product per token, where
      ||Wo v||_1 costs as much as the output projection. It is divided by its sum over the KV
      heads, as there; a rank of tensor parallelism sums over its own heads;
    - no attention mass comes first;
    - a max pooling of the finished scores keeps the neighbours of an important token, so that
      a fact of several tokens stays whole: queries of the window look at a number's first digit,
      and the last one is wanted only when the first have been written;
    - tokens of the window are rated too, so that only the last `recent_tokens` (see `memory.
      geometry`) are kept in any case. For that, what a query pays to its own token and the
      `near_tokens - 1` before it does not count: every token is looked at by the next ones.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"window_query", "value", "output_root"})
    rates_window: ClassVar[bool] = True

    pool_kernel: int = kernel_option(5, "width of the mean pooling along keys")
    value_norm: bool = option(True, "weigh by what the values do to the layer's output")
    span_kernel: int = kernel_option(11, "width of the last max pooling, so that facts stay whole")
    near_tokens: int = option(8, "keys up to a query's own that do not count for it", minimum=1)

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Worst-case scores; see the class."""
        assert inputs.window_query is not None and inputs.value is not None
        assert inputs.output_root is not None
        num_keys, window = inputs.key.shape[1], inputs.window_query.shape[2]
        # Pooling looks past the last candidate, as far as to the window.
        num_rated = max(inputs.num_candidates, num_keys - window)
        attention = ops.window_attention(
            inputs.window_query, inputs.key, inputs.scale, inputs.logits_soft_cap, inputs.sinks
        )[..., :num_rated]
        device = attention.device
        queries = torch.arange(num_keys - window, num_keys, device=device)
        age = queries[:, None] - torch.arange(num_rated, device=device)
        attention = attention.masked_fill(age < self.near_tokens, 0.0)
        scores = worst_case(attention, self.pool_kernel)
        if self.value_norm:
            effect = ops.value_effect(inputs.value[:, :num_rated], inputs.output_root)
            # A token whose values do nothing in any head divides by zero otherwise.
            total = effect.sum(dim=0, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            scores = scores * (effect / total)
        scores = ops.pool_scores(scores, self.span_kernel, "max")
        return LayerScores(scores[:, : inputs.num_candidates])

    def window_plan(self) -> WindowPlan | None:
        """The same by ops that read pages."""
        return WindowPlan(
            reduce="defensive",
            near_tokens=self.near_tokens,
            mean_kernel=self.pool_kernel,
            rates_window=True,
            group_reduce="max",
            floor_at_mean=True,
            span_kernel=self.span_kernel,
            uses_value_effect=self.value_norm,
        )
