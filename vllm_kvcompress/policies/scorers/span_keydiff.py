"""Span budgets with KeyDiff choices: for prompts whose question is not there yet."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kvcompress.policies.base import LayerScores, ScoreInputs, WindowPlan
from vllm_kvcompress.policies.options import kernel_option, share_option
from vllm_kvcompress.policies.scorers.keydiff import KeyDiff
from vllm_kvcompress.policies.scorers.span import Span


@dataclass(frozen=True)
class SpanKeyDiff(Span):
    """Attention decides how much each head keeps, key geometry most of what it keeps.

    Source: ours; see docs/quality.md. The worst-case scores of recipe 'span' share the pages
    among heads and fill the first share of each head's budget; the rest goes to the keys least
    like the mean key (KeyDiff, max-pooled). What the window's queries look at says which heads
    read far back at all, which does not depend on the question; which tokens a question will
    want, it does not say, and key geometry does so better.
    """

    keydiff_kernel: int = kernel_option(5, "width of the max pooling of KeyDiff scores")
    first_stage: float = share_option(0.25, "share of a head's budget filled by attention")

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Worst-case attention, and KeyDiff raised to [0, 2]."""
        keydiff = KeyDiff(self.keydiff_kernel).score(inputs).first
        return LayerScores(super().score(inputs).first, keydiff.clamp(min=-1) + 1)

    def window_plan(self) -> WindowPlan | None:
        """None: there is a second score."""
        return None
