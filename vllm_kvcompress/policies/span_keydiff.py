"""Span budgets with KeyDiff choices: for prompts whose question is not there yet."""

from __future__ import annotations

from vllm_kvcompress.policies.base import LayerScores, ScoreInputs
from vllm_kvcompress.policies.keydiff import KeyDiff
from vllm_kvcompress.policies.span import Span


class SpanKeyDiff(Span):
    """Attention decides how much each head keeps, key geometry most of what it keeps.

    Source: ours; see docs/quality.md. The worst-case scores of recipe 'span' share the pages
    among heads and fill the first share of each head's budget; the rest goes to the keys least
    like the mean key (KeyDiff, max-pooled). What the window's queries look at says which heads
    read far back at all, which does not depend on the question; which tokens a question will
    want, it does not say, and key geometry does so better.

    Args:
        pool_kernel, value_norm, span_kernel, near_tokens: of the worst-case scores, as in `Span`.
        keydiff_kernel: odd width of the max pooling of KeyDiff scores.
    """

    def __init__(
        self,
        pool_kernel: int = 5,
        value_norm: bool = True,
        span_kernel: int = 11,
        near_tokens: int = 8,
        keydiff_kernel: int = 5,
    ):
        super().__init__(pool_kernel, value_norm, span_kernel, near_tokens)
        self.keydiff_kernel = keydiff_kernel

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Worst-case attention, and KeyDiff raised to [0, 2]."""
        keydiff = KeyDiff(self.keydiff_kernel).score(inputs).first
        return LayerScores(super().score(inputs).first, keydiff.clamp(min=-1) + 1)
