"""ChunkKV: keep whole chunks of tokens, chosen once for several layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.policies.base import EVERY_HEAD_ALIKE, LayerScores, ScoreInputs, Scorer
from vllm_kvcompress.policies.options import option


@dataclass(frozen=True)
class ChunkKV(Scorer):
    """Attention of the window's queries summed per chunk, over all heads of the layer.

    Source: ChunkKV, arXiv 2502.00299, algorithm 1 (chunks of 10; all heads of a layer keep
    the same tokens; the last chunk that fits is cut) and section 3.3 (layer-wise index reuse).
    Parity target: the order of chunks of kvpress' ChunkKVPress over SnapKVPress without
    pooling; kvpress takes the mean of a chunk (the same order but for a short last chunk),
    lets chunks reach into the window, and keeps whole chunks only.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"window_query"})
    scope: ClassVar[str] = "head"
    scope_reason: ClassVar[str] = EVERY_HEAD_ALIKE

    chunk_length: int = option(10, "tokens per chunk", minimum=1)
    reuse_layers: int = option(2, "layers that share the first one's choice", minimum=1)

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Each token has its chunk's score, for every KV head alike."""
        first_of_group = inputs.layer - inputs.layer % self.reuse_layers
        if first_of_group < inputs.layer:
            return inputs.earlier_scores[first_of_group]
        assert inputs.window_query is not None
        attention = ops.window_attention(
            inputs.window_query, inputs.key, inputs.scale, inputs.logits_soft_cap, inputs.sinks
        )
        per_token = attention[..., : inputs.num_candidates].sum(dim=(0, 1, 2))
        chunk_of_token = torch.arange(inputs.num_candidates, device=per_token.device)
        chunk_of_token = chunk_of_token // self.chunk_length
        num_chunks = -(-inputs.num_candidates // self.chunk_length)
        per_chunk = per_token.new_zeros(num_chunks).index_add_(0, chunk_of_token, per_token)
        return LayerScores(per_chunk[chunk_of_token].expand(inputs.key.shape[0], -1))
