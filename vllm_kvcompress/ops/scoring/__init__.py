"""Scores of one layer's tokens, read from plain tensors, and the best of rows of scores."""

from vllm_kvcompress.ops.scoring.attention import (
    output_root,
    projected_value_norm,
    value_effect,
    window_attention,
)
from vllm_kvcompress.ops.scoring.ranking import joint_top_counts, nan_last, select_top
from vllm_kvcompress.ops.scoring.tokens import page_scores, pool_scores

__all__ = [
    "joint_top_counts",
    "nan_last",
    "output_root",
    "page_scores",
    "pool_scores",
    "projected_value_norm",
    "select_top",
    "value_effect",
    "window_attention",
]
