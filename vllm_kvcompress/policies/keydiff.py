"""KeyDiff: keep the keys least like the mean key."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm_kvcompress import ops
from vllm_kvcompress.policies.base import LayerScores, ScoreInputs, Scorer


class KeyDiff(Scorer):
    """Minus the cosine between a key and the mean of all normalised keys.

    Source: KeyDiff, arXiv 2504.15364, section 3.2 (the paper compresses block by block; here,
    as in kvpress' KeyDiffPress, the parity target, the whole prompt is seen at once). Looks at
    no query, so it does not depend on where the question stands.

    Args:
        span_kernel: odd width of a last max pooling along keys; 1 = none, as in the paper.
    """

    def __init__(self, span_kernel: int = 1):
        self.span_kernel = span_kernel

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Negated cosines in [-1, 1]."""
        key = inputs.key.float()
        anchor = F.normalize(key, dim=-1).mean(dim=1, keepdim=True)
        scores: torch.Tensor = -F.cosine_similarity(key, anchor, dim=-1)
        scores = ops.pool_scores(scores[:, : inputs.num_candidates], self.span_kernel, "max")
        return LayerScores(scores)
