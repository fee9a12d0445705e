"""KeyDiff: keep the keys least like the mean key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from vllm_kvcompress import ops
from vllm_kvcompress.policies.base import LayerScores, ScoreInputs, Scorer
from vllm_kvcompress.policies.options import kernel_option


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Minus the cosine between a key and the mean of all normalised keys.

    Source: KeyDiff, arXiv 2504.15364, section 3.2 (the paper compresses block by block; here,
    as in kvpress' KeyDiffPress, the parity target, the whole prompt is seen at once). Looks at
    no query, so it does not depend on where the question stands.
    """

    signed: ClassVar[bool] = True

    span_kernel: int = kernel_option(1, "width of a last max pooling")

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Negated cosines in [-1, 1]."""
        key = inputs.key.float()
        anchor = F.normalize(key, dim=-1).mean(dim=1, keepdim=True)
        scores: torch.Tensor = -F.cosine_similarity(key, anchor, dim=-1)
        scores = ops.pool_scores(scores[:, : inputs.num_candidates], self.span_kernel, "max")
        return LayerScores(scores)
