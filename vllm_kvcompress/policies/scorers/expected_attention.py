"""Expected Attention: keep what queries still to come are expected to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_kvcompress.policies.base import ChunkInputs, LayerScores, ScoreInputs, Scorer
from vllm_kvcompress.policies.options import option

_KEYS_AT_ONCE = 8192


@dataclass
class QueryMoments:
    """Sums over the queries seen so far, before position encoding.

    Attributes:
        count: queries summed.
        total: [H, g, d] float64.
        products: [H, g, d, d] float64, sum of outer products.
    """

    count: int
    total: torch.Tensor
    products: torch.Tensor


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Mean attention under a Gaussian model of future queries, times the value's norm.

    Source: Expected Attention, arXiv 2510.00636, section 3, eq. 5-8. Mean and covariance of
    the prompt's queries before RoPE, without the first `num_sinks`, are rotated by the mean
    rotation of the next `num_future` positions; a key's logit is `k.mu * scale +
    k' cov k * scale^2 / 2`; softmax over the keys after the sinks; mean over the query heads;
    times ||v||_2. Every query counts, so prompts are computed whole, without prefix-cache
    hits. Parity target: kvpress' ExpectedAttentionPress.

    A sink logit that the model has learned depends on no query, so it is its own expectation; it
    joins the softmax, or a query head that mostly looks at its sink would count like any other.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"all_queries", "rotary", "value"})

    num_future: int = option(512, "future positions to average over", minimum=1)
    num_sinks: int = option(4, "first tokens always kept", minimum=0)
    covariance: bool = option(True, "use the queries' covariance, not their mean alone")
    value_norm: bool = option(True, "weigh by the norm of the values")
    epsilon: float = option(0.0, "added to scores before weighing", minimum=0.0)

    def observe(self, inputs: ChunkInputs, state: Any) -> QueryMoments:
        """Add a chunk's queries to the moments."""
        assert inputs.rotary is not None
        query = inputs.rotary.unrotate(inputs.query, inputs.first)
        query = query[:, :, max(0, self.num_sinks - inputs.first) :].double()
        products = query.transpose(2, 3) @ query
        moments = QueryMoments(query.shape[2], query.sum(dim=2), products)
        if state is not None:
            moments.count += state.count
            moments.total += state.total
            moments.products += state.products
        return moments

    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Expected attention, +inf for the sinks."""
        assert inputs.rotary is not None and inputs.value is not None
        moments: QueryMoments = inputs.observed
        num_sinks, num_candidates = self.num_sinks, inputs.num_candidates
        num_keys, head_size = inputs.key.shape[1:]
        mean = moments.total / moments.count
        covariance = moments.products / moments.count - mean[..., :, None] * mean[..., None, :]
        rotation = inputs.rotary.mean_rotation(num_keys, self.num_future, head_size)
        mean = mean.float() @ rotation.t()
        covariance = rotation @ covariance.float() @ rotation.t()
        key = inputs.key[:, num_sinks:].float()
        logits = torch.einsum("hgd,hnd->hgn", mean, key) * inputs.scale
        if self.covariance:
            # Whole, it would be as large as all query heads' queries in float32.
            for part, out in zip(
                key.split(_KEYS_AT_ONCE, dim=1), logits.split(_KEYS_AT_ONCE, dim=2), strict=True
            ):
                spread = torch.einsum("hni,hgij->hgnj", part, covariance)
                out += (spread * part[:, None]).sum(dim=-1) * (inputs.scale**2 / 2)
        if inputs.sinks is not None:
            logits = torch.cat([logits, inputs.sinks[:, :, None]], dim=-1)
        expected = logits.softmax(dim=-1)[..., : key.shape[1]].mean(dim=1)
        if self.value_norm:
            norms = inputs.value[:, num_sinks:].float().norm(dim=-1)
            expected = (expected + self.epsilon) * norms
        scores = expected.new_full((key.shape[0], num_keys), math.inf)
        scores[:, num_sinks:] = expected
        return LayerScores(scores[:, :num_candidates])
