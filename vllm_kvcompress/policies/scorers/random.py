"""Random scores: the control that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvcompress.ops.transfers import to_device
from vllm_kvcompress.policies.base import LayerScores, ScoreInputs, Scorer
from vllm_kvcompress.policies.options import option


@dataclass(frozen=True)
class Random(Scorer):
    """Uniform scores, the same for the same seed, layer and shape.

    A request that is preempted and computed again therefore keeps the same tokens.
    """

    seed: int = option(0, "seed of the scores", minimum=0, maximum=2**32 - 1)

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Numbers in [0, 1), drawn on the CPU."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + inputs.layer)
        num_heads = inputs.key.shape[0]
        scores = torch.rand(num_heads, inputs.num_candidates, generator=generator)
        return LayerScores(to_device(scores.numpy(), inputs.key.device))
