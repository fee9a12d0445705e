"""Compaction of one prompt once it is computed, layer by layer, on the paged pool.

Knows pages and scores, not vLLM: the attention backend feeds it queries and block ids. L is
the number of layers, H of KV heads on this rank, g of query heads per KV head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.candidates import Candidates, LayerPages
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import RequestGeometry, cdiv
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.base import (
    ChunkInputs,
    LayerScores,
    Rotary,
    ScoreInputs,
    WindowPlan,
)
from vllm_kvcompress.policies.selection import Selection, select, share_pages


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

    def layer_pages(self, pool: torch.Tensor, layer: int, blocks: torch.Tensor) -> LayerPages:
        """One layer of the prompt that lies in `blocks` of the cache's own pool."""
        return LayerPages(pool, blocks, self.pages_per_block, layer * self.num_kv_heads)


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


@dataclass
class PromptCompaction:
    """What is collected of one prompt until it is compacted.

    Attributes:
        geometry: where its pages go.
        window_query: [L, H, g, w, d] queries of the last w tokens, filled chunk by chunk;
            None until the first chunk that reaches the window, and after compaction.
        window_lse: [L, w, H * g] float32, what the prompt's attention told of these queries: the
            logarithm of each one's sum over its keys; None if it tells nothing.
        num_window_queries: [L] how many of them are there, per layer.
        observed: [L] what the scorer has made of all queries so far.
        num_observed: [L] how many queries that were.
        layer_scores: of the layers scored so far.
        candidates: what is held of a prompt that has no blocks; None for one that has.
    """

    geometry: RequestGeometry
    num_layers: int
    window_query: torch.Tensor | None = None
    window_lse: torch.Tensor | None = field(init=False)
    num_window_queries: list[int] = field(init=False)
    observed: list[Any] = field(init=False)
    num_observed: list[int] = field(init=False)
    layer_scores: list[LayerScores] = field(init=False)
    candidates: Candidates | None = field(init=False)

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
        self.candidates = None

    @property
    def is_scored(self) -> bool:
        """Whether every layer has been scored."""
        return len(self.layer_scores) == self.num_layers


class Compactor:
    """Scores prompts and moves what they keep into their regions.

    Args:
        config: validated setting.
        shape: of the paged cache.
        order: element order of its pages.
        layers: one per layer; what the method's scorer needs must be there.
        backend: 'torch', or 'native' for all that compiled ops can do of the method.

    Raises:
        ValueError: if what the scorer needs is not there.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        shape: CacheShape,
        order: PageOrder,
        layers: Sequence[LayerParameters],
        backend: str = "torch",
    ) -> None:
        self.config = config
        self.shape = shape
        self.order = order
        self.backend = backend
        self.scorer = make_scorer(config)
        plan = self.scorer.window_plan() if backend == "native" else None
        self._plan = plan if plan is not None and plan.fits_ops else None
        self.use_parameters(layers)

    def use_parameters(self, layers: Sequence[LayerParameters]) -> None:
        """Score with these from now on.

        Raises:
            ValueError: if what the scorer needs is not there.
        """
        for need in ("output_weight", "output_root", "rotary"):
            if need in self.scorer.needs and any(getattr(x, need) is None for x in layers):
                raise ValueError(f"method {self.config.method!r} needs every layer's {need}")
        self.layers = layers
        self._output_roots = [
            None if layer.output_root is None else layer.output_root.contiguous()
            for layer in layers
        ]

    @property
    def ops_name(self) -> str:
        """What computes, for people: the backend, and which part of the work it leaves to torch."""
        if self.backend == "torch":
            return "torch"
        rest = "" if self._plan is not None else f", scores of {self.config.method!r} by torch"
        return f"native ({ops.instruction_set()}){rest}"

    def collect(
        self,
        prompt: PromptCompaction,
        layer: int,
        query: torch.Tensor,
        first: int,
        pages: LayerPages,
    ) -> None:
        """Take in the queries of one chunk, whose keys are in their pages.

        Args:
            prompt: the prompt they belong to; written to.
            layer: 0-based index among the compressed layers.
            query: [m, H * g, d], consecutive tokens, not kept by reference.
            first: position of the first of them in the prompt.
            pages: the prompt's, at least to the chunk's last token.
        """
        shape = self.shape
        num_tokens = query.shape[0]
        grouped = query.view(
            num_tokens, shape.num_kv_heads, shape.num_queries_per_kv, shape.head_size
        ).permute(1, 2, 0, 3)
        if "window_query" in self.scorer.needs:
            window_start = prompt.geometry.compact_len - self.config.window
            skipped = max(0, window_start - first)
            if skipped < num_tokens:
                in_window = grouped[:, :, skipped:]
                self._save_window_queries(prompt, layer, in_window, first + skipped - window_start)
        if "all_queries" in self.scorer.needs:
            self._observe(prompt, layer, grouped, first, pages)

    def _save_window_queries(
        self, prompt: PromptCompaction, layer: int, query: torch.Tensor, first: int
    ) -> None:
        """Keep [H, g, m, d] queries from index `first` of the window on."""
        if prompt.window_query is None:
            num_heads, group, _, head_size = query.shape
            size = (self.shape.num_layers, num_heads, group, self.config.window, head_size)
            prompt.window_query = query.new_empty(size)
        if first == 0:
            prompt.num_window_queries[layer] = 0
        assert prompt.num_window_queries[layer] == first, (
            f"window queries of layer {layer} arrive at {first}, "
            f"expected {prompt.num_window_queries[layer]}"
        )
        end = first + query.shape[2]
        prompt.window_query[layer, :, :, first:end] = query
        prompt.num_window_queries[layer] = end

    def _observe(
        self,
        prompt: PromptCompaction,
        layer: int,
        query: torch.Tensor,
        first: int,
        pages: LayerPages,
    ) -> None:
        """Show [H, g, m, d] queries from position `first` on to the scorer."""
        if first == 0:
            prompt.observed[layer], prompt.num_observed[layer] = None, 0
        assert prompt.num_observed[layer] == first, (
            f"queries of layer {layer} arrive at {first}, expected {prompt.num_observed[layer]}"
        )
        end = first + query.shape[2]
        pages = replace(pages, blocks=pages.blocks[: cdiv(end, self.shape.block_size)])
        parameters = self.layers[layer]
        chunk = ChunkInputs(
            query=query,
            key=self._read(pages, "key")[:, :end],
            first=first,
            scale=parameters.scale,
            logits_soft_cap=parameters.logits_soft_cap,
            sinks=parameters.sinks,
            rotary=parameters.rotary,
        )
        prompt.observed[layer] = self.scorer.observe(chunk, prompt.observed[layer])
        prompt.num_observed[layer] = end

    def _read(self, pages: LayerPages, part: str) -> torch.Tensor:
        """[H, len(blocks) * block_size, d] of one layer; part 'key' or 'value'."""
        heads = torch.arange(self.shape.num_kv_heads, device=pages.blocks.device)[:, None]
        ids = pages.page_ids(pages.blocks, heads)
        return ops.unpack_pages(pages.pool, ids, self.order, part)

    def score_layer(self, prompt: PromptCompaction, layer: int, pages: LayerPages) -> None:
        """Score one layer of a prompt whose keys are all in their pages; layers in order.

        Args:
            prompt: written to.
            layer: 0-based index among the compressed layers.
            pages: the prompt's, ceil(compact_len / block_size) blocks.
        """
        assert layer == len(prompt.layer_scores), (
            f"layer {layer} is scored after {len(prompt.layer_scores)} others"
        )
        if self._plan is not None:
            scores = self._score_planned(self._plan, prompt, layer, pages)
        else:
            scores = self._score_by_torch(prompt, layer, pages)
        prompt.observed[layer] = None
        prompt.layer_scores.append(scores)

    def _score_planned(
        self, plan: WindowPlan, prompt: PromptCompaction, layer: int, pages: LayerPages
    ) -> LayerScores:
        """By compiled ops, straight from the pages."""
        geometry, parameters, num_heads = (
            prompt.geometry,
            self.layers[layer],
            self.shape.num_kv_heads,
        )
        assert prompt.window_query is not None
        assert prompt.num_window_queries[layer] == self.config.window
        num_candidates = geometry.num_candidate_tokens
        num_rated = plan.num_rated(geometry.compact_len, num_candidates, self.config.window)
        dense = ops.RowDescriptor(geometry.compact_len)
        numbers = torch.tensor([[*dense, num_rated, num_candidates]], dtype=torch.int32)
        prompts = ops.Prompts(
            ops.Rows(numbers[:, :-2].contiguous(), pages.blocks.int()[None]),
            numbers[:, -2].contiguous(),
            numbers[:, -1].contiguous(),
            num_rated,
            num_candidates,
        )
        num_layers = pages.pages_per_block // num_heads
        sinks = parameters.sinks
        scores = ops.planned_scores(
            plan,
            prompt.window_query[layer].permute(2, 0, 1, 3).flatten(1, 2)[None],
            ops.Pool(self._as_pages(pages.pool), num_layers, num_heads, self.order),
            prompts,
            pages.first // num_heads,
            ops.Logits(
                parameters.scale,
                parameters.logits_soft_cap,
                None if sinks is None else sinks.flatten(),
            ),
            output_root=self._output_roots[layer],
            page_reduce=None,
            backend=self.backend,
        )
        return LayerScores(scores[0])

    def _as_pages(self, pool: torch.Tensor) -> torch.Tensor:
        """[num_pages, page_elements] as [num_pages, b, 2 d]."""
        return pool.view(-1, self.shape.block_size, 2 * self.shape.head_size)

    def _score_by_torch(
        self, prompt: PromptCompaction, layer: int, pages: LayerPages
    ) -> LayerScores:
        """By the scorer itself, from keys and values in token order."""
        geometry, needs, parameters = prompt.geometry, self.scorer.needs, self.layers[layer]
        num_tokens = geometry.compact_len
        window_query = value = None
        if "window_query" in needs:
            assert prompt.window_query is not None
            assert prompt.num_window_queries[layer] == self.config.window
            window_query = prompt.window_query[layer]
        if "all_queries" in needs:
            assert prompt.num_observed[layer] == num_tokens
        if "value" in needs:
            value = self._read(pages, "value")[:, :num_tokens]
        key = self._read(pages, "key")[:, :num_tokens]
        return self.scorer.score(
            ScoreInputs(
                key=key,
                num_candidates=geometry.num_candidate_tokens,
                budget_tokens=geometry.num_region_blocks * geometry.block_size,
                scale=parameters.scale,
                logits_soft_cap=parameters.logits_soft_cap,
                sinks=parameters.sinks,
                layer=layer,
                earlier_scores=prompt.layer_scores,
                window_query=window_query,
                value=value,
                output_weight=parameters.output_weight,
                output_root=parameters.output_root,
                observed=prompt.observed[layer],
                rotary=parameters.rotary,
            )
        )

    def hold(self, prompt: PromptCompaction, pages: LayerPages) -> None:
        """Set aside what may be kept of the layer scored last, whose pages are about to go.

        Args:
            prompt: written to; from its first layer on, all of them must be held.
            pages: as in `score_layer`.
        """
        if len(prompt.layer_scores) == 1:
            shape = self.shape
            prompt.candidates = Candidates(
                self.config, prompt.geometry, shape.num_layers, self.order, self.backend
            )
        assert prompt.candidates is not None
        prompt.candidates.add(prompt.layer_scores[-1], pages)

    def compact(
        self,
        prompt: PromptCompaction,
        pool: torch.Tensor,
        prompt_blocks: torch.Tensor,
        region_blocks: torch.Tensor,
    ) -> Selection:
        """Select over all layers and copy what is kept into the region.

        Args:
            prompt: fully scored; what it has collected is dropped.
            pool: [num_pages, page_elements], written at the region's pages only.
            prompt_blocks: [ceil(compact_len / block_size)] int64 block ids in token order, never
                written to; not read if the prompt's layers were held.
            region_blocks: [num_region_blocks] int64 block ids.

        Returns:
            What was kept; its `page_offsets` address the region.
        """
        assert prompt.is_scored
        if self.backend == "native" and prompt.candidates is None:
            return self._compact_natively(prompt, pool, prompt_blocks, region_blocks)
        shape, geometry, candidates = self.shape, prompt.geometry, prompt.candidates
        selection = select(
            prompt.layer_scores,
            self.config,
            geometry.num_region_blocks,
            geometry.block_size,
            geometry.num_tail_tokens,
            self.backend,
        )
        prompt.reset()
        target = ops.region_page_ids(region_blocks, shape.pages_per_block)
        if candidates is not None:
            candidates.write(selection, pool, target)
            return selection
        streams = torch.arange(shape.pages_per_block)
        stream_of_page = streams.repeat_interleave(selection.num_pages.reshape(-1))
        if selection.granularity == "page":
            source = prompt_blocks[selection.indices] * shape.pages_per_block + stream_of_page
            ops.copy_pages(pool, source, target)
            return selection
        block_size = shape.block_size
        source = prompt_blocks[selection.indices // block_size] * shape.pages_per_block
        source += stream_of_page.repeat_interleave(block_size)
        kept = ops.gather_tokens(pool, source, selection.indices % block_size, self.order)
        ops.pack_pages(pool, target, *kept, self.order)
        return selection

    def _compact_natively(
        self,
        prompt: PromptCompaction,
        pool: torch.Tensor,
        prompt_blocks: torch.Tensor,
        region_blocks: torch.Tensor,
    ) -> Selection:
        """`compact` by an op that selects and copies at once."""
        geometry, config = prompt.geometry, self.config
        num_pages, scores = share_pages(
            prompt.layer_scores,
            config,
            geometry.num_region_blocks,
            geometry.block_size,
            geometry.num_tail_tokens,
            self.backend,
        )
        prompt.reset()
        num_region_blocks, column = geometry.num_region_blocks, len(prompt_blocks)
        row = ops.RowDescriptor(geometry.compact_len, num_region_blocks, column, column)
        _, indices = ops.select_and_compact(
            scores[None],
            torch.tensor([scores.shape[1]], dtype=torch.int32),
            num_pages.reshape(1, -1).int(),
            ops.Pool(
                self._as_pages(pool), self.shape.num_layers, self.shape.num_kv_heads, self.order
            ),
            ops.Rows(
                torch.tensor([row], dtype=torch.int32),
                torch.cat([prompt_blocks, region_blocks]).int()[None],
            ),
            max_region_blocks=num_region_blocks,
            granularity=config.granularity,
            backend=self.backend,
        )
        return Selection(num_pages, indices[0].long(), config.granularity)
