"""StreamingLLM: keep the first tokens and the most recent ones."""

from __future__ import annotations

import torch

from vllm_kvcompress.policies.base import LayerScores, ScoreInputs, Scorer


class StreamingLLM(Scorer):
    """Attention sinks first, then recency; keys keep their positions (no re-rotation).

    Source: StreamingLLM, arXiv 2309.17453, section 3.2. Parity target: kvpress'
    StreamingLLMPress. With page granularity the page that holds the sinks is kept whole.

    Args:
        num_sinks: first tokens that are always kept.
    """

    def __init__(self, num_sinks: int = 4):
        self.num_sinks = num_sinks

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """The token's position, +inf for the sinks."""
        num_heads = inputs.key.shape[0]
        scores = torch.arange(inputs.num_candidates, dtype=torch.float32, device=inputs.key.device)
        scores[: self.num_sinks] = float("inf")
        return LayerScores(scores.expand(num_heads, -1))
