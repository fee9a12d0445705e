"""What a GPU worker keeps between steps: pool, requests, page offsets, compactor."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_kvcompress import ops, score_memory
from vllm_kvcompress.candidates import LayerPages
from vllm_kvcompress.compaction import CacheShape, LayerParameters, PromptCompaction
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.layer_windows import Window
from vllm_kvcompress.memory import Geometry, cdiv
from vllm_kvcompress.ops import MAX_QUERY_LEN
from vllm_kvcompress.paged_compaction import PagedCompactor, PromptBatch
from vllm_kvcompress.staging import can_stage, is_joint, staging_pages
from vllm_kvcompress.transfers import to_device
from vllm_kvcompress.vllm_integration.batch_cuda import (
    DeviceRequests,
    ExtendedRow,
    PromptChunk,
    StepPlan,
    plan_step,
    prompt_runs,
)
from vllm_kvcompress.vllm_integration.engine import flat_pool
from vllm_kvcompress.vllm_integration.metrics import CompressionStats
from vllm_kvcompress.vllm_integration.step_buffers import StepBuffers

# Kernels are the same for any length.
_WARM_UP_TOKENS = 1024

# From a plan's numbers to a row descriptor's without its length, and the row of the page offsets.
# The region of a first compaction begins at its boundary.
_ROW_NUMBERS = [0, 1, 1, 2, 3]
# Request ids and prompt lengths of a step's rows, told by vLLM's metadata.
RowNames = Callable[[Any], tuple[Sequence[str], np.ndarray]]


@dataclass(frozen=True)
class ExtendedRun:
    """A compressed row of several tokens, as pieces that the decode kernel takes.

    Attributes:
        token_start, token_end: its tokens.
        rows: [P, ROW_FIELDS] int32 descriptors, one per piece.
        page_offsets: [P, S + 1] int32, the row's own in every piece.
        block_table: [P, W] int32, likewise.
        query_start_loc: [P + 1] int32.
        work: the pieces' shares of the decode kernel's programs; None for the reference.
    """

    token_start: int
    token_end: int
    rows: torch.Tensor
    page_offsets: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    work: ops.DecodeWork | None


@dataclass(frozen=True)
class Ending:
    """Prompts that end in a step: their chunks, and what becomes of them, in the same order."""

    chunks: list[PromptChunk]
    batch: PromptBatch


@dataclass
class DeviceStep:
    """A step as the layers need it; the first four, and `work`, lie at fixed addresses.

    Attributes:
        rows: [R, ROW_FIELDS] int32 descriptors.
        page_offsets: [R, S + 1] int32.
        block_table: [R, W] int32, vLLM's.
        query_start_loc: [R + 1] int32, vLLM's.
        work: shares of the decode kernel's programs in the single rows; None for the reference.
        num_single: rows at the front that have one token each.
        dense_table: [R - num_single, W] int32 for the rows behind them, regions cut out.
        extended: rows behind them that are compressed.
        runs: the others behind them as (first row, end, whether they are one-shot), in order.
        chunks: tokens to collect.
        endings: prompts that end in this step, in batches, one-shot ones apart from the others.
        prompt_blocks: by row, [n] int64 blocks of prompts whose pages have been asked for.
    """

    rows: torch.Tensor
    page_offsets: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    work: ops.DecodeWork | None
    num_single: int
    dense_table: torch.Tensor
    extended: list[ExtendedRun] = field(default_factory=list)
    runs: list[tuple[int, int, bool]] = field(default_factory=list)
    chunks: list[PromptChunk] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    prompt_blocks: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def staged(self) -> Ending | None:
        """Prompts that have no blocks for what they evict."""
        return next((e for e in self.endings if e.batch.staging is not None), None)


class CUDAEngine:
    """One GPU worker's side of the compression, bound to its KV cache.

    No step waits for the device: what has to be known on the host follows from prompt lengths and
    token counts, and what depends on scores stays on the device.

    Args:
        config: validated setting.
        shape: of the cache on this rank.
        layer_views: layer name to its [block, H, block_size, 2 * d] view of the one pool, in
            layer order.
        layers: what scoring must know of each layer, in layer order.
        row_names: tells the rows of a step.
        max_num_reqs: rows of the largest step, CUDA graphs' padding included.
        stats: where finished prompts are recorded.
        one_shot_tokens: most tokens of a step whose prompts may have no blocks for what they
            evict; 0 = there are no such prompts.
        backend: of the ops, 'triton' or 'reference'.
        select_backend: of those that select and copy, 'native' too; None = `backend`.
        tells_lse: whether attention can tell its queries' sums in every layer.

    Raises:
        RuntimeError: if the views are not slices of one [block, layer, head, ...] buffer.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        shape: CacheShape,
        layer_views: dict[str, torch.Tensor],
        layers: list[LayerParameters],
        row_names: RowNames,
        max_num_reqs: int,
        stats: CompressionStats,
        one_shot_tokens: int = 0,
        backend: str = "triton",
        select_backend: str | None = None,
        tells_lse: bool = True,
    ) -> None:
        self.shape = shape
        self._tells_lse = tells_lse
        self.ops_name = backend
        if select_backend is not None:
            self.ops_name += f", {select_backend} selection"
        self.layer_index = {name: i for i, name in enumerate(layer_views)}
        pool = flat_pool(list(layer_views.values()), shape)
        self.pool = pool.view(-1, shape.block_size, 2 * shape.head_size)
        self.stats = stats
        self.backend = backend
        self._select_backend = select_backend
        self._row_names = row_names
        self._max_num_reqs = max_num_reqs
        self._one_shot_tokens = one_shot_tokens
        self._one_shot_ids: Container[str] = ()
        self._is_in_step = False
        self._buffers = StepBuffers(shape, max_num_reqs, self.pool.dtype, self.pool.device)
        self._page_offsets = self._buffers.page_offsets
        self._work, self._extended_work = None, None
        if backend != "reference":
            self._work, self._extended_work = self._buffers.work, self._buffers.extended_work
        self.configure(config, layers)

    def add_readers(self, readers: dict[str, str]) -> None:
        """Tell of layers without a cache of their own.

        Args:
            readers: name of each, and of the layer whose cache it reads.
        """
        self.layer_index |= {name: self.layer_index[owner] for name, owner in readers.items()}

    def _zeros(self, *size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device=self.pool.device)

    def share_out(
        self,
        work: ops.DecodeWork | None,
        rows: ops.Rows,
    ) -> ops.DecodeWork | None:
        """Share a step's rows out among the decode kernel's programs, for all layers."""
        if work is None or not len(rows):
            return work
        return ops.decode_work(
            rows,
            num_kv_heads=self.shape.num_kv_heads,
            block_size=self.shape.block_size,
            out=work,
            backend=self.backend,
        )

    def configure(self, config: KVCompressConfig, layers: list[LayerParameters]) -> None:
        """Use a setting from now on; no request of an earlier one may go on."""
        # First what may refuse the setting.
        self.compactor = PagedCompactor(
            config, self.shape, self.pool, layers, self.backend, self._select_backend
        )
        self.config = config
        self.requests = DeviceRequests(
            Geometry(config, self.shape.block_size), self.shape.num_layers, self._max_num_reqs
        )
        num_pages = staging_pages(config, self.shape, self._one_shot_tokens, self._max_num_reqs)
        self._buffer = self.pool.new_empty(0)
        self._buffer = self.pool.new_zeros(num_pages, *self.pool.shape[1:])

    def use_parameters(self, layers: list[LayerParameters]) -> None:
        """Score with other weights from now on; requests go on."""
        self.compactor.use_parameters(layers)

    @contextmanager
    def scheduled_step(self, one_shot_ids: Container[str] = ()) -> Iterator[None]:
        """Around a step of the scheduler. Batches outside of one are made up (warm-up, capture).

        Args:
            one_shot_ids: requests that begin in it and have no blocks for what they evict.
        """
        self._is_in_step, self._one_shot_ids = True, one_shot_ids
        try:
            yield
        finally:
            self._is_in_step, self._one_shot_ids = False, ()

    def prepare(self, common: Any) -> DeviceStep:
        """Tell the rows of a step apart and put what layers need where they look for it.

        Args:
            common: vLLM's CommonAttentionMetadata. Its slots are corrected in place where a row
                owns a region.
        """
        plan = self._plan(common)
        num_rows = common.num_reqs
        rows = self._buffers.rows[:num_rows]
        page_offsets = self._buffers.row_offsets[:num_rows]
        numbers = to_device(plan.numbers[_ROW_NUMBERS], self.pool.device)
        rows[:, 0] = common.seq_lens[:num_rows]
        rows[:, 1:] = numbers[:-1].t()
        torch.index_select(self._page_offsets, 0, numbers[-1], out=page_offsets)
        block_table = common.block_table_tensor[:num_rows]
        if plan.has_regions:
            ops.token_slots(
                ops.Rows(rows, block_table, None, common.query_start_loc),
                common.slot_mapping.shape[0],
                self.shape.block_size,
                out=common.slot_mapping,
                backend=self.backend,
            )
        for evicted in plan.one_shot.values():
            common.slot_mapping[evicted] = -1
        single = slice(plan.num_single)
        starts = common.query_start_loc[: plan.num_single + 1]
        return DeviceStep(
            rows=rows,
            page_offsets=page_offsets,
            block_table=block_table,
            query_start_loc=common.query_start_loc,
            work=self.share_out(
                self._work,
                ops.Rows(rows[single], block_table[single], page_offsets[single], starts),
            ),
            num_single=plan.num_single,
            dense_table=_cut_regions(block_table, plan),
            extended=[self._extended_run(row, plan.numbers, block_table) for row in plan.extended],
            runs=prompt_runs(plan),
            chunks=plan.chunks,
            endings=self._endings(plan, block_table),
        )

    def _endings(self, plan: StepPlan, block_table: torch.Tensor) -> list[Ending]:
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
                self._buffer if is_one_shot else None,
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

    def _plan(self, common: Any) -> StepPlan:
        names: tuple[Sequence[str], np.ndarray] = ((), np.empty(0, np.int32))
        if self._is_in_step:
            names = self._row_names(common)
        plan = plan_step(
            self.requests,
            self.config.window,
            *names,
            common.query_start_loc_cpu.numpy(),
            common.seq_lens_cpu_upper_bound.numpy() if len(names[0]) else np.empty(0),
            collect_all="all_queries" in self.compactor.scorer.needs,
            one_shot_ids=self._one_shot_ids,
        )
        for request_id, prompt_len in plan.finished_dense:
            self.stats.record_dense(request_id, prompt_len)
        return plan

    def _extended_run(
        self, row: ExtendedRow, numbers: np.ndarray, block_table: torch.Tensor
    ) -> ExtendedRun:
        ends = np.minimum(
            np.arange(1, cdiv(row.query_len, MAX_QUERY_LEN) + 1) * MAX_QUERY_LEN, row.query_len
        )
        num_pieces = len(ends)
        *region, slot = numbers[_ROW_NUMBERS, row.row].tolist()
        region = np.broadcast_to(region, (num_pieces, len(region)))
        rows = np.column_stack([row.seq_len - row.query_len + ends, region])
        packed = np.concatenate([rows.reshape(-1), [0], ends]).astype(np.int32)
        on_device = to_device(packed, self.pool.device)
        piece_rows = on_device[: rows.size].view(rows.shape)
        page_offsets = self._page_offsets[slot : slot + 1].expand(num_pieces, -1)
        query_start_loc = on_device[rows.size :]
        # Lists of its own: a step may have several such rows.
        work = self._extended_work
        if work is not None:
            work = work.for_rows(num_pieces, self.shape.num_kv_heads)
        table = block_table[row.row : row.row + 1].expand(num_pieces, -1)
        return ExtendedRun(
            token_start=row.token_start,
            token_end=row.token_start + row.query_len,
            rows=piece_rows,
            page_offsets=page_offsets,
            block_table=table,
            query_start_loc=query_start_loc,
            work=self.share_out(work, ops.Rows(piece_rows, table, page_offsets, query_start_loc)),
        )

    def staged_places(
        self, step: DeviceStep, first: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Block table [end - first, W] int32 and slots [t] int64 of one-shot rows, in an area."""
        assert step.staged is not None and step.staged.batch.staging is not None
        index = [chunk.row for chunk in step.staged.chunks].index(first)
        prompts = slice(index, index + end - first)
        staging = step.staged.batch.staging
        return staging.block_table[prompts], staging.slots(prompts)

    def begin_layer(self, step: DeviceStep, layer: int) -> torch.Tensor | None:
        """[blocks, H, b, 2 d] for a layer of the one-shot prompts, if there are any."""
        if step.staged is None:
            return None
        return self.compactor.begin_layer(step.staged.batch, layer)

    def current_layer(self, step: DeviceStep) -> torch.Tensor | None:
        """What `begin_layer` has returned last, for a layer that reads it too."""
        if step.staged is None:
            return None
        assert step.staged.batch.staging is not None
        return step.staged.batch.staging.area().unflatten(0, (-1, self.shape.num_kv_heads))

    def wants_lse(self, step: DeviceStep, tokens: slice) -> bool:
        """Whether scores are made of what attention to a run of tokens can tell."""
        return (
            self._tells_lse
            and self.compactor.is_fused
            and any(tokens.start <= chunk.token_start < tokens.stop for chunk in step.chunks)
        )

    def after_attention(
        self,
        step: DeviceStep,
        layer: int,
        query: torch.Tensor,
        lses: Sequence[tuple[slice, torch.Tensor]] = (),
    ) -> None:
        """Collect one layer's queries; score prompts that end; at the last layer, compact them.

        Args:
            step: of `prepare`.
            layer: 0-based index among the compressed layers.
            query: [T, H * g, d] of the step.
            lses: runs of tokens and, as [H * g, t] float32, the logarithm of each query's sum over
                its keys; all that `wants_lse`, or none.
        """
        for ending in step.endings:
            self._score(step, ending, layer, query, lses)
        for chunk in step.chunks:
            if not chunk.finishes:
                pages = self._pool_pages(step, chunk, layer)
                self._collect(chunk, layer, query, pages, lses)

    def _score(
        self,
        step: DeviceStep,
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
        """Tokens of the step that are a whole scoring window, if kernels take them as they are."""
        if not (chunk.finishes and self.compactor.is_fused):
            return None
        return chunk.whole_window(self.config.window)

    def _pool_pages(self, step: DeviceStep, chunk: PromptChunk, layer: int) -> LayerPages:
        """One layer of a prompt that has its blocks, as far as it is computed."""
        blocks = step.prompt_blocks.get(chunk.row)
        if blocks is None:
            num_tokens = chunk.first + chunk.token_end - chunk.token_start
            row = step.dense_table[chunk.row - step.num_single]
            blocks = row[: cdiv(num_tokens, self.shape.block_size)].long()
            step.prompt_blocks[chunk.row] = blocks
        return self.compactor.pages(layer, blocks)

    def _compact(self, ending: Ending) -> None:
        batch = ending.batch
        num_pages, page_offsets = self.compactor.compact(batch)
        slots = [self.requests.take_slot(chunk.request) for chunk in ending.chunks]
        index = to_device(np.array(slots), self.pool.device)
        self._page_offsets.index_copy_(0, index, page_offsets)
        self.stats.record_compressed(
            [chunk.request_id for chunk in ending.chunks],
            batch.geometries,
            num_pages.view(-1, self.shape.num_layers, self.shape.num_kv_heads),
            is_one_shot=batch.staging is not None,
        )

    def keep_whole(self, request_ids: Container[str]) -> None:
        """Say which requests of the next step are never compressed."""
        self.requests.whole_ids = request_ids

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop requests that have finished or were preempted."""
        for request_id in request_ids:
            self.requests.forget(request_id)

    def warm_up_work(self, max_query_len: int) -> ops.DecodeWork | None:
        """Compile and run what shares out rows of so many tokens; a row without a query.

        Returns:
            What `ops.ragged_decode` takes for such a row.
        """
        work = self._work if max_query_len == 1 else self._extended_work
        offsets = self._zeros(1, self.shape.pages_per_block + 1)
        row = self._zeros(1, len(ops.ROW_FIELDS))
        return self.share_out(work, ops.Rows(row, row, offsets, self._zeros(2)))

    def warm_up(self, max_len: int, tells_lse: bool = False) -> None:
        """Compile and run what a row's region or a prompt's end needs, before a request waits.

        Works on vLLM's null block, whose contents mean nothing.

        Args:
            max_len: tokens of the longest prompt. The made-up one is shorter, if it can be.
            tells_lse: whether attention tells its sums, so that scores are made of them.
        """
        ops.token_slots(
            ops.Rows(self._buffers.rows[:1], self._zeros(1, 1), None, self._zeros(2)),
            1,
            self.shape.block_size,
            backend=self.backend,
        )
        length = min(_WARM_UP_TOKENS, max_len)
        while length < max_len and not self.requests.geometry.of(length).is_compressed:
            length = min(2 * length, max_len)
        if self.requests.geometry.of(length).is_compressed:
            self._warm_up_compaction(length, None, tells_lse)
        lengths = [min(length, self._one_shot_tokens)]
        if is_joint(self.config):
            # A long one, whose layers fill the buffer.
            longest = min(max_len, self._one_shot_tokens)
            lengths = [longest >> i for i in range(longest.bit_length())]
        for length in lengths:
            geometry = self.requests.geometry.of(length)
            if geometry.is_compressed and can_stage(self.config, geometry):
                self._warm_up_compaction(length, self._buffer, tells_lse)
                return

    def _warm_up_compaction(
        self, length: int, buffer: torch.Tensor | None, tells_lse: bool
    ) -> None:
        """Compact a made-up prompt; staged, if there is a buffer."""
        geometry = self.requests.geometry.of(length)
        shape, device = self.shape, self.pool.device
        table = self._zeros(1, geometry.num_row_blocks(length))
        num_heads = shape.num_kv_heads * shape.num_queries_per_kv
        size = (geometry.compact_len, num_heads, shape.head_size)
        query = torch.ones(size, dtype=self.pool.dtype, device=device)
        lse = None
        if tells_lse and self.compactor.is_fused:
            lse = query.new_zeros(self.config.window, num_heads, dtype=torch.float32)
        blocks = table[0].long()[: cdiv(geometry.compact_len, shape.block_size)]
        prompt = PromptCompaction(geometry, shape.num_layers)
        batch = self.compactor.batch([prompt], table, buffer)
        for layer in range(shape.num_layers):
            pages = self.compactor.pages(layer, blocks)
            if batch.staging is not None:
                self.compactor.begin_layer(batch, layer)
                pages = batch.staging.pages(0)
            if lse is None:
                self.compactor.collect(prompt, layer, query, 0, pages)
                window = None
            else:
                window = Window(query[-self.config.window :], lse)
            self.compactor.score_layer(batch, layer, [window], [pages])
        self.compactor.compact(batch)


def _lse_of(tokens: slice, lses: Sequence[tuple[slice, torch.Tensor]]) -> torch.Tensor | None:
    """[m, H * g] of the run that has these tokens; None if there is none."""
    for run, lse in lses:
        if run.start <= tokens.start and tokens.stop <= run.stop:
            return lse[:, tokens.start - run.start : tokens.stop - run.start].t()
    return None


def _cut_regions(block_table: torch.Tensor, plan: StepPlan) -> torch.Tensor:
    """Rows behind the single ones, with position p at block p // block_size again."""
    table = block_table[plan.num_single :]
    if not plan.cut:
        return table
    # A prompt that is being finished still attends to all of its dense blocks.
    table = table.clone()
    for row, seq_len, geometry in plan.cut:
        boundary, region = geometry.boundary_block, geometry.num_region_blocks
        end = cdiv(seq_len, geometry.block_size)
        tail = block_table[row, boundary + region : end + region]
        table[row - plan.num_single, boundary:end] = tail
    return table
