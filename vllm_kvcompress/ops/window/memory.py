"""Memory that window ops take on the way to scores."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.window.plan import WindowPlan


def score_width(num_entries: int) -> int:
    """Room for a row of scores: a multiple of 16, since Triton compiles a kernel for each kind."""
    return -(-num_entries // 16) * 16


def empty_scores(*size: int, device: torch.device, backend: str) -> torch.Tensor:
    """float32; rows have `score_width` of room for Triton."""
    if backend != "triton":
        return torch.empty(size, dtype=torch.float32, device=device)
    room = torch.empty(*size[:-1], score_width(size[-1]), dtype=torch.float32, device=device)
    return room[..., : size[-1]]


def token_score_bytes(plan: WindowPlan, num_rated: int, *, window: int, group: int) -> int:
    """Most bytes that 'triton' takes for one stream on the way to a prompt's scores.

    Args:
        plan: of the scorer.
        num_rated: tokens with a score, as many as the longest prompt of the batch has.
        window: queries of a window.
        group: query heads per KV head.
    """
    is_defensive = plan.reduce == "defensive"
    groups = 1 if is_defensive else group
    numbers = score_width(num_rated) * (groups + int(plan.uses_value_effect))
    if plan.span_kernel > 1:
        # Tiles of 256 with what lies beside them.
        numbers += -(-num_rated // 256) * (256 + 32)
    if is_defensive:
        # Parts of 34 tokens at least.
        numbers += -(-num_rated // 34)
    # Four sums of each query row in 16 pieces of the keys; rows are filled up to powers of two.
    rows = max(16, _next_power_of_2(window)) * _next_power_of_2(group)
    return 4 * (numbers + 16 * 4 * rows)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
