"""Presses on the caches of one prompt: one job per press and ratio, attended to as one batch.

Runs where kvpress 0.5.5 is installed, without vLLM and without this package; see kvpress_runner.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import kvpress
import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FULL = "full"
PRESSES: dict[str, Callable[..., kvpress.BasePress]] = {
    "snapkv": kvpress.SnapKVPress,
    "pyramidkv": kvpress.PyramidKVPress,
    "ada-snapkv": lambda **options: kvpress.AdaKVPress(kvpress.SnapKVPress(**options)),
    "criticalkv": lambda **options: kvpress.CriticalKVPress(kvpress.SnapKVPress(**options)),
    "ada-criticalkv": lambda **options: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(**options)),
    "chunkkv": lambda **options: kvpress.ChunkKVPress(kvpress.SnapKVPress(**options)),
    # Weighs by the norm of the values (use_vnorm) by default.
    "expected-attention": kvpress.ExpectedAttentionPress,
    "ada-expected-attention": lambda **options: kvpress.AdaKVPress(
        kvpress.ExpectedAttentionPress(**options)
    ),
    "h2o": kvpress.ObservedAttentionPress,
    "tova": kvpress.TOVAPress,
    "keydiff": kvpress.KeyDiffPress,
    "ada-keydiff": lambda **options: kvpress.AdaKVPress(kvpress.KeyDiffPress(**options)),
    "knorm": kvpress.KnormPress,
    "streamingllm": kvpress.StreamingLLMPress,
    "random": functools.partial(kvpress.RandomPress, seed=0),
}
# Presses with a window of last queries.
WINDOWED = {"snapkv", "pyramidkv", "ada-snapkv", "criticalkv", "ada-criticalkv", "chunkkv"}


@dataclass
class Job:
    """One press at one ratio on one prompt, and the cache that it left.

    Attributes:
        name: of the press.
        ratio: fraction removed.
        window: last queries that it looks at; None if it has none.
        press: kvpress' object; None = the full cache.
        cache: one layer's [1, H, tokens, d] keys and values each, as the press leaves them.
        masked: per layer, kvpress' (batch, head, token) indices of removed tokens that are still
            in the cache; None if there are none.
    """

    name: str
    ratio: float
    window: int | None = None
    press: kvpress.BasePress | None = None
    cache: transformers.DynamicCache = field(default_factory=transformers.DynamicCache)
    masked: list[tuple[torch.Tensor, ...] | None] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, ratio: float, window: int | None) -> Job:
        """A job by its press' name, or the full cache's; window None = kvpress' own default."""
        if name == FULL:
            return cls(name, 0.0)
        options = {"compression_ratio": ratio}
        if name not in WINDOWED:
            return cls(name, ratio, None, PRESSES[name](**options))
        window = window or kvpress.SnapKVPress.window_size
        return cls(name, ratio, window, PRESSES[name](**options, window_size=window))

    def kept_tokens(self) -> float:
        """Tokens that can be attended to now, per KV head, mean over layers and heads."""
        kept = []
        for layer, masked in zip(self.cache.layers, self.masked, strict=True):
            _, num_heads, num_tokens, _ = layer.keys.shape
            num_masked = 0 if masked is None else len(masked[0])
            kept.append(num_tokens - num_masked / num_heads)
        return sum(kept) / len(kept)


class LayerMemo:
    """Lets jobs share what does not depend on the ratio, within one layer of a prefill."""

    def __init__(self) -> None:
        self.values: dict[Any, torch.Tensor] = {}

    def wrap(self, key: Any, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The function, computed once per layer and key."""

        def call(*args: Any) -> torch.Tensor:
            if key not in self.values:
                self.values[key] = function(*args)
            # Presses write into their scores.
            return self.values[key].clone()

        return call

    def wrap_scores(self, job: Job) -> None:
        """Share the scores of a job's innermost press."""
        scorer = job.press
        while hasattr(scorer, "press"):
            scorer = scorer.press
        if not isinstance(scorer, kvpress.StreamingLLMPress | None):
            scorer.score = self.wrap((type(scorer).score, job.window), scorer.score)


class JobCaches:
    """Stands in for a model's cache: one job's cache per row of the batch."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Append [J, H, T, d] rows to the jobs' caches; returns each job's keys and values."""
        pairs = [
            job.cache.update(keys[row : row + 1], values[row : row + 1], layer_idx)
            for row, job in enumerate(self.jobs)
        ]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def attend_jobs(
    module: nn.Module,
    query: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    attention_mask: None,
    jobs: Sequence[Job],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """kvpress' patched attention for each row [1, Hq, T, d] of the batch on its job's cache."""
    patched = ALL_ATTENTION_FUNCTIONS["sdpa"]
    _, num_heads, num_queries, head_size = query.shape
    if num_queries == 1:
        # The query heads of a KV head as its queries: the same sums, and PyTorch's CPU kernel
        # is 5 times quicker in bfloat16. They all see every key.
        query = query.view(len(jobs), keys[0].shape[1], -1, head_size)
        kwargs["is_causal"] = False
    outputs = []
    for row, job in enumerate(jobs):
        # The patch replaces the masked keys by ones that no query sees.
        module.masked_key_indices = job.masked[module.layer_idx]
        # Layers may differ in length, so one mask for the model would not do.
        mask = causal_mask(num_queries, keys[row].shape[2])
        output = patched(module, query[row : row + 1], keys[row], values[row], mask, **kwargs)
        outputs.append(output[0])
    module.masked_key_indices = None
    output = torch.cat(outputs)
    if num_queries == 1:
        output = output.transpose(1, 2).reshape(len(jobs), 1, num_heads, head_size)
    return output, None


@functools.lru_cache(maxsize=64)
def causal_mask(num_queries: int, num_keys: int) -> torch.Tensor | None:
    """[1, 1, T, keys] bool, True = seen, for the last T of the keys; None if all is seen."""
    if num_queries == 1:
        return None
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool)
    return mask.tril(num_keys - num_queries)[None, None]
