"""What a scorer sees and what it must give back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_kvcompress.ops import WindowPlan

NEEDS = ("window_query", "value", "output_weight", "output_root", "all_queries", "rotary")
# The `scope_reason` of several scorers.
EVERY_HEAD_ALIKE = "it scores all heads of a layer alike, so they cannot compete"


@dataclass(frozen=True)
class Rotary:
    """Rotary position encoding of a layer (RoPE, arXiv 2104.09864).

    Attributes:
        cos_sin: [positions, rotary_dim] float, cosines in the first half, sines in the second.
        is_neox_style: whether element i pairs with element i + rotary_dim / 2 (else elements
            2i and 2i + 1 pair). Elements past rotary_dim are not rotated.
    """

    cos_sin: torch.Tensor
    is_neox_style: bool = True

    def unrotate(self, query: torch.Tensor, first: int) -> torch.Tensor:
        """Undo the rotation (and scaling) of queries at positions first, first + 1, ...

        Args:
            query: [..., m, d], rotated.
            first: position of the first of the m.

        Returns:
            [..., m, d] float32.
        """
        cos_sin = self.cos_sin[first : first + query.shape[-2]].float()
        cos, sin = cos_sin.chunk(2, dim=-1)
        # 1, unless the encoding also scales, as YaRN's does.
        size = cos**2 + sin**2
        return self._rotate(query.float(), cos / size, -sin / size)

    def mean_rotation(self, first: int, count: int, head_size: int) -> torch.Tensor:
        """Mean of the rotation matrices at positions first .. first + count - 1.

        Positions past the table take the table's last entry.

        Returns:
            [d, d] float32; a column vector q is rotated by `matrix @ q`.
        """
        last = self.cos_sin.shape[0] - 1
        positions = torch.arange(first, first + count, device=self.cos_sin.device).clamp(max=last)
        cos, sin = self.cos_sin[positions].float().mean(dim=0).chunk(2, dim=-1)
        identity = torch.eye(head_size, device=self.cos_sin.device)
        # Row i of the result is the rotated i-th unit vector, which is column i of the matrix.
        return self._rotate(identity, cos, sin).t()

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rotary_dim = self.cos_sin.shape[-1]
        rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        if self.is_neox_style:
            a, b = rotated.chunk(2, dim=-1)
            out = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
            out = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([out, rest], dim=-1)


@dataclass(frozen=True)
class ScoreInputs:
    """One layer of one prompt, in token order. Nothing here may be written to.

    H is the number of KV heads, g of query heads per KV head, n of prompt tokens,
    w of window tokens, d the head size. Optional fields are None unless the scorer's
    `needs` names them.

    Attributes:
        key: [H, n, d], any float dtype, positions already encoded.
        num_candidates: tokens [0, num_candidates) compete; the rest is always kept.
        budget_tokens: candidates that a head keeps, on average over heads and layers.
        scale: factor on query-key products.
        logits_soft_cap: attention logits are squashed into (-cap, cap); 0 = not.
        sinks: [H, g] float32, a learned logit per query head that takes part in the model's
            softmax but has no value; None where the model has none. Weights of attention count it.
        layer: index of the layer among the compressed ones, 0-based.
        earlier_scores: what the scorer gave back for layers [0, layer).
        window_query: [H, g, w, d], the queries of the last w tokens.
        value: [H, n, d], any float dtype.
        output_weight: [H, g, d, m], what the output projection does to each query head's
            values, m the hidden size.
        output_root: [H, d, d] float32 R with R Rᵀ = mean over query heads of W Wᵀ, W their
            [d, m] of `output_weight`; ||v R||_2 is how much a value v moves the layer's output.
        observed: what `observe` made of all n queries (need 'all_queries').
        rotary: the layer's position encoding.
    """

    key: torch.Tensor
    num_candidates: int
    budget_tokens: int
    scale: float
    logits_soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    layer: int = 0
    earlier_scores: Sequence[LayerScores] = ()
    window_query: torch.Tensor | None = None
    value: torch.Tensor | None = None
    output_weight: torch.Tensor | None = None
    output_root: torch.Tensor | None = None
    observed: Any = None
    rotary: Rotary | None = None

    @property
    def num_tail_tokens(self) -> int:
        """Prompt tokens that are kept in any case."""
        return self.key.shape[1] - self.num_candidates


@dataclass(frozen=True)
class ChunkInputs:
    """Some consecutive queries of one layer of a prompt, for scorers that need all of them.

    Attributes:
        query: [H, g, m, d], positions encoded, tokens first .. first + m - 1 of the prompt.
        key: [H, first + m, d], every key up to the last of them.
        first: position of the first query.
        scale, logits_soft_cap, sinks, rotary: as in `ScoreInputs`.
    """

    query: torch.Tensor
    key: torch.Tensor
    first: int
    scale: float
    logits_soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    rotary: Rotary | None = None


@dataclass(frozen=True)
class LayerScores:
    """Importance of every candidate of a layer, higher is kept first.

    Attributes:
        first: [H, num_candidates] float32, no NaN; +inf means "keep before all others".
            Decides how many tokens each head keeps, and which.
        second: like `first`, or None. If given, `first` fills only a share of each head's
            budget, and `second` the rest (the two stages of CriticalKV).
    """

    first: torch.Tensor
    second: torch.Tensor | None = None


@dataclass(frozen=True)
class Scorer(ABC):
    """Rates prompt tokens.

    A scorer is a frozen dataclass. Its fields are its options, each made by `options.option`. A
    scorer that gives two scores has the option `first_stage`, a share in [0, 1]: selection reads
    it, because it depends on each head's budget.

    Attributes:
        needs: optional inputs that the engine must provide, of `NEEDS`. An engine that
            cannot provide one refuses the method at start-up.
        scope: how far scores can be compared, of `recipes.SCOPES`.
        scope_reason: why not over the whole model; follows "because".
        signed: whether scores can be negative, so that their squares mean nothing.
        rates_window: whether tokens of the window are rated too, so that they can be evicted.
        budgets, window, granularity: defaults of the method of this name. Like those below they
            are read of scorers from other packages; this package's methods stand in `recipes.py`.
        summary: of that method, one line for the user; empty = the docstring's first line.
        source: where it comes from; empty = the package that brings it.
        weakness: as in `recipes.Recipe`; engines warn of it.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[str] = "model"
    scope_reason: ClassVar[str] = ""
    signed: ClassVar[bool] = False
    rates_window: ClassVar[bool] = False
    budgets: ClassVar[str] = "uniform"
    window: ClassVar[int] = 32
    granularity: ClassVar[str] = "page"
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    weakness: ClassVar[str] = ""

    @abstractmethod
    def score(self, inputs: ScoreInputs) -> LayerScores:
        """Importance of every candidate of one layer."""

    def observe(self, inputs: ChunkInputs, state: Any) -> Any:
        """Take in a chunk of queries; called in token order if `needs` has 'all_queries'.

        Args:
            inputs: the chunk.
            state: what the call for the chunk before gave back; None at position 0.

        Returns:
            The new state, which `score` gets as `observed`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not look at all queries")

    def window_plan(self) -> WindowPlan | None:
        """How ops that read pages make the same scores; None if only `score` can."""
        return None
