"""StreamingLLM: keep the first tokens and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.policies.base import EVERY_HEAD_ALIKE, LayerScores, ScoreInputs, Scorer
from vllm_kvcompress.policies.options import option


@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """Attention sinks first, then recency; keys keep their positions (no re-rotation).

    Source: StreamingLLM, arXiv 2309.17453, section 3.2. Parity target: kvpress'
    StreamingLLMPress. With page granularity the page that holds the sinks is kept whole.
    """

    scope: ClassVar[str] = "head"
    scope_reason: ClassVar[str] = EVERY_HEAD_ALIKE

    num_sinks: int = option(4, "first tokens always kept", minimum=0)

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """The token's position, +inf for the sinks."""
        num_heads = inputs.key.shape[0]
        scores = torch.arange(inputs.num_candidates, dtype=torch.float32, device=inputs.key.device)
        scores[: self.num_sinks] = float("inf")
        return LayerScores(scores.expand(num_heads, -1))
