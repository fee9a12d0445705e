"""Span budgets with KeyDiff choices: for prompts whose question is not there yet."""

from __future__ import annotations

from typing import ClassVar

from vllm_kvcompress.policies.base import LayerScores, ScoreInputs, Scorer
from vllm_kvcompress.policies.defensivekv import DefensiveKV
from vllm_kvcompress.policies.keydiff import KeyDiff


class SpanKeyDiff(Scorer):
    """Attention decides how much each head keeps, key geometry most of what it keeps.

    Source: ours; see docs/quality.md. The worst-case scores of recipe 'span' share the pages
    among heads and fill the first share of each head's budget; the rest goes to the keys least
    like the mean key (KeyDiff, max-pooled). What the window's queries look at says which heads
    read far back at all, which does not depend on the question; which tokens a question will
    want, it does not say, and key geometry does so better.

    Args:
        pool_kernel, value_norm, span_kernel: of the worst-case scores, as in `DefensiveKV`.
        keydiff_kernel: odd width of the max pooling of KeyDiff scores.
    """

    needs: ClassVar[frozenset[str]] = DefensiveKV.needs

    def __init__(
        self,
        pool_kernel: int = 5,
        value_norm: bool = True,
        span_kernel: int = 7,
        keydiff_kernel: int = 5,
    ):
        self.pool_kernel = pool_kernel
        self.value_norm = value_norm
        self.span_kernel = span_kernel
        self.keydiff_kernel = keydiff_kernel

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Worst-case attention, and KeyDiff raised to [0, 2]."""
        span = DefensiveKV(self.pool_kernel, self.value_norm, 0.0, self.span_kernel)
        keydiff = KeyDiff(self.keydiff_kernel).score(inputs).first
        return LayerScores(span.score(inputs).first, keydiff.clamp(min=-1) + 1)
