"""What a worker keeps between steps, on any platform: pool, requests, page offsets, compactor."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_kvcompress.compaction import score_memory
from vllm_kvcompress.compaction.compactor import Compactor, PromptBatch
from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.compaction.prompts import LayerPages
from vllm_kvcompress.compaction.requests import Requests
from vllm_kvcompress.compaction.scoring import Backends
from vllm_kvcompress.compaction.step_plan import PromptChunk, StepPlan, plan_step
from vllm_kvcompress.compaction.windows import Window
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import CacheShape, CompressedRow, cdiv
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.ops.transfers import to_device
from vllm_kvcompress.vllm_integration.worker.metrics import CompressionStats
from vllm_kvcompress.vllm_integration.worker.pool import flat_pool

# Request ids and prompt lengths of a step's rows, told by vLLM's metadata.
RowNames = Callable[[Any], tuple[Sequence[str], np.ndarray]]


@dataclass(frozen=True)
class Ending:
    """Prompts that end in a step: their chunks, and what becomes of them, in the same order."""

    chunks: list[PromptChunk]
    batch: PromptBatch


@dataclass(kw_only=True)
class Step:
    """What the layers of a step share.

    Attributes:
        plan: how its rows are attended.
        dense_table: [R - first_dense, W] int32 block table, regions of prompts that are still dense
            cut out, so that position p is at block p // block_size.
        first_dense: the first row that it has.
        endings: prompts that end in this step, in batches, one-shot ones apart from the others.
        prompt_blocks: by row, [n] int64 blocks of prompts whose pages have been asked for.
    """

    plan: StepPlan
    dense_table: torch.Tensor
    first_dense: int = 0
    endings: list[Ending] = field(default_factory=list)
    prompt_blocks: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def chunks(self) -> list[PromptChunk]:
        """Tokens to collect."""
        return self.plan.chunks

    @property
    def staged(self) -> Ending | None:
        """Prompts that have no blocks for what they evict."""
        return next((e for e in self.endings if e.batch.staging is not None), None)


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What the engine of a worker is made of, on any platform.

    Attributes:
        config: validated setting.
        shape: of the cache on this rank.
        layer_views: layer name to its [block, H, block_size, 2 * d] view of the one pool, in
            layer order.
        layers: what scoring must know of each layer, in layer order.
        row_names: tells the rows of a step.
        max_num_reqs: rows of the largest step, CUDA graphs' padding included.
        stats: where finished prompts are recorded.
        one_shot_tokens: most tokens of a step whose prompts may have no blocks for what they
            evict, which a buffer made now has room for; None = each step makes its own.
    """

    config: KVCompressConfig
    shape: CacheShape
    layer_views: dict[str, torch.Tensor]
    layers: list[LayerParameters]
    row_names: RowNames
    max_num_reqs: int
    stats: CompressionStats
    one_shot_tokens: int | None = None


class WorkerEngine:
    """One worker's side of the compression, bound to its KV cache. A platform adds its steps.

    No step waits for the device: what has to be known on the host follows from prompt lengths and
    token counts, and what depends on scores stays on the device.

    Args:
        parts: of the worker.
        order: element order of a page.
        backends: of the ops.

    Raises:
        RuntimeError: if the views are not slices of one [block, layer, head, ...] buffer.
    """

    # Whether queries of rows of one token can be collected.
    shows_single = False

    def __init__(self, parts: EngineParts, order: PageOrder, backends: Backends) -> None:
        shape = self.shape = parts.shape
        self.stats = parts.stats
        self.backends = backends
        self.layer_index = {name: i for i, name in enumerate(parts.layer_views)}
        pool = flat_pool(list(parts.layer_views.values()), shape)
        self.pool = pool.view(-1, shape.block_size, 2 * shape.head_size)
        self._order = order
        self._row_names = parts.row_names
        self._max_num_reqs = parts.max_num_reqs
        self._one_shot_tokens = parts.one_shot_tokens
        self._is_in_step = False
        self.page_offsets = self._make_page_offsets()
        self.configure(parts.config, parts.layers)

    def _make_page_offsets(self) -> torch.Tensor:
        """[max_num_reqs + 1, S + 1] int32, one row per compacted request; the first is empty."""
        size = (self._max_num_reqs + 1, self.shape.pages_per_block + 1)
        return torch.zeros(size, dtype=torch.int32, device=self.pool.device)

    def add_readers(self, readers: dict[str, str]) -> None:
        """Tell of layers without a cache of their own.

        Args:
            readers: name of each, and of the layer whose cache it reads.
        """
        self.layer_index |= {name: self.layer_index[owner] for name, owner in readers.items()}

    def configure(self, config: KVCompressConfig, layers: list[LayerParameters]) -> None:
        """Use a setting from now on; no request of an earlier one may go on."""
        compactor = Compactor(config, self.shape, self.pool, self._order, layers, self.backends)
        # Nothing has refused the setting. The earlier one's buffer goes before there is another.
        self.compactor = compactor
        self.config = config
        geometry = config.geometry(self.shape.block_size)
        self.requests = Requests(geometry, self.shape.num_layers, self._max_num_reqs)
        if self._one_shot_tokens is not None:
            num_pages = config.one_shot.counted_buffer_pages(
                self.shape, self._one_shot_tokens, self._max_num_reqs
            )
            compactor.use_buffer(self.pool.new_zeros(num_pages, *self.pool.shape[1:]))

    def use_parameters(self, layers: list[LayerParameters]) -> None:
        """Score with other weights from now on; requests go on."""
        self.compactor.use_parameters(layers)

    @property
    def ops_name(self) -> str:
        """What computes, for people."""
        return self.compactor.ops_name

    @contextmanager
    def scheduled_step(
        self, one_shot_ids: Container[str] = (), whole_ids: Container[str] = ()
    ) -> Iterator[None]:
        """Around a step of the scheduler. Batches outside of one are made up (warm-up, capture).

        Args:
            one_shot_ids: requests that begin in it and have no blocks for what they evict.
            whole_ids: requests that are never compressed.
        """
        self._is_in_step = True
        self.requests.expect(whole_ids, one_shot_ids)
        try:
            yield
        finally:
            self._is_in_step = False
            self.requests.expect()

    def prepare(self, common: Any) -> Step:
        """Plan a step and prepare what the platform's attention reads in it.

        Args:
            common: vLLM's CommonAttentionMetadata. Its slots are corrected in place, and those of
                tokens that get none are -1.
        """
        raise NotImplementedError

    def plan(self, common: Any, host_seq_lens: torch.Tensor) -> StepPlan:
        """Tell the rows of a step apart.

        Args:
            common: vLLM's CommonAttentionMetadata.
            host_seq_lens: [R] tokens of each row after this step, on the host.
        """
        names: tuple[Sequence[str], np.ndarray] = ((), np.empty(0, np.int32))
        if self._is_in_step:
            names = self._row_names(common)
        plan = plan_step(
            self.requests,
            self.config.window,
            *names,
            common.query_start_loc_cpu.numpy(),
            host_seq_lens.numpy() if len(names[0]) else np.empty(0),
            collect_all=self.compactor.collects_all,
            shows_single=self.shows_single,
        )
        for request_id, prompt_len in plan.finished_whole:
            self.stats.record_whole(request_id, prompt_len)
        return plan

    def endings(self, plan: StepPlan, block_table: torch.Tensor) -> list[Ending]:
        """Prompts that end in a step, ready to be scored.

        Args:
            plan: of the step.
            block_table: [R, W] int32, vLLM's.
        """
        endings = []
        batches = [(False, chunks) for chunks in self._batches(plan)]
        batches.append((True, [c for c in plan.chunks if c.finishes and c.is_one_shot]))
        num_ending = sum(len(chunks) for _, chunks in batches)
        for is_one_shot, chunks in batches:
            if not chunks:
                continue
            # Windows that this step has are copied together.
            chunks.sort(key=lambda chunk: self._direct_window(chunk) is None)
            index = to_device(np.array([chunk.row for chunk in chunks]), self.pool.device)
            batch = self.compactor.batch(
                [chunk.request.prompt for chunk in chunks],
                block_table.index_select(0, index),
                is_one_shot,
                num_ending,
            )
            endings.append(Ending(chunks, batch))
        return endings

    def _batches(self, plan: StepPlan) -> list[list[PromptChunk]]:
        """Prompts with blocks that end in a step, cut where scores would take too much memory.

        Scores of a batch have room for its longest prompt in all its rows.
        """
        chunks = [c for c in plan.chunks if c.finishes and not c.is_one_shot]
        memory, most = self.compactor.memory, score_memory.MOST_SCORE_BYTES
        sizes = {c.row: memory.prompt_bytes(c.request.prompt.geometry) for c in chunks}
        if max(sizes.values(), default=0) * len(chunks) <= most:
            return [chunks]
        batches: list[list[PromptChunk]] = []
        for chunk in sorted(chunks, key=lambda chunk: sizes[chunk.row]):
            if batches and sizes[chunk.row] * (len(batches[-1]) + 1) <= most:
                batches[-1].append(chunk)
            else:
                batches.append([chunk])
        return batches

    def staged_places(self, step: Step, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where one-shot prompts' keys and values go, in each layer's area.

        Args:
            step: of the rows.
            first, end: some of its one-shot prompts, by their order.

        Returns:
            [end - first, W] int32 block table and [t] int64 slots.
        """
        assert step.staged is not None and step.staged.batch.staging is not None
        staging = step.staged.batch.staging
        prompts = slice(first, end)
        return staging.block_table[prompts], staging.slots(prompts)

    def begin_layer(self, step: Step, layer: int) -> torch.Tensor:
        """Room for a layer of a step's one-shot prompts: [blocks, H, b, 2 d], to be written."""
        assert step.staged is not None
        return self.compactor.begin_layer(step.staged.batch, layer)

    def current_layer(self, step: Step) -> torch.Tensor:
        """What `begin_layer` has returned last, for a layer that reads it too."""
        assert step.staged is not None and step.staged.batch.staging is not None
        return step.staged.batch.staging.area().unflatten(0, (-1, self.shape.num_kv_heads))

    def after_attention(
        self,
        step: Step,
        layer: int,
        query: torch.Tensor,
        lses: Sequence[tuple[slice, torch.Tensor]] = (),
    ) -> None:
        """Collect one layer's queries; score prompts that end; at the last layer, compact them.

        Args:
            step: at hand.
            layer: 0-based index among the compressed layers.
            query: [T, H * g, d] of the step.
            lses: runs of tokens and, as [H * g, t] float32, the logarithm of each query's sum over
                its keys; all that scores are made of, or none.
        """
        for ending in step.endings:
            self._score(step, ending, layer, query, lses)
        for chunk in step.chunks:
            if not chunk.finishes:
                pages = self._pool_pages(step, chunk, layer)
                self._collect(chunk, layer, query, pages, lses)

    def _score(
        self,
        step: Step,
        ending: Ending,
        layer: int,
        query: torch.Tensor,
        lses: Sequence[tuple[slice, torch.Tensor]],
    ) -> None:
        """Score one layer of prompts that end; at the last layer, compact them."""
        chunks, batch = ending.chunks, ending.batch
        pages: list[LayerPages] = []
        windows: list[Window | None] = []
        for i, chunk in enumerate(chunks):
            tokens = self._direct_window(chunk)
            if tokens is not None:
                windows.append(Window(query[tokens], _lse_of(tokens, lses)))
                continue
            if batch.staging is not None:
                pages.append(batch.staging.pages(i))
            else:
                pages.append(self._pool_pages(step, chunk, layer))
            self._collect(chunk, layer, query, pages[-1], lses)
            windows.append(None)
        # Only methods without direct windows read pages here.
        self.compactor.score_layer(batch, layer, windows, pages)
        if layer == self.shape.num_layers - 1:
            self._compact(ending)

    def _collect(
        self,
        chunk: PromptChunk,
        layer: int,
        query: torch.Tensor,
        pages: LayerPages,
        lses: Sequence[tuple[slice, torch.Tensor]],
    ) -> None:
        tokens = slice(chunk.token_start, chunk.token_end)
        prompt, lse = chunk.request.prompt, _lse_of(tokens, lses)
        self.compactor.collect(prompt, layer, query[tokens], chunk.first, pages, lse)

    def _direct_window(self, chunk: PromptChunk) -> slice | None:
        """Tokens of the step that are a whole scoring window, if ops take them as they are."""
        if not (chunk.finishes and self.compactor.is_fused):
            return None
        return chunk.whole_window(self.config.window)

    def _pool_pages(self, step: Step, chunk: PromptChunk, layer: int) -> LayerPages:
        """One layer of a prompt that has its blocks, as far as it is computed."""
        blocks = step.prompt_blocks.get(chunk.row)
        if blocks is None:
            num_tokens = chunk.first + chunk.token_end - chunk.token_start
            row = step.dense_table[chunk.row - step.first_dense]
            blocks = row[: cdiv(num_tokens, self.shape.block_size)].long()
            step.prompt_blocks[chunk.row] = blocks
        return self.compactor.pages(layer, blocks)

    def _compact(self, ending: Ending) -> None:
        batch = ending.batch
        num_pages, page_offsets = self.compactor.compact(batch)
        rows = [self.requests.mark_compacted(chunk.request) for chunk in ending.chunks]
        index = to_device(np.array(rows), self.pool.device)
        self.page_offsets.index_copy_(0, index, page_offsets)
        self.stats.record_compressed(
            [chunk.request_id for chunk in ending.chunks],
            batch.geometries,
            num_pages.view(-1, self.shape.num_layers, self.shape.num_kv_heads),
            is_one_shot=batch.staging is not None,
        )

    def row_state(self, request_id: str) -> CompressedRow:
        """State of a known request's row. Of a compacted one, waits for the device.

        Raises:
            KeyError: if nothing is known of the request.
        """
        row = self.requests.row(request_id)
        if not row.is_compacted:
            return row
        offsets = self.page_offsets[self.requests.get(request_id).offsets_row]
        return row.with_page_counts(offsets.diff().tolist())

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop requests that have finished or were preempted."""
        for request_id in request_ids:
            self.requests.forget(request_id)


def _lse_of(tokens: slice, lses: Sequence[tuple[slice, torch.Tensor]]) -> torch.Tensor | None:
    """[m, H * g] of the run that has these tokens; None if there is none."""
    for run, lse in lses:
        if run.start <= tokens.start and tokens.stop <= run.stop:
            return lse[:, tokens.start - run.start : tokens.stop - run.start].t()
    return None


def cut_regions(
    plan: StepPlan, block_table: torch.Tensor, block_size: int, first_row: int = 0
) -> torch.Tensor:
    """Rows from `first_row` on, with position p at block p // block_size again.

    Args:
        plan: of the step.
        block_table: [R, W] int32, vLLM's; a copy is made where something is cut.
        block_size: tokens per block.
        first_row: rows before it are left out.

    Returns:
        [R - first_row, W] int32. A prompt that is being finished still attends to all of its dense
        blocks.
    """
    table = block_table[first_row:]
    cut = [own for own in plan.cut if own[0] >= first_row]
    if not cut:
        return table
    table = table.clone()
    for row, seq_len, geometry in cut:
        boundary, region = geometry.boundary_block, geometry.num_region_blocks
        end = cdiv(seq_len, block_size)
        tail = block_table[row, boundary + region : end + region]
        table[row - first_row, boundary:end] = tail
    return table
