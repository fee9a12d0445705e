"""Windows of prompts that are kept, layer after layer, until several layers are scored together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_kvcompress.compaction.prompts import PromptCompaction


@dataclass(frozen=True)
class Window:
    """Queries of a prompt's last tokens in one layer.

    Attributes:
        query: [w, H * g, d].
        lse: [w, H * g] float32 logarithm of each one's sum over its keys, if attention has told it.
    """

    query: torch.Tensor
    lse: torch.Tensor | None = None


class LayerWindows:
    """Windows of R prompts in n layers: of those whose step has all of it, and of the others.

    Args:
        num_layers: n.
        num_prompts: R, the ones whose step has the whole window first.
    """

    def __init__(self, num_layers: int, num_prompts: int) -> None:
        self._size = (num_layers, num_prompts)
        self._query: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def keep(self, index: int, windows: Sequence[Window]) -> None:
        """Copy one layer's windows of the first prompts; one launch, and one for the lse.

        Args:
            index: of the layer among the n.
            windows: of as many prompts as there are.
        """
        lses = [window.lse for window in windows if window.lse is not None]
        assert len(lses) in (0, len(windows))
        query, lse = self._tensors(windows[0].query, lses[0] if lses else None)
        torch.stack([window.query for window in windows], out=query[index, : len(windows)])
        if lse is not None:
            torch.stack(lses, out=lse[index, : len(windows)])

    def take(self, place: int, prompt: PromptCompaction, first: int, num_layers: int) -> None:
        """Copy what was collected of a prompt over several steps.

        Args:
            place: of the prompt among the R.
            prompt: fully collected in these layers.
            first: the first of the layers, number 0 here.
            num_layers: number of them, at most n.
        """
        assert prompt.window_query is not None
        layers = slice(first, first + num_layers)
        # [n, w, H * g, d]
        collected = prompt.window_query[layers].permute(0, 3, 1, 2, 4).flatten(2, 3)
        lse = None if prompt.window_lse is None else prompt.window_lse[layers]
        own_query, own_lse = self._tensors(collected[0], None if lse is None else lse[0])
        own_query[:num_layers, place] = collected
        if own_lse is not None and lse is not None:
            own_lse[:num_layers, place] = lse

    def _tensors(
        self, query: torch.Tensor, lse: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[n, R, w, H * g, d] and [n, R, w, H * g], allocated for windows like this one."""
        if self._query is None:
            self._query = query.new_empty(*self._size, *query.shape)
            if lse is not None:
                self._lse = lse.new_empty(*self._size, *lse.shape)
        # What attention tells, it tells of all prompts.
        assert (self._lse is None) == (lse is None)
        return self._query, self._lse

    def of_layers(self, num_layers: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[R, n, w, H * g, d] queries and, if attention told it, [R, n, w, H * g] float32 lse."""
        assert self._query is not None
        lse = None if self._lse is None else self._lse[:num_layers].transpose(0, 1)
        return self._query[:num_layers].transpose(0, 1), lse
