"""What is known of a prompt until it is compacted, and where its pages are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_kvcompress.memory import CacheShape, RequestGeometry
from vllm_kvcompress.policies.base import LayerScores


@dataclass(frozen=True)
class LayerPages:
    """Where the keys and values of one layer of a prompt are.

    Attributes:
        pool: [num_pages, page_elements].
        blocks: [n] int64 block ids in token order.
        pages_per_block: pages of one block.
        first: of a block's pages, the one of this layer's head 0.
    """

    pool: torch.Tensor
    blocks: torch.Tensor
    pages_per_block: int
    first: int

    @classmethod
    def of_pool(
        cls, pool: torch.Tensor, shape: CacheShape, layer: int, blocks: torch.Tensor
    ) -> LayerPages:
        """One layer of the prompt that lies in `blocks` of the cache's own pool."""
        return cls(pool, blocks, shape.pages_per_block, layer * shape.num_kv_heads)

    def page_ids(self, blocks: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Page ids of block ids and heads, which broadcast."""
        return blocks * self.pages_per_block + self.first + heads


@dataclass
class PromptCompaction:
    """What is collected of one prompt until it is compacted.

    Attributes:
        geometry: where its pages go.
        window_query: [L, H, g, w, d] queries of the last w tokens, filled chunk by chunk; None
            until the first chunk that reaches the window, and after compaction. Fused ops take
            the queries of a step that has the whole window as they are.
        window_lse: [L, w, H * g] float32, what the prompt's attention told of these queries: the
            logarithm of each one's sum over its keys; None if it tells nothing.
        num_window_queries: [L] how many of them are there, per layer.
        observed: [L] what the scorer has made of all queries so far.
        num_observed: [L] how many queries that were.
        layer_scores: of the layers scored so far by the scorer itself.
    """

    geometry: RequestGeometry
    num_layers: int
    window_query: torch.Tensor | None = None
    window_lse: torch.Tensor | None = field(init=False)
    num_window_queries: list[int] = field(init=False)
    observed: list[Any] = field(init=False)
    num_observed: list[int] = field(init=False)
    layer_scores: list[LayerScores] = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop everything collected."""
        self.window_query = None
        self.window_lse = None
        self.num_window_queries = [0] * self.num_layers
        self.observed = [None] * self.num_layers
        self.num_observed = [0] * self.num_layers
        self.layer_scores = []
