"""CriticalKV: attention first, then attention times what a value does to the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress import ops
from vllm_kvcompress.policies.base import LayerScores, ScoreInputs, WindowPlan
from vllm_kvcompress.policies.options import option, share_option
from vllm_kvcompress.policies.scorers.snapkv import SnapKV


@dataclass(frozen=True)
class CriticalKV(SnapKV):
    """SnapKV scores for a first share of the budget, value-weighted ones for the rest.

    Source: "Identify Critical KV Cache in LLM Inference from an Output Perturbation
    Perspective", arXiv 2502.03805, algorithm 1: stage 2 ranks by `(s + epsilon) * ||Wo v||_1`,
    the norm averaged over the query heads of a KV head. How large stage 1 is (option
    first_stage) is settled in `selection.select`, which knows each head's budget. Parity
    target: kvpress' CriticalKVPress and CriticalAdaKVPress over SnapKVPress.
    """

    needs: ClassVar[frozenset[str]] = SnapKV.needs | {"value", "output_weight"}

    epsilon: float = option(1e-4, "added to scores before weighing", minimum=0.0)
    first_stage: float = share_option(0.5, "share of a head's budget filled by attention alone")

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Pooled attention, and the same weighted by projected value norms."""
        assert inputs.value is not None and inputs.output_weight is not None
        scores = self.pooled_attention(inputs)
        norms = ops.projected_value_norm(
            inputs.value[:, : inputs.num_candidates], inputs.output_weight
        )
        return LayerScores(scores, (scores + self.epsilon) * norms)

    def window_plan(self) -> WindowPlan | None:
        """None: there is a second score."""
        return None
