"""One small prompt for a scorer of another package, before an engine depends on its scores."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from vllm_kvcompress.policies.base import ChunkInputs, LayerScores, Rotary, ScoreInputs, Scorer

_NUM_HEADS, _GROUP, _HEAD_SIZE, _HIDDEN_SIZE = 2, 3, 64, 16
_NUM_CANDIDATES, _NUM_LAYERS = 256, 2
# `ScoreInputs` has the others for every scorer.
_OPTIONAL_INPUTS = ("window_query", "value", "output_weight", "output_root", "rotary")


def trial_problem(scorer: Scorer) -> str | None:
    """What is wrong with the scores of two layers of a random prompt; None if nothing.

    Keys are bfloat16, as in most engines. What the scorer does not ask for is missing.
    """
    earlier: list[LayerScores] = []
    has_second = hasattr(scorer, "first_stage")
    for layer in range(_NUM_LAYERS):
        try:
            # Who loads the scorer may work on another device.
            with torch.device("cpu"), torch.no_grad():
                scores = scorer.score(_inputs(scorer, layer, earlier))
        except Exception as error:
            return " ".join(f"cannot score a prompt ({type(error).__name__}: {error})".split())
        if not isinstance(scores, LayerScores):
            return f"gives {type(scores).__name__} for scores, not LayerScores"
        if (scores.second is not None) != has_second:
            return "must have the option 'first_stage' if it gives a second score, and only then"
        problem = _problem(scores.first) or (_problem(scores.second) if has_second else None)
        if problem:
            return problem
        earlier.append(scores)
    return None


def _problem(scores: Any) -> str | None:
    """What is wrong with the scores of a layer's candidates."""
    wanted = (_NUM_HEADS, _NUM_CANDIDATES)
    if not isinstance(scores, torch.Tensor):
        return f"gives {type(scores).__name__} for scores, not a tensor"
    if tuple(scores.shape) != wanted or scores.dtype != torch.float32:
        return (
            f"gives scores {list(scores.shape)} of {scores.dtype} for {wanted[0]} KV heads and "
            f"{wanted[1]} candidates; they must be {list(wanted)} of torch.float32"
        )
    return "gives NaN for a score" if scores.isnan().any() else None


def _inputs(scorer: Scorer, layer: int, earlier: list[LayerScores]) -> ScoreInputs:
    """A layer of the prompt, with what the scorer needs and nothing else."""
    num_tokens = _NUM_CANDIDATES + scorer.window
    generator = torch.Generator().manual_seed(layer)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    angles = torch.arange(num_tokens)[:, None] * 0.1 ** torch.arange(_HEAD_SIZE // 2)
    query = normal(_NUM_HEADS, _GROUP, num_tokens, _HEAD_SIZE)
    inputs = ScoreInputs(
        key=normal(_NUM_HEADS, num_tokens, _HEAD_SIZE),
        num_candidates=_NUM_CANDIDATES,
        budget_tokens=_NUM_CANDIDATES // 4,
        scale=_HEAD_SIZE**-0.5,
        layer=layer,
        earlier_scores=tuple(earlier),
        window_query=query[:, :, _NUM_CANDIDATES:],
        value=normal(_NUM_HEADS, num_tokens, _HEAD_SIZE),
        output_weight=normal(_NUM_HEADS, _GROUP, _HEAD_SIZE, _HIDDEN_SIZE),
        output_root=normal(_NUM_HEADS, _HEAD_SIZE, _HEAD_SIZE).float(),
        rotary=Rotary(torch.cat([angles.cos(), angles.sin()], dim=-1)),
    )
    missing: dict[str, Any] = {name: None for name in _OPTIONAL_INPUTS if name not in scorer.needs}
    inputs = dataclasses.replace(inputs, **missing)
    if "all_queries" not in scorer.needs:
        return inputs
    chunk = ChunkInputs(query, inputs.key, 0, inputs.scale, rotary=inputs.rotary)
    return dataclasses.replace(inputs, observed=scorer.observe(chunk, None))
