"""Compaction of all prompts that end in a step, in one batch, straight from the paged pool.

Prompts are scored together, as many layers at once as the ops take and memory allows, and one
selection and one copy then serve all layers of all of them. Nothing is read back to the host. R is
the number of prompts, L of layers, H of KV heads, S = L * H of streams, b of tokens per page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.compaction.prompts import LayerPages, PromptCompaction
from vllm_kvcompress.compaction.score_memory import ScoreMemory
from vllm_kvcompress.compaction.scoring import Backends, Scoring
from vllm_kvcompress.compaction.selection import Chooser
from vllm_kvcompress.compaction.staging import Staging
from vllm_kvcompress.compaction.windows import LayerWindows, Window
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import CacheShape, RequestGeometry
from vllm_kvcompress.memory.row_layout import RowLayout
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.ops.transfers import to_device
from vllm_kvcompress.policies.base import LayerScores


@dataclass
class PromptBatch:
    """Prompts whose compaction points are reached in one step.

    Attributes:
        prompts: what was collected of each.
        rows: [R, ROW_FIELDS] int32 descriptors; the length is the compaction point's.
        block_table: [R, W] int32, `[prompt blocks][region blocks][later blocks]`.
        num_candidates: [R] int32 tokens that compete.
        num_rated: [R] int32 tokens that fused ops rate, at least num_candidates; 0 if none do.
        num_entries: [R] int32 pages (or tokens) that compete.
        first, second: [R, S, N] float32 scores of entries, N with `ops.score_width`'s room, filled
            as layers are scored; `second` is None until a scorer gives one.
        layers_at_once: layers that fused ops score together.
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


class Compactor:
    """Scores batches of prompts and moves what they keep into their regions.

    Args:
        config: validated setting.
        shape: of the paged cache.
        pool: [num_pages, b, 2 d].
        order: element order of its pages.
        layers: one per layer; what the method's scorer needs must be there, on the pool's device.
        backends: of the ops.

    Attributes:
        buffer: of `use_buffer`, if it was called.

    Raises:
        ValueError: if something is missing.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        shape: CacheShape,
        pool: torch.Tensor,
        order: PageOrder,
        layers: Sequence[LayerParameters],
        backends: Backends,
    ) -> None:
        self.config = config
        self.shape = shape
        self.pool = pool
        # What ops for a GPU take is plain, and is not said.
        self._kernel_order = None if order.is_plain else order
        self._paged = ops.Pool(pool, shape.num_layers, shape.num_kv_heads, self._kernel_order)
        self._backends = backends
        self.buffer: torch.Tensor | None = None
        self.scoring = Scoring(config, shape, pool, order, layers, backends.score)
        self._chooser = Chooser(config, shape, pool.device, backends.select)
        self.memory = ScoreMemory(config, shape, self.scoring.plan)

    @property
    def ops_name(self) -> str:
        """What computes, for people: the backends, and what compiled ops leave to torch."""
        score, select = self._backends.score, self._backends.select
        if score == "native":
            name = f"native ({ops.instruction_set()})"
            rest = "" if self.scoring.is_fused else f", scores of {self.config.method!r} by torch"
            return name + rest
        return score if select == score else f"{score}, {select} selection"

    def use_parameters(self, layers: Sequence[LayerParameters]) -> None:
        """Score with these from now on.

        Raises:
            ValueError: if something is missing.
        """
        self.scoring.use_parameters(layers)

    @property
    def is_fused(self) -> bool:
        """Whether ops make this method's scores from pages; else the scorer does."""
        return self.scoring.is_fused

    @property
    def collects_all(self) -> bool:
        """Whether every query of a prompt is to be collected, and not the window's only."""
        return "all_queries" in self.scoring.scorer.needs

    def collect(
        self,
        prompt: PromptCompaction,
        layer: int,
        query: torch.Tensor,
        first: int,
        pages: LayerPages,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Take in the queries of one chunk of a prompt; arguments as of `Scoring.collect`."""
        self.scoring.collect(prompt, layer, query, first, pages, lse)

    def use_buffer(self, buffer: torch.Tensor) -> None:
        """Stage one-shot prompts there; otherwise each batch of them makes a buffer of its own.

        Args:
            buffer: [pages, b, 2 d], zeros, of `OneShot.counted_buffer_pages`.
        """
        self.buffer = buffer

    def batch(
        self,
        prompts: Sequence[PromptCompaction],
        block_table: torch.Tensor,
        is_one_shot: bool = False,
        num_ending: int | None = None,
    ) -> PromptBatch:
        """Prepare prompts to be scored.

        Args:
            prompts: with whatever was collected before this step; those whose step has the whole
                window come first.
            block_table: [R, W] int32 rows of just these.
            is_one_shot: whether they have no blocks for what they evict. Each layer then starts
                with `begin_layer`.
            num_ending: prompts of all the step's batches; None = of this one.
        """
        geometries = [prompt.geometry for prompt in prompts]
        num_prompts = len(prompts)
        # One-shot prompts have no region beside them.
        layouts = [RowLayout() if is_one_shot else g.layout for g in geometries]
        described = zip(layouts, geometries, strict=True)
        rows = np.array([layout.descriptor(g.compact_len) for layout, g in described], np.int32)
        numbers = np.zeros((3, num_prompts), np.int32)
        for i, g in enumerate(geometries):
            numbers[0, i] = g.num_candidate_tokens
            numbers[1, i] = self.scoring.num_rated(g)
            numbers[2, i] = g.first_kept_block * self._chooser.per_page
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
        if is_one_shot:
            batch.staging = self._stage(geometries, block_table)
            batch.block_table = batch.staging.block_table
            batch.num_pages = torch.empty(
                num_prompts, num_streams, dtype=torch.int32, device=device
            )
        elif self.scoring.takes_several_layers:
            longest = max(geometries, key=self.memory.token_bytes)
            batch.layers_at_once = self.memory.layers_at_once(
                longest, num_prompts, num_ending or num_prompts
            )
        return batch

    def _stage(self, geometries: list[RequestGeometry], block_table: torch.Tensor) -> Staging:
        return Staging(
            self.config,
            self.shape,
            self.buffer,
            self.pool,
            self._kernel_order,
            geometries,
            block_table,
            [int(b.stream_guaranteed[0]) for b in self._chooser.budgets(geometries)],
            move_backend=self._backends.move,
            select_backend=self._backends.select,
        )

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

        Where fused ops do it, its windows are kept and the batch's `layers_at_once` are scored with
        the last of them. What staged prompts keep of a layer that competes with no other moves to
        the regions.

        Args:
            batch: written to.
            layer: 0-based index among the compressed layers.
            windows: per prompt its own, or None if it was collected.
            pages: per prompt all of them; read by methods that no fused op knows.
        """
        if not self.scoring.is_fused:
            assert pages is not None
            for i, (prompt, own_pages) in enumerate(zip(batch.prompts, pages, strict=True)):
                self._take(batch, i, layer, self.scoring.by_scorer(prompt, layer, own_pages))
        else:
            if batch.windows is None:
                batch.windows = LayerWindows(batch.layers_at_once, len(batch.prompts))
            index = layer % batch.layers_at_once
            own = [window for window in windows if window is not None]
            assert all(window is None for window in windows[len(own) :])
            if own:
                batch.windows.keep(index, own)
            if index == batch.layers_at_once - 1 or layer == self.shape.num_layers - 1:
                self._score_fused(batch, layer - index, index + 1, len(own))
        if batch.staging is not None and not batch.staging.is_joint:
            self._settle_layer(batch, batch.staging, layer)

    def _score_fused(
        self, batch: PromptBatch, first: int, num_layers: int, num_direct: int
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
        staging, geometries = batch.staging, batch.geometries
        prompts = ops.Prompts(
            ops.Rows(batch.rows, batch.block_table),
            batch.num_rated,
            batch.num_candidates,
            max_rated=max(self.scoring.num_rated(g) for g in geometries),
            max_candidates=max(g.num_candidate_tokens for g in geometries),
        )
        pool = self._paged
        if staging is not None:
            pool = ops.Pool(staging.area(), 1, self.shape.num_kv_heads, self._kernel_order)
        width = max(g.first_kept_block for g in geometries) * self._chooser.per_page
        streams = self.shape.streams(first, num_layers)
        out = batch.first[:, streams, :width]
        self.scoring.by_ops(pool, prompts, query, lse, first, out)
        if first + num_layers == self.shape.num_layers:
            batch.windows = None

    def _take(self, batch: PromptBatch, i: int, layer: int, entries: LayerScores) -> None:
        """Put one prompt's scores of a layer's entries into the batch."""
        streams, num_entries = self.shape.streams(layer), entries.first.shape[1]
        batch.first[i, streams, :num_entries] = entries.first
        if entries.second is not None:
            if batch.second is None:
                batch.second = torch.empty_like(batch.first)
            batch.second[i, streams, :num_entries] = entries.second

    def compact(self, batch: PromptBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Select over all layers and copy what is kept into the regions.

        Args:
            batch: fully scored; what its prompts had collected is dropped.

        Returns:
            num_pages [R, S] int32 pages of each stream, and page_offsets [R, S + 1] int32.
        """
        geometries, staging = batch.geometries, batch.staging
        if staging is None:
            choice = self._chooser.choose(geometries, batch.num_entries, batch.first, batch.second)
            num_pages = choice.num_pages
            page_offsets, _ = ops.select_and_compact(
                choice.scores,
                batch.num_entries,
                num_pages,
                self._paged,
                ops.Rows(batch.rows, batch.block_table),
                max_region_blocks=max(g.num_region_blocks for g in geometries),
                granularity=self.config.granularity,
                backend=self._backends.select,
            )
        elif staging.is_joint:
            none = torch.zeros(len(batch.prompts), 1, dtype=torch.int64, device=self.pool.device)
            num_pages, page_offsets = self._move_chosen(batch, staging, none)
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
        budgets = self._chooser.budgets(batch.geometries)
        earlier = np.array([[b.layer_pages[:layer].sum()] for b in budgets], np.int64)
        first_pages = to_device(earlier, self.pool.device)
        num_pages, _ = self._move_chosen(batch, staging, first_pages, layer)
        batch.num_pages[:, self.shape.streams(layer)] = num_pages

    def _move_chosen(
        self,
        batch: PromptBatch,
        staging: Staging,
        first_pages: torch.Tensor,
        layer: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose among staged entries of a layer, or of all; pages and offsets of its streams."""
        choice = self._chooser.choose(
            batch.geometries, batch.num_entries, batch.first, batch.second, layer
        )
        page_offsets, indices = self._chooser.select(choice, batch.num_entries)
        staging.write(page_offsets, indices, first_pages)
        return choice.num_pages, page_offsets

    def pages(self, layer: int, blocks: torch.Tensor) -> LayerPages:
        """One layer of the prompt that lies in the pool's `blocks`, [n] int64."""
        return LayerPages.of_pool(self.pool.flatten(1), self.shape, layer, blocks)
