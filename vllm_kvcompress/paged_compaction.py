"""Compaction of all prompts that end in a step, in one batch, on a GPU's paged pool.

The steps of `compaction.py` without a read-back to the host: prompts are scored together layer by
layer, and one selection and one copy then serve all layers of all of them. R is the number of
prompts, L of layers, H of KV heads, S = L * H of streams. Knows pages and scores, not vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_kvcompress import ops
from vllm_kvcompress.candidates import LayerPages
from vllm_kvcompress.compaction import (
    CacheShape,
    Compactor,
    LayerParameters,
    PromptCompaction,
)
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import RequestGeometry
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.planned_scores import PagedPrompts, planned_scores
from vllm_kvcompress.policies.base import LayerScores
from vllm_kvcompress.policies.budgets import plan_budgets
from vllm_kvcompress.policies.selection import entries_per_page, entry_scores, first_stage_counts


def plain_page_order(block_size: int, head_size: int) -> PageOrder:
    """The order of vLLM's `BLHNC` pages on a GPU: token after token, key before value."""
    keys = torch.arange(block_size)[:, None] * 2 * head_size + torch.arange(head_size)
    return PageOrder(keys, keys + head_size)


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device that the host does not wait for."""
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)


@dataclass
class PromptBatch:
    """Prompts whose compaction points are reached in one step.

    Attributes:
        prompts: what was collected of each.
        rows: [R, 4] int32 descriptors; the length is the compaction point's.
        block_table: [R, W] int32, `[prompt blocks][region blocks][later blocks]`.
        num_candidates: [R] int32 tokens that compete.
        num_rated: [R] int32 tokens that fused kernels rate, at least num_candidates; 0 if none do.
        num_entries: [R] int32 pages (or tokens) that compete.
        first, second: [R, S, N] float32 scores of entries, filled layer by layer; `second` is None
            until a scorer gives one.
    """

    prompts: Sequence[PromptCompaction]
    rows: torch.Tensor
    block_table: torch.Tensor
    num_candidates: torch.Tensor
    num_rated: torch.Tensor
    num_entries: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor | None = field(default=None)

    @property
    def geometries(self) -> list[RequestGeometry]:
        """Of the prompts."""
        return [prompt.geometry for prompt in self.prompts]


class PagedCompactor:
    """Scores batches of prompts and moves what they keep into their regions.

    Args:
        config: validated setting.
        shape: of the paged cache.
        pool: [num_pages, b, 2 d], plain pages.
        layers: one per layer; what the method's scorer needs must be there, on the pool's device.
        backend: of the ops that score, 'triton' or 'reference'.
        select_backend: of the ops that select and copy, 'native' too; None = `backend`.

    Raises:
        ValueError: if something is missing.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        shape: CacheShape,
        pool: torch.Tensor,
        layers: Sequence[LayerParameters],
        backend: str = "triton",
        select_backend: str | None = None,
    ) -> None:
        self.config = config
        self.shape = shape
        self.pool = pool
        self._backend = backend
        self._select_backend = select_backend or backend
        self._per_page = entries_per_page(config, shape.block_size)
        order = plain_page_order(shape.block_size, shape.head_size)
        # Collects queries, and scores for methods that no fused kernel knows.
        self._general = Compactor(config, shape, order, layers)
        self.scorer = self._general.scorer
        self._plan = self.scorer.window_plan()
        self._layers = layers
        self._output_roots = [
            None if layer.output_root is None else layer.output_root.to(pool.dtype).contiguous()
            for layer in layers
        ]
        self._budgets = functools.lru_cache(maxsize=4096)(self._plan_budgets)

    @property
    def is_fused(self) -> bool:
        """Whether fused kernels make this method's scores; else torch does."""
        return self._plan is not None

    def collect(
        self,
        prompt: PromptCompaction,
        layer: int,
        query: torch.Tensor,
        first: int,
        blocks: torch.Tensor,
    ) -> None:
        """Take in the queries of one chunk, whose keys are in their pages.

        Args:
            prompt: the prompt they belong to; written to.
            layer: 0-based index among the compressed layers.
            query: [m, H * g, d], consecutive tokens, not kept by reference.
            first: position of the first of them in the prompt.
            blocks: [n] int64 on the pool's device, the prompt's blocks in token order at least to
                the chunk's last token.
        """
        self._general.collect(prompt, layer, query, first, self._pages(layer, blocks))

    def window_query(
        self, prompt: PromptCompaction, layer: int, query: torch.Tensor | None
    ) -> torch.Tensor:
        """[w, H * g, d] queries of a prompt's window.

        Args:
            prompt: the prompt.
            layer: 0-based index.
            query: [w, H * g, d] if the step at hand has all of them; None if they were collected.
        """
        if query is not None:
            return query
        assert prompt.window_query is not None
        assert prompt.num_window_queries[layer] == self.config.window
        return prompt.window_query[layer].permute(2, 0, 1, 3).flatten(1, 2)

    def batch(
        self,
        prompts: Sequence[PromptCompaction],
        block_table: torch.Tensor,
    ) -> PromptBatch:
        """Prepare prompts to be scored.

        Args:
            prompts: with whatever was collected before this step.
            block_table: [R, W] int32 rows of just these.
        """
        geometries = [prompt.geometry for prompt in prompts]
        num_prompts = len(prompts)
        numbers = np.empty((7, num_prompts), np.int32)
        for i, g in enumerate(geometries):
            numbers[:4, i] = (
                g.compact_len,
                g.num_region_blocks,
                g.boundary_block,
                g.first_kept_block,
            )
            numbers[4, i] = g.num_candidate_tokens
            numbers[5, i] = self._num_rated(g)
            numbers[6, i] = g.first_kept_block * self._per_page
        packed = np.concatenate([numbers[:4].T.reshape(-1), numbers[4:].reshape(-1)])
        device = self.pool.device
        on_device = to_device(packed, device)
        num_candidates, num_rated, num_entries = on_device[4 * num_prompts :].view(3, -1)
        size = (num_prompts, self.shape.pages_per_block, int(numbers[6].max()))
        return PromptBatch(
            prompts,
            on_device[: 4 * num_prompts].view(num_prompts, 4),
            block_table,
            num_candidates,
            num_rated,
            num_entries,
            torch.empty(size, dtype=torch.float32, device=device),
        )

    def score_layer(
        self,
        batch: PromptBatch,
        layer: int,
        window_query: Sequence[torch.Tensor | None],
        blocks: Sequence[torch.Tensor],
    ) -> None:
        """Score one layer of all prompts, whose keys are all in their pages; layers in order.

        Args:
            batch: written to.
            layer: 0-based index among the compressed layers.
            window_query: per prompt [w, H * g, d], or None if they were collected.
            blocks: per prompt [ceil(compact_len / b)] int64 block ids in token order, read by
                methods that no fused kernel knows.
        """
        if self._plan is None:
            for i, (prompt, own_blocks) in enumerate(zip(batch.prompts, blocks, strict=True)):
                self._general.score_layer(prompt, layer, self._pages(layer, own_blocks))
                self._take(batch, i, layer, prompt.layer_scores[-1])
            return
        queries = torch.stack(
            [
                self.window_query(prompt, layer, query)
                for prompt, query in zip(batch.prompts, window_query, strict=True)
            ]
        )
        self._score_fused(batch, layer, queries)

    def _score_fused(self, batch: PromptBatch, layer: int, queries: torch.Tensor) -> None:
        """Scores of [R, w, H * g, d] queries by the ops that read pages."""
        plan, shape, parameters = self._plan, self.shape, self._layers[layer]
        assert plan is not None
        prompts = PagedPrompts(
            self.pool,
            batch.rows,
            batch.block_table,
            batch.num_rated,
            batch.num_candidates,
            max_rated=max(self._num_rated(g) for g in batch.geometries),
            max_candidates=max(g.num_candidate_tokens for g in batch.geometries),
        )
        by_page = self.config.granularity == "page"
        entries = planned_scores(
            plan,
            prompts,
            queries,
            layer=layer,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            scale=parameters.scale,
            logits_soft_cap=parameters.logits_soft_cap,
            sinks=parameters.sinks,
            output_root=self._output_roots[layer],
            page_reduce=self.config.option("page_reduce") if by_page else None,
            backend=self._backend,
        )
        batch.first[:, self._streams(layer)] = entries

    def _take(self, batch: PromptBatch, i: int, layer: int, scores: LayerScores) -> None:
        """Put one prompt's scores of a layer's tokens into the batch, as entries'."""
        entries = entry_scores(scores, self.config, self.shape.block_size)
        num_entries = entries.first.shape[1]
        batch.first[i, self._streams(layer), :num_entries] = entries.first
        if entries.second is not None:
            if batch.second is None:
                batch.second = torch.empty_like(batch.first)
            batch.second[i, self._streams(layer), :num_entries] = entries.second

    def compact(self, batch: PromptBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Select over all layers and copy what is kept into the regions.

        Args:
            batch: fully scored; what its prompts had collected is dropped.

        Returns:
            num_pages [R, S] int32 pages of each stream, and page_offsets [R, S + 1] int32.
        """
        num_pages, guaranteed = self._count_pages(batch)
        scores = batch.first
        most = max(g.num_region_blocks for g in batch.geometries)
        max_pages = most * self.shape.pages_per_block
        if batch.second is not None:
            scores = self._two_stages(batch, batch.second, num_pages, guaranteed, max_pages)
        page_offsets, _ = ops.select_and_compact(
            scores,
            batch.num_entries,
            num_pages,
            self.pool,
            batch.rows,
            batch.block_table,
            max_region_blocks=most,
            granularity=self.config.granularity,
            backend=self._select_backend,
        )
        for prompt in batch.prompts:
            prompt.reset()
        return num_pages, page_offsets

    def _count_pages(self, batch: PromptBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, S] int32 pages of each stream, and entries that each is sure of."""
        plans = [self._budgets(g.num_region_blocks, g.first_kept_block) for g in batch.geometries]
        device = self.pool.device
        guaranteed = to_device(np.stack([sure for _, _, sure, _ in plans]), device)
        fixed = [pages for pages, _, _, _ in plans if pages is not None]
        # By the budgets' kind, so of all prompts or of none.
        if fixed:
            return to_device(np.stack(fixed), device), guaranteed
        groups = to_device(
            np.stack([np.stack([totals, sure]) for _, totals, _, sure in plans], axis=1), device
        )
        num_pages = ops.joint_page_counts(
            batch.first,
            batch.num_entries,
            groups[0],
            groups[1],
            self._per_page,
            backend=self._select_backend,
        )
        return num_pages, guaranteed

    def _plan_budgets(
        self, mean_pages: int, max_pages: int
    ) -> tuple[np.ndarray | None, np.ndarray, np.ndarray, np.ndarray]:
        """Fixed pages [S] or None, totals [G], and what a stream [S] or group [G] is sure of."""
        shape, options = self.shape, dict(self.config.options)
        plan = plan_budgets(
            options["budgets"],
            shape.num_layers,
            shape.num_kv_heads,
            mean_pages,
            max_pages,
            self._per_page,
            options,
        )
        per_layer = plan.guaranteed_per_layer(shape.num_layers)
        pages = plan.num_pages
        fixed = None if pages is None else pages.flatten().numpy().astype(np.int32)
        return (
            fixed,
            plan.total_pages.numpy().astype(np.int32),
            per_layer.repeat_interleave(shape.num_kv_heads).numpy().astype(np.int32),
            plan.guaranteed.numpy().astype(np.int32),
        )

    def _two_stages(
        self,
        batch: PromptBatch,
        second: torch.Tensor,
        num_pages: torch.Tensor,
        guaranteed: torch.Tensor,
        max_pages: int,
    ) -> torch.Tensor:
        """`second`, with each stream's first share of entries by `batch.first` raised to +inf."""
        counts = num_pages * self._per_page
        tails = to_device(
            np.array([[g.num_tail_tokens] for g in batch.geometries], np.int32), self.pool.device
        )
        in_first = first_stage_counts(
            counts,
            guaranteed,
            self.config.option("first_stage"),
            self.shape.block_size // self._per_page,
            tails,
        )
        offsets, indices = ops.select_entries(
            batch.first,
            batch.num_entries,
            in_first,
            max_pages * self._per_page,
            backend=self._select_backend,
        )
        num_prompts, num_streams, width = second.shape
        ends = offsets[:, 1:].contiguous()
        places = torch.arange(indices.shape[1], dtype=torch.int32, device=indices.device)
        streams = torch.searchsorted(ends, places.expand(num_prompts, -1).contiguous(), right=True)
        # Places past the last entry go to one more column, which is dropped.
        flat = torch.where(streams < num_streams, streams * width + indices, num_streams * width)
        raised = second.new_empty(num_prompts, num_streams * width + 1)
        raised[:, :-1] = second.flatten(1)
        raised.scatter_(1, flat, float("inf"))
        return raised[:, :-1].view(second.shape)

    def _num_rated(self, geometry: RequestGeometry) -> int:
        """Tokens that fused kernels rate; 0 if none do."""
        if self._plan is None:
            return 0
        return self._plan.num_rated(
            geometry.compact_len, geometry.num_candidate_tokens, self.config.window
        )

    def _pages(self, layer: int, blocks: torch.Tensor) -> LayerPages:
        return self.shape.layer_pages(self.pool.flatten(1), layer, blocks)

    def _streams(self, layer: int) -> slice:
        num_heads = self.shape.num_kv_heads
        return slice(layer * num_heads, (layer + 1) * num_heads)
