"""What engines chose for the same prompts, and how far that differs."""

from __future__ import annotations

import math
from typing import Any

# Per prompt (token, its log-probability) of every step.
Answers = list[list[tuple[int, float]]]


def chosen(outputs: list[Any]) -> Answers:
    """Per prompt (token, its log-probability) of every step.

    Raises:
        ValueError: if a log-probability is not finite.
    """
    texts = []
    for output in outputs:
        sample = output.outputs[0]
        pairs = [
            (token, place[token].logprob)
            for token, place in zip(sample.token_ids, sample.logprobs, strict=True)
        ]
        if not all(math.isfinite(logprob) for _, logprob in pairs):
            raise ValueError(f"log-probabilities that are not finite: {pairs[:4]}")
        texts.append(pairs)
    return texts


def compare(texts: Answers, stock: Answers) -> dict[str, float]:
    """How log-probabilities differ where all tokens before were the same.

    Returns:
        compared: number of them; max_difference; first_difference: the largest of the first
        tokens, which depend on the prompt alone.
    """
    differences, first = [], []
    for ours, theirs in zip(texts, stock, strict=True):
        for place, ((token, logprob), (other, expected)) in enumerate(
            zip(ours, theirs, strict=True)
        ):
            differences.append(abs(logprob - expected))
            if place == 0:
                first.append(differences[-1])
            if token != other:
                break
    return {
        "compared": len(differences),
        "max_difference": max(differences),
        "first_difference": max(first),
    }
