"""Small inputs of scorers: random ones of any shape, and the rotary encodings of the tests."""

from __future__ import annotations

import torch

from vllm_kvcompress.policies.base import ChunkInputs, Rotary, ScoreInputs

HIDDEN_SIZE = 10


def rotary(rotary_dim=8, is_neox_style=True, num_positions=512, scaling=1.0):
    """A RoPE table of base 100, so that small tests see every frequency turn."""
    inv_freq = 100.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(num_positions)[:, None] * inv_freq
    table = torch.cat([angles.cos(), angles.sin()], dim=-1) * scaling
    return Rotary(table, is_neox_style)


def random_inputs(
    seed=0,
    num_heads=2,
    group=3,
    num_tokens=61,
    head_size=8,
    window=5,
    num_candidates=None,
    budget_tokens=16,
    sharpness=1.5,
    dtype=torch.float32,
    **rest,
):
    """ScoreInputs with every optional tensor; `query` holds all tokens' queries.

    Returns:
        The inputs, and query [H, g, n, d].
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    query = normal(num_heads, group, num_tokens, head_size) * sharpness
    inputs = ScoreInputs(
        key=normal(num_heads, num_tokens, head_size),
        num_candidates=num_tokens - window if num_candidates is None else num_candidates,
        budget_tokens=budget_tokens,
        scale=head_size**-0.5,
        window_query=query[:, :, num_tokens - window :],
        value=normal(num_heads, num_tokens, head_size),
        output_weight=normal(num_heads, group, head_size, HIDDEN_SIZE),
        output_root=normal(num_heads, head_size, head_size).float(),
        rotary=rotary(head_size),
        **rest,
    )
    return inputs, query


def observe(scorer, inputs, query, bounds=()):
    """What a scorer makes of all queries, shown in chunks that end at `bounds` and at the end."""
    state, first = None, 0
    for end in (*bounds, query.shape[2]):
        chunk = ChunkInputs(
            query=query[:, :, first:end],
            key=inputs.key[:, :end],
            first=first,
            scale=inputs.scale,
            logits_soft_cap=inputs.logits_soft_cap,
            sinks=inputs.sinks,
            rotary=inputs.rotary,
        )
        state = scorer.observe(chunk, state)
        first = end
    return state
