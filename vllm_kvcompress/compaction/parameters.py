"""What scoring must know of attention layers: of each, and of all as fused ops want it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_kvcompress import ops
from vllm_kvcompress.ops.transfers import to_device
from vllm_kvcompress.policies.base import Rotary


@dataclass(frozen=True)
class LayerParameters:
    """What scoring must know of one attention layer.

    Attributes:
        scale: factor on query-key products.
        logits_soft_cap: attention logits are squashed into (-cap, cap); 0 = not.
        output_weight: [H, g, d, m] of the output projection, if a scorer needs it.
        output_root: [H, d, d] root of the output projection's squares, if a scorer needs it.
        rotary: position encoding, if a scorer needs it.
        sinks: [H, g] float32 logits of attention sinks, if the layer has them.
    """

    scale: float
    logits_soft_cap: float = 0.0
    output_weight: torch.Tensor | None = None
    output_root: torch.Tensor | None = None
    rotary: Rotary | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class StackedParameters:
    """`LayerParameters` of L layers, in their order.

    Attributes:
        scale: [L] float32.
        logits_soft_cap: [L] float32, 0 where logits are not capped; 0.0 if they nowhere are.
        sinks: [L, H, g] float32, -inf where a layer has none; None if no layer has any.
        output_root: [L, H, d, d] in the pool's type; None if the scorer needs none.
    """

    scale: torch.Tensor
    logits_soft_cap: torch.Tensor | float
    sinks: torch.Tensor | None
    output_root: torch.Tensor | None

    @classmethod
    def of(cls, layers: Sequence[LayerParameters], pool: torch.Tensor) -> StackedParameters:
        """On the pool's device."""
        numbers = np.array([[x.scale, x.logits_soft_cap] for x in layers], np.float32)
        scale, soft_cap = to_device(numbers.T.copy(), pool.device)
        return cls(
            scale,
            soft_cap if numbers[:, 1].any() else 0.0,
            _stacked_sinks(layers),
            _stacked_roots(layers, pool),
        )

    def options(self, first: int, num_layers: int) -> dict[str, Any]:
        """Arguments of `ops.planned_scores` for some layers one after another."""
        layers = slice(first, first + num_layers)
        soft_cap = self.logits_soft_cap
        logits = ops.Logits(
            self.scale[layers],
            soft_cap if isinstance(soft_cap, float) else soft_cap[layers],
            None if self.sinks is None else self.sinks[layers].flatten(1),
        )
        return {
            "logits": logits,
            "output_root": None if self.output_root is None else self.output_root[layers],
        }


def _stacked_roots(layers: Sequence[LayerParameters], pool: torch.Tensor) -> torch.Tensor | None:
    roots = [layer.output_root for layer in layers if layer.output_root is not None]
    if not roots:
        return None
    assert len(roots) == len(layers)
    stacked = torch.empty((len(roots), *roots[0].shape), dtype=pool.dtype, device=roots[0].device)
    # One by one: there are no copies of all of them beside each other.
    for own, root in zip(stacked, roots, strict=True):
        own.copy_(root)
    return stacked


def _stacked_sinks(layers: Sequence[LayerParameters]) -> torch.Tensor | None:
    some = next((layer.sinks for layer in layers if layer.sinks is not None), None)
    if some is None:
        return None
    none = torch.full_like(some, float("-inf"))
    return torch.stack([none if layer.sinks is None else layer.sinks for layer in layers])
