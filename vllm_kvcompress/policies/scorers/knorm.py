"""Knorm: keep the keys of small L2 norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.policies.base import LayerScores, ScoreInputs, Scorer


@dataclass(frozen=True)
class KNorm(Scorer):
    """Minus the L2 norm of the key.

    Source: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    arXiv 2406.11430, section 3. The authors leave layers 0 and 1 alone; here every layer is
    compressed, as in kvpress' KnormPress, the parity target, because budgets are exact.
    """

    scope: ClassVar[str] = "layer"
    scope_reason: ClassVar[str] = "key norms of different layers have different scales"
    signed: ClassVar[bool] = True

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Negated key norms."""
        return LayerScores(-inputs.key[:, : inputs.num_candidates].float().norm(dim=-1))
