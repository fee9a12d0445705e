"""transformers' model with attention written here: every head reads what it is told to.

The independent check of compressed decode. No pages, no blocks: one forward pass over prompt and
text, in which the text's tokens see no evicted key.
"""

from __future__ import annotations

from typing import Any

import torch


class PlainModel:
    """A causal language model in float32 on the CPU.

    Args:
        path: folder of the model.
        drop_sinks: leave attention sinks out, to see that they matter.
    """

    def __init__(self, path: str, drop_sinks: bool = False):
        from transformers import AttentionInterface, AutoModelForCausalLM

        self._drop_sinks = drop_sinks
        self._prompt_len = 0
        self._kept: list[list[torch.Tensor]] = []
        self._num_candidates = 0
        # Of the last call, per layer with full attention and keys: [Hq, n, n] float32.
        self.weights: list[torch.Tensor] = []
        name = f"plain_{id(self)}"
        AttentionInterface.register(name, self._attend)
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=name
        ).eval()

    def logprobs(
        self,
        tokens: list[int],
        prompt_len: int,
        kept: list[list[torch.Tensor]] | None = None,
        num_candidates: int = 0,
    ) -> torch.Tensor:
        """Log-probabilities of every next token.

        Args:
            tokens: prompt and text.
            prompt_len: tokens before that see all before them.
            kept: per layer with full attention and keys, and per KV head, the positions below
                `num_candidates` that the tokens behind the prompt see; None = all.
            num_candidates: positions from here on are seen by every later token.

        Returns:
            [n, vocabulary] float32.
        """
        self._prompt_len, self._num_candidates = prompt_len, num_candidates
        self._kept, self.weights = kept or [], []
        with torch.no_grad():
            logits = self._model(torch.tensor([tokens]), use_cache=False).logits[0]
        return logits.float().log_softmax(dim=-1)

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        sliding_window: int | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention function: query [1, Hq, n, d], key and value [1, H, n, d]."""
        (query,), (key,), (value,) = query, key, value
        num_heads, num_tokens, _ = key.shape
        group = query.shape[0] // num_heads
        # It has the keys of the last layer before it that has some.
        is_reader = getattr(module, "is_kv_shared_layer", False)
        owner = len(self.weights) - 1 if is_reader else len(self.weights)
        positions = torch.arange(num_tokens)
        age = positions[:, None] - positions
        is_seen = (age >= 0).repeat(num_heads, 1, 1)
        if sliding_window is not None:
            is_seen &= age < sliding_window
        elif self._kept:
            behind, before = slice(self._prompt_len, None), slice(self._num_candidates)
            for head, kept in enumerate(self._kept[owner]):
                is_seen[head, behind, before] = torch.isin(positions[before], kept)
        logits = torch.einsum("hgmd,hnd->hgmn", query.unflatten(0, (num_heads, group)), key)
        logits = (logits * scaling).masked_fill(~is_seen[:, None], -torch.inf)
        if s_aux is not None and not self._drop_sinks:
            column = s_aux.view(num_heads, group, 1, 1).expand(-1, -1, num_tokens, 1)
            logits = torch.cat([logits, column], dim=-1)
        weights = logits.softmax(dim=-1)[..., :num_tokens]
        if sliding_window is None and not is_reader:
            self.weights.append(weights.flatten(0, 1))
        out = torch.einsum("hgmn,hnd->mhgd", weights, value)
        return out.flatten(1, 2)[None], None
