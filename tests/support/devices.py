"""Where the engines of the end-to-end tests run, and how alike their texts have to be there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

# For the fixture `device`. In engines of the test's own process, `cuda_on_cpu` is the CUDA side
# without a GPU (see cuda_on_cpu.py), and `plain` a platform that only tests have (plain_platform).
ON_A_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
EVERYWHERE = ("cpu", "cuda_on_cpu", "plain", ON_A_GPU)
# FlashAttention has no float32, in which texts do not depend on the batch.
DTYPES = {"cpu": "float32", "cuda_on_cpu": "float32", "plain": "float32", "cuda": "bfloat16"}
# Of log-probabilities.
TOLERANCES = {"cpu": 1e-4, "cuda_on_cpu": 1e-4, "plain": 1e-4, "cuda": 0.05}


@dataclass(frozen=True)
class Text:
    """What an engine generated for one prompt.

    Attributes:
        id: of the request.
        tokens: ids.
        logprobs: by place, of the likeliest tokens; empty if they were not asked for.
    """

    id: str
    tokens: list[int]
    logprobs: list[dict[int, float]]

    @classmethod
    def of(cls, output: Any) -> Text:
        """The first sample of one of vLLM's outputs."""
        sample = output.outputs[0]
        logprobs = [
            {token: entry.logprob for token, entry in place.items()}
            for place in sample.logprobs or ()
        ]
        return cls(output.request_id, list(sample.token_ids), logprobs)


def assert_same_texts(texts: list[Text], expected: list[Text], device: str) -> None:
    """Token by token; in half precision, up to where two tokens are about equally likely."""
    for one, other in zip(texts, expected, strict=True):
        if DTYPES[device] == "float32" or one.tokens == other.tokens:
            assert one.tokens == other.tokens
            continue
        pairs = enumerate(zip(one.tokens, other.tokens, strict=True))
        place, (a, b) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        for text in (one, other):
            likely = text.logprobs[place]
            gap = likely.get(a, -math.inf) - likely.get(b, -math.inf)
            assert abs(gap) < TOLERANCES[device]
