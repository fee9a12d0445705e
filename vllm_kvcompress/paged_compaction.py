"""Compaction of all prompts that end in a step, in one batch, on a GPU's paged pool.

The steps of `compaction.py` without a read-back to the host: prompts are scored together, as many
layers at once as memory allows, and one selection and one copy then serve all layers of all of
them. R is the number of prompts, L of layers, H of KV heads, S = L * H of streams. Knows pages and
scores, not vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
from vllm_kvcompress.layer_parameters import StackedParameters
from vllm_kvcompress.layer_windows import LayerWindows, Window
from vllm_kvcompress.memory import RequestGeometry
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.policies.base import LayerScores, WindowPlan
from vllm_kvcompress.policies.budgets import plan_budgets
from vllm_kvcompress.policies.selection import entries_per_page, entry_scores, first_stage_counts
from vllm_kvcompress.score_memory import ScoreMemory
from vllm_kvcompress.staging import Staging, flat_places
from vllm_kvcompress.transfers import to_device


def plain_page_order(block_size: int, head_size: int) -> PageOrder:
    """The order of vLLM's `BLHNC` pages on a GPU: token after token, key before value."""
    keys = torch.arange(block_size)[:, None] * 2 * head_size + torch.arange(head_size)
    return PageOrder(keys, keys + head_size)


@dataclass(frozen=True)
class _PromptPlan:
    """What is known of a prompt's budgets before its scores are.

    Attributes:
        num_pages: [S] int32, if scores have no say in it; else None.
        totals: [G] int32 pages to share in each group of streams that compete, G = L or 1.
        guaranteed: [G] int32 entries that each stream of a group is assured of.
        stream_guaranteed: [S] int32, the same per stream.
        layer_pages: [L] int64 pages of each layer; their sum alone, where all layers compete.
    """

    num_pages: np.ndarray | None
    totals: np.ndarray
    guaranteed: np.ndarray
    stream_guaranteed: np.ndarray
    layer_pages: np.ndarray


def _descriptor(geometry: RequestGeometry, is_staged: bool) -> ops.RowDescriptor:
    """Of a prompt at its compaction point; staged ones have no region beside them."""
    if is_staged:
        return ops.RowDescriptor(geometry.compact_len)
    return ops.RowDescriptor(
        geometry.compact_len,
        geometry.num_region_blocks,
        geometry.boundary_block,
        geometry.boundary_block,
        geometry.first_kept_block,
    )


@dataclass
class PromptBatch:
    """Prompts whose compaction points are reached in one step.

    Attributes:
        prompts: what was collected of each.
        rows: [R, ROW_FIELDS] int32 descriptors; the length is the compaction point's.
        block_table: [R, W] int32, `[prompt blocks][region blocks][later blocks]`.
        num_candidates: [R] int32 tokens that compete.
        num_rated: [R] int32 tokens that fused kernels rate, at least num_candidates; 0 if none do.
        num_entries: [R] int32 pages (or tokens) that compete.
        first, second: [R, S, N] float32 scores of entries, N with `ops.score_width`'s room, filled
            as layers are scored; `second` is None until a scorer gives one.
        layers_at_once: layers that fused kernels score together.
        windows: of layers that are not scored yet; None if there are none.
        staging: where they are if they have no blocks for what they evict, else None; `rows` and
            `block_table` are then of the current layer there.
        num_pages: [R, S] int32 pages of each stream, filled layer by layer if they are staged and
            layers do not compete.
    """

    prompts: Sequence[PromptCompaction]
    rows: torch.Tensor
    block_table: torch.Tensor
    num_candidates: torch.Tensor
    num_rated: torch.Tensor
    num_entries: torch.Tensor
    first: torch.Tensor
    layers_at_once: int = 1
    windows: LayerWindows | None = field(default=None)
    second: torch.Tensor | None = field(default=None)
    staging: Staging | None = field(default=None)
    num_pages: torch.Tensor | None = field(default=None)

    @property
    def geometries(self) -> list[RequestGeometry]:
        """Of the prompts."""
        return [prompt.geometry for prompt in self.prompts]


def _plan_budgets(
    config: KVCompressConfig, shape: CacheShape, mean_pages: int, max_pages: int
) -> _PromptPlan:
    options = dict(config.options)
    plan = plan_budgets(
        options["budgets"],
        shape.num_layers,
        shape.num_kv_heads,
        mean_pages,
        max_pages,
        entries_per_page(config, shape.block_size),
        options,
    )
    per_layer = plan.guaranteed_per_layer(shape.num_layers)
    pages = plan.num_pages
    return _PromptPlan(
        num_pages=None if pages is None else pages.flatten().int().numpy(),
        totals=plan.total_pages.int().numpy(),
        guaranteed=plan.guaranteed.int().numpy(),
        stream_guaranteed=per_layer.repeat_interleave(shape.num_kv_heads).int().numpy(),
        layer_pages=(plan.total_pages if pages is None else pages.sum(dim=1)).numpy(),
    )


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
        self._paged = ops.Pool(pool, shape.num_layers, shape.num_kv_heads)
        self._backend = backend
        self._select_backend = select_backend or backend
        self._per_page = entries_per_page(config, shape.block_size)
        order = plain_page_order(shape.block_size, shape.head_size)
        # Collects queries, and scores for methods that no fused kernel knows.
        self._general = Compactor(config, shape, order, layers)
        self.scorer = self._general.scorer
        plan = self.scorer.window_plan()
        self._plan = plan if plan is not None and plan.fits_ops else None
        self.memory = ScoreMemory(config, shape, pool.element_size(), self._plan)
        self.use_parameters(layers)
        # By a prompt's numbers; nothing in it holds on to the pool.
        self._budgets = functools.lru_cache(maxsize=4096)(
            functools.partial(_plan_budgets, config, shape)
        )

    def use_parameters(self, layers: Sequence[LayerParameters]) -> None:
        """Score with these from now on.

        Raises:
            ValueError: if something is missing.
        """
        if self._plan is not None:
            stacked = StackedParameters.of(layers, self.pool)
            self._parameters = stacked
            if stacked.output_root is not None:
                # Theirs, in float32, are not needed any more.
                roots = stacked.output_root
                layers = [replace(x, output_root=roots[i]) for i, x in enumerate(layers)]
        self._general.use_parameters(layers)

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
        pages: LayerPages,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Take in the queries of one chunk, whose keys are in their pages.

        Args:
            prompt: the prompt they belong to; written to.
            layer: 0-based index among the compressed layers.
            query: [m, H * g, d], consecutive tokens, not kept by reference.
            first: position of the first of them in the prompt.
            pages: the prompt's, at least to the chunk's last token.
            lse: [m, H * g] float32 of these queries, all of the window; of all of a prompt's chunks
                or of none.
        """
        self._general.collect(prompt, layer, query, first, pages)
        if lse is None:
            return
        if prompt.window_lse is None:
            size = (self.shape.num_layers, self.config.window, lse.shape[1])
            prompt.window_lse = lse.new_empty(size)
        start = first - (prompt.geometry.compact_len - self.config.window)
        prompt.window_lse[layer, start : start + len(lse)] = lse

    def batch(
        self,
        prompts: Sequence[PromptCompaction],
        block_table: torch.Tensor,
        buffer: torch.Tensor | None = None,
        num_ending: int | None = None,
    ) -> PromptBatch:
        """Prepare prompts to be scored.

        Args:
            prompts: with whatever was collected before this step; those whose step has the whole
                window come first.
            block_table: [R, W] int32 rows of just these.
            buffer: [pages, b, 2 d] of `staging_pages`, for prompts that have no blocks for what
                they evict; None = they have. Each layer then starts with `begin_layer`.
            num_ending: prompts of all the step's batches; None = of this one.
        """
        geometries = [prompt.geometry for prompt in prompts]
        num_prompts = len(prompts)
        rows = np.array([_descriptor(g, buffer is not None) for g in geometries], np.int32)
        numbers = np.zeros((3, num_prompts), np.int32)
        for i, g in enumerate(geometries):
            numbers[0, i] = g.num_candidate_tokens
            numbers[1, i] = self._num_rated(g)
            numbers[2, i] = g.first_kept_block * self._per_page
        device = self.pool.device
        on_device = to_device(np.concatenate([rows.reshape(-1), numbers.reshape(-1)]), device)
        num_candidates, num_rated, num_entries = on_device[rows.size :].view(3, -1)
        num_streams = self.shape.pages_per_block
        size = (num_prompts, num_streams, ops.score_width(int(numbers[2].max())))
        batch = PromptBatch(
            prompts,
            on_device[: rows.size].view(rows.shape),
            block_table,
            num_candidates,
            num_rated,
            num_entries,
            torch.empty(size, dtype=torch.float32, device=device),
        )
        if buffer is None and self._plan is not None:
            longest = max(geometries, key=self.memory.token_bytes)
            batch.layers_at_once = self.memory.layers_at_once(
                longest, num_prompts, num_ending or num_prompts
            )
        if buffer is not None:
            batch.staging = Staging(
                self.config,
                self.shape,
                buffer,
                self.pool,
                geometries,
                block_table,
                [int(plan.stream_guaranteed[0]) for plan in self._plans(geometries)],
                self._backend,
                self._select_backend,
            )
            batch.block_table = batch.staging.block_table
            batch.num_pages = torch.empty(
                num_prompts, num_streams, dtype=torch.int32, device=device
            )
        return batch

    def begin_layer(self, batch: PromptBatch, layer: int) -> torch.Tensor:
        """Where a staged batch's keys and values of a layer go, before any is written.

        Returns:
            [blocks, H, b, 2 d], the blocks being those of the batch's `block_table`.
        """
        assert batch.staging is not None
        return batch.staging.begin_layer(layer, batch.first, batch.second, batch.num_entries)

    def score_layer(
        self,
        batch: PromptBatch,
        layer: int,
        windows: Sequence[Window | None],
        pages: Sequence[LayerPages] | None,
    ) -> None:
        """Score one layer of all prompts, whose keys are all in their pages; layers in order.

        Where fused kernels do it, its windows are kept and the batch's `layers_at_once` are scored
        with the last of them. What staged prompts keep of a layer that competes with no other moves
        to the regions.

        Args:
            batch: written to.
            layer: 0-based index among the compressed layers.
            windows: per prompt its own, or None if it was collected.
            pages: per prompt all of them; read by methods that no fused kernel knows.
        """
        if self._plan is None:
            assert pages is not None
            for i, (prompt, own_pages) in enumerate(zip(batch.prompts, pages, strict=True)):
                self._general.score_layer(prompt, layer, own_pages)
                self._take(batch, i, layer, prompt.layer_scores[-1])
        else:
            if batch.windows is None:
                batch.windows = LayerWindows(batch.layers_at_once, len(batch.prompts))
            index = layer % batch.layers_at_once
            own = [window for window in windows if window is not None]
            assert all(window is None for window in windows[len(own) :])
            if own:
                batch.windows.keep(index, own)
            if index == batch.layers_at_once - 1 or layer == self.shape.num_layers - 1:
                self._score_fused(batch, self._plan, layer - index, index + 1, len(own))
        if batch.staging is not None and not batch.staging.is_joint:
            self._settle_layer(batch, batch.staging, layer)

    def _score_fused(
        self, batch: PromptBatch, plan: WindowPlan, first: int, num_layers: int, num_direct: int
    ) -> None:
        """Scores of some layers, from the first on, by the ops that read pages.

        The windows of the batch's first `num_direct` prompts are there, the others' collected.
        """
        assert batch.windows is not None
        for place, prompt in enumerate(batch.prompts[num_direct:], num_direct):
            collected = prompt.num_window_queries[first : first + num_layers]
            assert collected == [self.config.window] * num_layers
            batch.windows.take(place, prompt, first, num_layers)
        query, lse = batch.windows.of_layers(num_layers)
        shape, staging = self.shape, batch.staging
        prompts = ops.Prompts(
            ops.Rows(batch.rows, batch.block_table),
            batch.num_rated,
            batch.num_candidates,
            max_rated=max(self._num_rated(g) for g in batch.geometries),
            max_candidates=max(g.num_candidate_tokens for g in batch.geometries),
        )
        pool = self._paged if staging is None else ops.Pool(staging.area(), 1, shape.num_kv_heads)
        by_page = self.config.granularity == "page"
        streams = slice(first * shape.num_kv_heads, (first + num_layers) * shape.num_kv_heads)
        width = max(g.first_kept_block for g in batch.geometries) * self._per_page
        ops.planned_scores(
            plan,
            query,
            pool,
            prompts,
            first if staging is None else 0,
            lse=lse,
            **self._parameters.options(first, num_layers),
            page_reduce=self.config.option("page_reduce") if by_page else None,
            out=batch.first[:, streams, :width],
            backend=self._backend,
        )
        if first + num_layers == shape.num_layers:
            batch.windows = None

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
        if batch.staging is None:
            num_pages, scores, _ = self._choose(batch)
            page_offsets, _ = ops.select_and_compact(
                scores,
                batch.num_entries,
                num_pages,
                self._paged,
                ops.Rows(batch.rows, batch.block_table),
                max_region_blocks=max(g.num_region_blocks for g in batch.geometries),
                granularity=self.config.granularity,
                backend=self._select_backend,
            )
        elif batch.staging.is_joint:
            none = torch.zeros(len(batch.prompts), 1, dtype=torch.int64, device=self.pool.device)
            num_pages, page_offsets = self._move_chosen(batch, batch.staging, none)
        else:
            assert batch.num_pages is not None
            num_pages = batch.num_pages
            page_offsets = torch.nn.functional.pad(num_pages.cumsum(1), (1, 0)).int()
        for prompt in batch.prompts:
            prompt.reset()
        return num_pages, page_offsets

    def _settle_layer(self, batch: PromptBatch, staging: Staging, layer: int) -> None:
        """Move what staged prompts keep of a layer, the regions being filled layer by layer."""
        assert batch.num_pages is not None
        earlier = np.array(
            [[plan.layer_pages[:layer].sum()] for plan in self._plans(batch.geometries)], np.int64
        )
        first_pages = to_device(earlier, self.pool.device)
        num_pages, _ = self._move_chosen(batch, staging, first_pages, layer)
        batch.num_pages[:, self._streams(layer)] = num_pages

    def _move_chosen(
        self,
        batch: PromptBatch,
        staging: Staging,
        first_pages: torch.Tensor,
        layer: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose among staged entries of a layer, or of all; pages and offsets of its streams."""
        num_pages, scores, max_pages = self._choose(batch, layer)
        page_offsets, indices = ops.select_entries(
            scores,
            batch.num_entries,
            num_pages,
            max_pages,
            self._per_page,
            backend=self._select_backend,
        )
        staging.write(page_offsets, indices, first_pages)
        return num_pages, page_offsets

    def _choose(
        self, batch: PromptBatch, layer: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """What streams keep, of one layer or of all.

        Returns:
            num_pages [R, s] int32 of each stream; scores [R, s, N], the best of which it keeps; the
            greatest sum of a prompt's pages.
        """
        plans = self._plans(batch.geometries)
        streams = slice(None) if layer is None else self._streams(layer)
        first = batch.first[:, streams].contiguous()
        max_pages = int(max(plan.layer_pages[layer].sum() for plan in plans))
        num_pages = self._count_pages(batch, plans, first, layer)
        if batch.second is None:
            return num_pages, first, max_pages
        second = batch.second[:, streams]
        sure = np.stack([plan.stream_guaranteed[streams] for plan in plans])
        guaranteed = to_device(sure, self.pool.device)
        scores = self._two_stages(batch, first, second, num_pages, guaranteed, max_pages)
        return num_pages, scores, max_pages

    def _count_pages(
        self,
        batch: PromptBatch,
        plans: Sequence[_PromptPlan],
        first: torch.Tensor,
        layer: int | None,
    ) -> torch.Tensor:
        """[R, s] int32 pages of each of `first`'s streams."""
        device = self.pool.device
        streams = slice(None) if layer is None else self._streams(layer)
        groups = slice(None) if layer is None else slice(layer, layer + 1)
        fixed = [plan.num_pages[streams] for plan in plans if plan.num_pages is not None]
        # By the budgets' kind, so of all prompts or of none.
        if fixed:
            return to_device(np.stack(fixed), device)
        limits = [np.stack([plan.totals[groups], plan.guaranteed[groups]]) for plan in plans]
        totals, group_sure = to_device(np.stack(limits, axis=1), device)
        return ops.joint_page_counts(
            first,
            batch.num_entries,
            totals,
            group_sure,
            self._per_page,
            backend=self._select_backend,
        )

    def _plans(self, geometries: Sequence[RequestGeometry]) -> list[_PromptPlan]:
        return [self._budgets(g.num_region_blocks, g.first_kept_block) for g in geometries]

    def _two_stages(
        self,
        batch: PromptBatch,
        first: torch.Tensor,
        second: torch.Tensor,
        num_pages: torch.Tensor,
        guaranteed: torch.Tensor,
        max_pages: int,
    ) -> torch.Tensor:
        """`second`, with each stream's first share of entries by `first` raised to +inf."""
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
            first,
            batch.num_entries,
            in_first,
            max_pages * self._per_page,
            backend=self._select_backend,
        )
        num_prompts, num_streams, width = second.shape
        # Places past the last entry go to a column behind; rows are as far apart as scores' are.
        num_places = num_streams * width
        raised = second.new_empty(num_prompts, num_places + ops.score_width(1))
        raised[:, :num_places] = second.flatten(1)
        raised.scatter_(1, flat_places(offsets, indices, width), float("inf"))
        return raised[:, :num_places].unflatten(1, (num_streams, width))

    def _num_rated(self, geometry: RequestGeometry) -> int:
        """Tokens that fused kernels rate; 0 if none do."""
        if self._plan is None:
            return 0
        return self._plan.num_rated(
            geometry.compact_len, geometry.num_candidate_tokens, self.config.window
        )

    def pages(self, layer: int, blocks: torch.Tensor) -> LayerPages:
        """One layer of the prompt that lies in the pool's `blocks`, [n] int64."""
        return self.shape.layer_pages(self.pool.flatten(1), layer, blocks)

    def _streams(self, layer: int) -> slice:
        num_heads = self.shape.num_kv_heads
        return slice(layer * num_heads, (layer + 1) * num_heads)
