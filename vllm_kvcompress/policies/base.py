"""What a scorer sees and what it must give back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class ScoreInputs:
    """One layer of one prompt, in token order. Nothing here may be written to.

    H is the number of KV heads, g of query heads per KV head, n of prompt tokens,
    w of window tokens, d the head size.

    Attributes:
        key: [H, n, d], any float dtype, positions already encoded.
        num_candidates: tokens [0, num_candidates) compete; the rest is always kept.
        scale: factor on query-key products.
        window_query: [H, g, w, d], the queries of the last w tokens; None unless the
            scorer declares `needs_window_queries`.
        logits_soft_cap: attention logits are squashed into (-cap, cap); 0 = not.
        layer: index of the layer among the compressed ones, 0-based.
    """

    key: torch.Tensor
    num_candidates: int
    scale: float
    window_query: torch.Tensor | None
    logits_soft_cap: float
    layer: int


class Scorer(ABC):
    """Rates prompt tokens; keyword arguments of the constructor are the method's options."""

    needs_window_queries: ClassVar[bool] = False

    @abstractmethod
    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Importance of every candidate, higher is kept first.

        Returns:
            [H, num_candidates] float32, no NaN; +inf means "keep before all others".
        """
