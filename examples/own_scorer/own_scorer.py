"""A scorer of one's own: keep tokens whose values are large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.policies.base import LayerScores, ScoreInputs, Scorer
from vllm_kvcompress.policies.options import option


@dataclass(frozen=True)
class ValueNorm(Scorer):
    """Norm of the values, the first tokens always kept."""

    needs: ClassVar[frozenset[str]] = frozenset({"value"})
    granularity: ClassVar[str] = "token"
    weakness: ClassVar[str] = "does not look at the question"

    num_sinks: int = option(4, "first tokens always kept", minimum=0)
    power: float = option(2.0, "of the norm", minimum=1.0)

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """One float32 score per candidate token and KV head; higher is kept first."""
        assert inputs.value is not None
        value = inputs.value[:, : inputs.num_candidates].float()
        scores = value.norm(p=self.power, dim=-1)
        scores[:, : self.num_sinks] = float("inf")
        return LayerScores(scores)
