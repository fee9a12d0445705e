"""The score of one answer, the same for every engine."""

from __future__ import annotations

from collections.abc import Sequence

from quality.metrics import METRICS, token_agreement
from quality.tasks import Sample


def score(
    sample: Sample, text: str, token_ids: Sequence[int], full_ids: Sequence[int] | None
) -> float:
    """Score in [0, 1].

    Args:
        sample: with its metric.
        text, token_ids: the answer.
        full_ids: the full cache's answer to the same sample on the same engine, for the metric
            'agreement'; None = this is that answer.
    """
    if sample.metric != "agreement":
        return METRICS[sample.metric](text, sample.answers)
    return token_agreement(token_ids, token_ids if full_ids is None else full_ids)
