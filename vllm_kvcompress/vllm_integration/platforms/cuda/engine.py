"""A GPU worker's steps: what layers and captured graphs read lies at fixed addresses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.prompts import PromptCompaction
from vllm_kvcompress.compaction.scoring import Backends
from vllm_kvcompress.compaction.step_plan import ExtendedRow, prompt_runs
from vllm_kvcompress.compaction.windows import Window
from vllm_kvcompress.memory import cdiv
from vllm_kvcompress.ops import MAX_QUERY_LEN, PageOrder
from vllm_kvcompress.ops.transfers import to_device
from vllm_kvcompress.vllm_integration.platforms.cuda.step_buffers import StepBuffers
from vllm_kvcompress.vllm_integration.worker.engine import (
    EngineParts,
    Step,
    WorkerEngine,
    cut_regions,
)

# Kernels are the same for any length.
_WARM_UP_TOKENS = 1024


@dataclass(frozen=True)
class ExtendedRun:
    """A compacted row of several tokens, as pieces that the decode kernel takes.

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


@dataclass(kw_only=True)
class DeviceStep(Step):
    """A step as the layers need it; the first four, and `work`, lie at fixed addresses.

    Attributes:
        rows: [R, ROW_FIELDS] int32 descriptors.
        page_offsets: [R, S + 1] int32.
        block_table: [R, W] int32, vLLM's.
        query_start_loc: [R + 1] int32, vLLM's.
        work: shares of the decode kernel's programs in the single rows; None for the reference.
        extended: rows behind the single ones that are compacted.
        runs: the others as (first row, end, whether they are one-shot), in order.
    """

    rows: torch.Tensor
    page_offsets: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    work: ops.DecodeWork | None
    extended: list[ExtendedRun] = field(default_factory=list)
    runs: list[tuple[int, int, bool]] = field(default_factory=list)


class CUDAEngine(WorkerEngine):
    """One GPU worker's side of the compression, bound to its KV cache.

    Args:
        parts: as in `WorkerEngine`; one_shot_tokens 0 = there are no such prompts.
        backend: of the ops, 'triton' or 'reference'.
        select_backend: of those that select and copy, 'native' too; None = `backend`.
        tells_lse: whether attention can tell its queries' sums in every layer.

    Raises:
        RuntimeError: if the views are not slices of one [block, layer, head, ...] buffer.
    """

    def __init__(
        self,
        parts: EngineParts,
        backend: str = "triton",
        select_backend: str | None = None,
        tells_lse: bool = True,
    ) -> None:
        self._tells_lse = tells_lse
        self.backend = backend
        order = PageOrder.plain(parts.shape.block_size, parts.shape.head_size)
        super().__init__(parts, order, Backends(backend, select_backend or backend, move=backend))
        self._work, self._extended_work = None, None
        if backend != "reference":
            self._work, self._extended_work = self._buffers.work, self._buffers.extended_work

    def _make_page_offsets(self) -> torch.Tensor:
        device, dtype = self.pool.device, self.pool.dtype
        self._buffers = StepBuffers(self.shape, self._max_num_reqs, dtype, device)
        return self._buffers.page_offsets

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

    def prepare(self, common: Any) -> DeviceStep:
        """Tell the rows of a step apart and put what layers need where they look for it.

        Args:
            common: vLLM's CommonAttentionMetadata. Its slots are corrected in place where a row
                owns a region.
        """
        plan = self.plan(common, common.seq_lens_cpu_upper_bound)
        num_rows = common.num_reqs
        rows = self._buffers.rows[:num_rows]
        page_offsets = self._buffers.row_offsets[:num_rows]
        numbers = to_device(plan.numbers, self.pool.device)
        rows[:, 0] = common.seq_lens[:num_rows]
        rows[:, 1:] = numbers[:-1].t()
        torch.index_select(self.page_offsets, 0, numbers[-1], out=page_offsets)
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
            plan=plan,
            dense_table=cut_regions(plan, block_table, self.shape.block_size, plan.num_single),
            first_dense=plan.num_single,
            endings=self.endings(plan, block_table),
            rows=rows,
            page_offsets=page_offsets,
            block_table=block_table,
            query_start_loc=common.query_start_loc,
            work=self.share_out(
                self._work,
                ops.Rows(rows[single], block_table[single], page_offsets[single], starts),
            ),
            extended=[self._extended_run(row, plan.numbers, block_table) for row in plan.extended],
            runs=prompt_runs(plan),
        )

    def _extended_run(
        self, row: ExtendedRow, numbers: np.ndarray, block_table: torch.Tensor
    ) -> ExtendedRun:
        ends = np.minimum(
            np.arange(1, cdiv(row.query_len, MAX_QUERY_LEN) + 1) * MAX_QUERY_LEN, row.query_len
        )
        num_pieces = len(ends)
        *region, offsets_row = numbers[:, row.row].tolist()
        region = np.broadcast_to(region, (num_pieces, len(region)))
        rows = np.column_stack([row.seq_len - row.query_len + ends, region])
        packed = np.concatenate([rows.reshape(-1), [0], ends]).astype(np.int32)
        on_device = to_device(packed, self.pool.device)
        piece_rows = on_device[: rows.size].view(rows.shape)
        page_offsets = self.page_offsets[offsets_row : offsets_row + 1].expand(num_pieces, -1)
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

    def wants_lse(self, step: DeviceStep, tokens: slice) -> bool:
        """Whether scores are made of what attention to a run of tokens can tell."""
        return (
            self._tells_lse
            and self.compactor.is_fused
            and any(tokens.start <= chunk.token_start < tokens.stop for chunk in step.chunks)
        )

    def warm_up_work(self, max_query_len: int) -> ops.DecodeWork | None:
        """Compile and run what shares out rows of so many tokens; a row without a query.

        Returns:
            What `ops.ragged_decode` takes for such a row.
        """
        work = self._work if max_query_len == 1 else self._extended_work
        offsets = self._zeros(1, self.shape.pages_per_block + 1)
        row = self._zeros(1, len(ops.ROW_FIELDS))
        return self.share_out(work, ops.Rows(row, row, offsets, self._zeros(2)))

    def warm_up(self, max_len: int) -> None:
        """Compile and run what a row's region or a prompt's end needs, before a request waits.

        Works on vLLM's null block, whose contents mean nothing.

        Args:
            max_len: tokens of the longest prompt. The made-up one is shorter, if it can be.
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
            self._warm_up_compaction(length, False)
        one_shot_tokens = self._one_shot_tokens or 0
        lengths = [min(length, one_shot_tokens)]
        if self.config.layers_compete:
            # A long one, whose layers fill the buffer.
            longest = min(max_len, one_shot_tokens)
            lengths = [longest >> i for i in range(longest.bit_length())]
        for length in lengths:
            geometry = self.requests.geometry.of(length)
            if geometry.is_compressed and self.config.one_shot.fits_counted_buffer(geometry):
                self._warm_up_compaction(length, True)
                return

    def _warm_up_compaction(self, length: int, is_one_shot: bool) -> None:
        """Compact a made-up prompt."""
        geometry = self.requests.geometry.of(length)
        shape, device = self.shape, self.pool.device
        table = self._zeros(1, geometry.num_row_blocks(length))
        num_heads = shape.num_kv_heads * shape.num_queries_per_kv
        size = (geometry.compact_len, num_heads, shape.head_size)
        query = torch.ones(size, dtype=self.pool.dtype, device=device)
        lse = None
        if self._tells_lse and self.compactor.is_fused:
            lse = query.new_zeros(self.config.window, num_heads, dtype=torch.float32)
        blocks = table[0].long()[: cdiv(geometry.compact_len, shape.block_size)]
        prompt = PromptCompaction(geometry, shape.num_layers)
        batch = self.compactor.batch([prompt], table, is_one_shot)
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
