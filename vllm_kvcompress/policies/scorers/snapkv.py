"""SnapKV: keep what the last queries of the prompt look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.policies.base import LayerScores, ScoreInputs, Scorer, WindowPlan
from vllm_kvcompress.policies.options import kernel_option, option

REDUCTIONS = ("mean", "sum", "max")


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Attention of the window's queries, joined over the window and pooled along keys.

    Source: SnapKV, arXiv 2404.14469, section 4. Softmax over all n keys in float32, causal
    inside the window; joined over the window; 1-D pooling over the keys before the window;
    joined over the query heads of a KV head. Parity target: kvpress' SnapKVPress with
    pool_kind 'avg' and its window (64) and kernel (5); the Ada-KV code is pool_first False,
    which differs for max pooling. Squared and summed (score_power 2, both reductions 'sum',
    max 7) it is the metric of KV-Compress, arXiv 2410.00161, section 3.2.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"window_query"})

    pool_kernel: int = kernel_option(7, "width of the pooling along keys")
    # The authors' LongBench settings take the largest; kvpress takes the mean.
    pool_kind: str = option("max", "pooling along keys", choices=("max", "avg"))
    window_reduce: str = option("mean", "how the window's queries are joined", choices=REDUCTIONS)
    group_reduce: str = option(
        "mean", "how the query heads of one KV head are joined", choices=REDUCTIONS
    )
    score_power: int = option(1, "1 = attention, 2 = squared attention", choices=(1, 2))
    pool_first: bool = option(True, "pool each query head before they are joined (else after)")

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Pooled window attention."""
        return LayerScores(self.pooled_attention(inputs))

    def window_plan(self) -> WindowPlan | None:
        """The same by ops that read pages."""
        return WindowPlan(
            reduce=self.window_reduce,
            power=self.score_power,
            group_reduce=self.group_reduce,
            pool_kernel=self.pool_kernel,
            pool_kind=self.pool_kind,
            pool_first=self.pool_first,
        )

    def pooled_attention(self, inputs: ScoreInputs) -> torch.Tensor:
        """[H, num_candidates] float32."""
        assert inputs.window_query is not None
        window = inputs.window_query.shape[2]
        attention = ops.window_attention(
            inputs.window_query, inputs.key, inputs.scale, inputs.logits_soft_cap, inputs.sinks
        )[..., : inputs.key.shape[1] - window]
        if self.score_power != 1:
            attention = attention**self.score_power
        scores = _reduce(attention, 2, self.window_reduce)
        if self.pool_first:
            scores = ops.pool_scores(scores, self.pool_kernel, self.pool_kind)
        scores = _reduce(scores, 1, self.group_reduce)
        if not self.pool_first:
            scores = ops.pool_scores(scores, self.pool_kernel, self.pool_kind)
        return scores[:, : inputs.num_candidates]


def _reduce(scores: torch.Tensor, dim: int, how: str) -> torch.Tensor:
    if how == "max":
        return scores.amax(dim)
    return scores.mean(dim) if how == "mean" else scores.sum(dim)
