"""H2O: keep the tokens that all queries together have looked at most, and the latest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.policies.base import ChunkInputs, LayerScores, ScoreInputs, Scorer
from vllm_kvcompress.policies.options import option, share_option

# Queries whose attention is held at once, to bound memory; fewer where their weights would be more
# than so many, but enough for a fast product.
QUERIES_AT_ONCE = 256
_WEIGHTS_AT_ONCE = 2**26
_FEWEST_QUERIES = 16


@dataclass(frozen=True)
class H2O(Scorer):
    """Attention summed over every query of the prompt, causal, and over the query heads.

    Source: H2O, arXiv 2306.14048, section 4: half of the kept tokens are heavy hitters, half
    the most recent ones (our window is part of these). Every query counts, so prompts are
    computed whole, without prefix-cache hits. Parity target of the scores: kvpress'
    ObservedAttentionPress, which divides by the number of queries (`normalize`, with
    `recent` 0). The KVCache-Factory port sums without the causal mask; ours has it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"all_queries"})

    recent: float = share_option(0.5, "share of the kept tokens that are simply the latest")
    normalize: bool = option(False, "divide by the number of queries that saw the token")

    def observe(self, inputs: ChunkInputs, state: Any) -> torch.Tensor:
        """[H, first + m] float32 sums of attention so far."""
        num_heads, num_keys = inputs.key.shape[:2]
        sums = inputs.key.new_zeros(num_heads, num_keys, dtype=torch.float32)
        if state is not None:
            sums[:, : inputs.first] = state
        num_weights = num_keys * inputs.query.shape[0] * inputs.query.shape[1]
        fitting = max(_FEWEST_QUERIES, _WEIGHTS_AT_ONCE // num_weights)
        at_once = min(QUERIES_AT_ONCE, fitting)
        for start in range(0, inputs.query.shape[2], at_once):
            query = inputs.query[:, :, start : start + at_once]
            end = inputs.first + start + query.shape[2]
            # The queries are the last ones over these keys, so the mask is causal.
            attention = ops.window_attention(
                query, inputs.key[:, :end], inputs.scale, inputs.logits_soft_cap, inputs.sinks
            )
            sums[:, :end] += attention.sum(dim=(1, 2))
        return sums

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Summed attention, +inf for the recent part of the budget."""
        num_keys, num_candidates = inputs.key.shape[1], inputs.num_candidates
        sums = inputs.observed
        assert sums.shape[1] == num_keys
        if self.normalize:
            sums = sums / torch.arange(num_keys, 0, -1, device=sums.device)
        scores = sums[:, :num_candidates].clone()
        num_recent = int(self.recent * (inputs.budget_tokens + inputs.num_tail_tokens))
        scores[:, max(0, num_keys - num_recent) :] = float("inf")
        return LayerScores(scores)
