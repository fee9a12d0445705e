"""SnapKV: keep what the last queries of the prompt look at."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.policies.base import ScoreInputs, Scorer


class SnapKV(Scorer):
    """Attention of the window's queries, averaged and pooled along keys.

    Source: SnapKV, arXiv 2404.14469, section 4. Softmax over all n keys in float32, causal
    inside the window; mean over the window; 1-D pooling over the keys before the window;
    the query heads of one KV head are joined after pooling (kvpress' order; the Ada-KV code
    joins first, which differs for max pooling).

    Args:
        pool_kernel: odd width of the pooling, stride 1, same length; 1 = none.
        pool_kind: 'max' (LongBench configs of the authors) or 'avg' (kvpress).
        group_reduce: 'mean' or 'max' over the query heads of a KV head.
    """

    needs_window_queries: ClassVar[bool] = True

    def __init__(self, pool_kernel: int = 7, pool_kind: str = "max", group_reduce: str = "mean"):
        self.pool_kernel = pool_kernel
        self.pool_kind = pool_kind
        self.group_reduce = group_reduce

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """[H, num_candidates] pooled mean attention; see the base class."""
        assert inputs.window_query is not None
        window = inputs.window_query.shape[2]
        attention = ops.window_attention(
            inputs.window_query, inputs.key, inputs.scale, inputs.logits_soft_cap
        )
        before_window = attention.mean(dim=2)[..., : inputs.key.shape[1] - window]
        pooled = ops.pool_scores(before_window, self.pool_kernel, self.pool_kind)
        joined = pooled.amax(dim=1) if self.group_reduce == "max" else pooled.mean(dim=1)
        return joined[:, : inputs.num_candidates]
