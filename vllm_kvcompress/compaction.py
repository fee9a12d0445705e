"""Compaction of one prompt at the end of its prefill, layer by layer, on the paged pool.

Knows pages and scores, not vLLM: the attention backend feeds it queries and block ids. L is
the number of layers, H of KV heads on this rank, g of query heads per KV head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import RequestGeometry
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.base import ScoreInputs
from vllm_kvcompress.policies.selection import Selection, select


@dataclass(frozen=True)
class CacheShape:
    """Shape of the paged cache on this rank: L, H, g, head size, tokens per block."""

    num_layers: int
    num_kv_heads: int
    num_queries_per_kv: int
    head_size: int
    block_size: int

    @property
    def pages_per_block(self) -> int:
        """Pages that one block owns, L * H."""
        return self.num_layers * self.num_kv_heads


@dataclass
class PromptCompaction:
    """What is collected of one prompt until it is compacted.

    Attributes:
        geometry: where its pages go.
        window_query: [L, H, g, w, d] queries of the last w prompt tokens, filled chunk by
            chunk; None until the first chunk that reaches the window, and after compaction.
        num_window_queries: [L] how many of them are there, per layer.
        layer_scores: [H, candidate tokens] float32 per layer, None where not scored yet.
    """

    geometry: RequestGeometry
    num_layers: int
    window_query: torch.Tensor | None = None
    num_window_queries: list[int] = field(init=False)
    layer_scores: list[torch.Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        self.num_window_queries = [0] * self.num_layers
        self.layer_scores = [None] * self.num_layers

    @property
    def is_scored(self) -> bool:
        """Whether every layer has been scored."""
        return all(scores is not None for scores in self.layer_scores)


class Compactor:
    """Scores prompts and moves what they keep into their regions.

    Args:
        config: validated setting.
        shape: of the paged cache.
        order: element order of its pages.
    """

    def __init__(self, config: KVCompressConfig, shape: CacheShape, order: PageOrder) -> None:
        self.config = config
        self.shape = shape
        self.order = order
        self.scorer = make_scorer(config)

    def save_window_queries(
        self, prompt: PromptCompaction, layer: int, query: torch.Tensor, first: int
    ) -> None:
        """Keep the queries of one chunk's window tokens.

        Args:
            prompt: the prompt they belong to; written to.
            layer: 0-based index among the compressed layers.
            query: [m, H * g, d], consecutive tokens, not kept by reference.
            first: index inside the window of the first of them.
        """
        if not self.scorer.needs_window_queries:
            return
        shape, window = self.shape, self.config.window
        if prompt.window_query is None:
            size = (
                shape.num_layers,
                shape.num_kv_heads,
                shape.num_queries_per_kv,
                window,
                shape.head_size,
            )
            prompt.window_query = query.new_empty(size)
        if first == 0:
            prompt.num_window_queries[layer] = 0
        assert prompt.num_window_queries[layer] == first, (
            f"window queries of layer {layer} arrive at {first}, "
            f"expected {prompt.num_window_queries[layer]}"
        )
        num_tokens = query.shape[0]
        grouped = query.view(
            num_tokens, shape.num_kv_heads, shape.num_queries_per_kv, shape.head_size
        )
        prompt.window_query[layer, :, :, first : first + num_tokens] = grouped.permute(1, 2, 0, 3)
        prompt.num_window_queries[layer] = first + num_tokens

    def score_layer(
        self,
        prompt: PromptCompaction,
        layer: int,
        pool: torch.Tensor,
        prompt_blocks: torch.Tensor,
        scale: float,
        logits_soft_cap: float,
    ) -> None:
        """Score one layer of a prompt whose keys are all in the pool.

        Args:
            prompt: written to.
            layer: 0-based index among the compressed layers.
            pool: [num_pages, page_elements].
            prompt_blocks: [ceil(n / block_size)] int64 block ids in token order.
            scale, logits_soft_cap: as in the layer's attention.
        """
        shape = self.shape
        heads = torch.arange(shape.num_kv_heads)
        page_ids = (
            prompt_blocks[None, :] * shape.pages_per_block
            + layer * shape.num_kv_heads
            + heads[:, None]
        )
        key = ops.unpack_pages(pool, page_ids, self.order.key_offsets)
        window_query = None
        if self.scorer.needs_window_queries:
            assert prompt.window_query is not None
            assert prompt.num_window_queries[layer] == self.config.window
            window_query = prompt.window_query[layer]
        prompt.layer_scores[layer] = self.scorer.score(
            ScoreInputs(
                key=key[:, : prompt.geometry.prompt_len],
                num_candidates=prompt.geometry.num_candidate_tokens,
                scale=scale,
                window_query=window_query,
                logits_soft_cap=logits_soft_cap,
                layer=layer,
            )
        )

    def compact(
        self,
        prompt: PromptCompaction,
        pool: torch.Tensor,
        prompt_blocks: torch.Tensor,
        region_blocks: torch.Tensor,
    ) -> Selection:
        """Select over all layers and copy what is kept into the region.

        Args:
            prompt: fully scored; its scores and queries are dropped.
            pool: [num_pages, page_elements], written at the region's pages only.
            prompt_blocks: as in `score_layer`; never written to.
            region_blocks: [num_region_blocks] int64 block ids.

        Returns:
            What was kept; its `page_offsets` address the region.
        """
        assert prompt.is_scored
        shape, geometry = self.shape, prompt.geometry
        scores = torch.stack([s for s in prompt.layer_scores if s is not None])
        prompt.layer_scores = [None] * shape.num_layers
        prompt.window_query = None
        selection = select(scores, self.config, geometry.num_region_blocks, geometry.block_size)
        target = ops.region_page_ids(region_blocks, shape.pages_per_block)
        streams = torch.arange(shape.pages_per_block)
        stream_of_page = streams.repeat_interleave(selection.num_pages.reshape(-1))
        if selection.granularity == "page":
            source = prompt_blocks[selection.indices] * shape.pages_per_block + stream_of_page
            ops.copy_pages(pool, source, target)
        else:
            self._gather_tokens(pool, prompt_blocks, selection, stream_of_page, target)
        return selection

    def _gather_tokens(
        self,
        pool: torch.Tensor,
        prompt_blocks: torch.Tensor,
        selection: Selection,
        stream_of_page: torch.Tensor,
        target: torch.Tensor,
    ) -> None:
        block_size = self.shape.block_size
        stream_of_token = stream_of_page.repeat_interleave(block_size)
        # One row per kept token: its source page, and its elements inside that page.
        source_blocks = prompt_blocks[selection.indices // block_size]
        source = source_blocks * self.shape.pages_per_block + stream_of_token
        slots = selection.indices % block_size
        key = pool[source[:, None], self.order.key_offsets[slots]]
        value = pool[source[:, None], self.order.value_offsets[slots]]
        ops.pack_pages(pool, target, key, value, self.order)
