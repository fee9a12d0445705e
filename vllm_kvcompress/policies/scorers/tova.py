"""TOVA: keep what the last query looks at, the same for all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress import ops
from vllm_kvcompress.policies.base import EVERY_HEAD_ALIKE, LayerScores, ScoreInputs, Scorer
from vllm_kvcompress.policies.options import kernel_option


@dataclass(frozen=True)
class TOVA(Scorer):
    """Attention of the prompt's last query, averaged over all query heads of the layer.

    Source: "Transformers are Multi-State RNNs", arXiv 2401.06104, section 3.2. Parity target:
    kvpress' TOVAPress, which keeps the last token only (our window = 1); a wider window is kept
    as well. A rank of tensor parallelism averages over its own heads.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"window_query"})
    scope: ClassVar[str] = "head"
    scope_reason: ClassVar[str] = EVERY_HEAD_ALIKE

    span_kernel: int = kernel_option(1, "width of a last max pooling")

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """The last query's mean attention, for every KV head alike."""
        assert inputs.window_query is not None
        last = inputs.window_query[:, :, -1:]
        attention = ops.window_attention(
            last, inputs.key, inputs.scale, inputs.logits_soft_cap, inputs.sinks
        )
        mean = attention[..., : inputs.num_candidates].mean(dim=(0, 1, 2))
        scores = ops.pool_scores(mean[None], self.span_kernel, "max")
        return LayerScores(scores.expand(inputs.key.shape[0], -1))
