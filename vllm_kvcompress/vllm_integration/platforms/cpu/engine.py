"""A CPU worker's steps: pages of single KV heads for vLLM's own kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.compaction.requests import (
    BOUNDARY_BLOCK,
    OFFSETS_ROW,
    REGION_BLOCKS,
    CompressedRequest,
)
from vllm_kvcompress.compaction.scoring import Backends
from vllm_kvcompress.compaction.step_plan import StepPlan
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.vllm_integration.worker.engine import (
    EngineParts,
    Step,
    WorkerEngine,
    cut_regions,
)


@dataclass(kw_only=True)
class HostStep(Step):
    """A step as the layers need it.

    Attributes:
        dense_rows, one_shot_rows, compacted_rows: row numbers, together all rows.
        page_tables: per compacted row [S, width] int32 page ids of its streams.
        page_counts: [r, S] int32 region pages of the compacted rows' streams.
    """

    dense_rows: list[int]
    one_shot_rows: list[int]
    compacted_rows: list[int]
    page_tables: list[torch.Tensor]
    page_counts: torch.Tensor


class CPUEngine(WorkerEngine):
    """One CPU worker's side of the compression, bound to its KV cache.

    Args:
        parts, order: as in `WorkerEngine`.
        backend: of the ops, 'torch' or 'native'.
        why_torch: what to tell people about a backend 'torch' that is none of their choice.

    Attributes:
        kernel_pages: keys and values [pages, 1, b, d] as vLLM's kernel sees the pool.

    Raises:
        RuntimeError: if the views are not slices of one [block, layer, head, ...] buffer.
    """

    shows_single = True

    def __init__(
        self,
        parts: EngineParts,
        order: PageOrder,
        backend: str = "torch",
        why_torch: str | None = None,
    ) -> None:
        self._why_torch = why_torch
        super().__init__(parts, order, Backends.all(backend))
        shape = self.shape
        pages = self.pool.view(-1, 1, 2 * shape.block_size, shape.head_size)
        self.kernel_pages = pages.chunk(2, dim=2)

    def configure(self, config: KVCompressConfig, layers: list[LayerParameters]) -> None:
        """As any engine's."""
        super().configure(config, layers)
        self.has_sinks = any(layer.sinks is not None for layer in layers)

    @property
    def ops_name(self) -> str:
        """What computes, for people."""
        name = super().ops_name
        return name if self._why_torch is None else f"{name} ({self._why_torch})"

    def prepare(self, common: Any) -> HostStep:
        """Tell the rows of a step apart and prepare what layers need.

        Args:
            common: vLLM's CommonAttentionMetadata. Its slots are corrected in place where a row
                owns a region.
        """
        plan = self.plan(common, common.seq_lens)
        block_table = common.block_table_tensor
        if plan.has_regions:
            self._correct_slots(plan, common)
        for evicted in plan.one_shot.values():
            common.slot_mapping[evicted] = -1
        compacted = np.flatnonzero(plan.is_compacted).tolist()
        offsets = self.page_offsets[torch.from_numpy(plan.numbers[OFFSETS_ROW, compacted]).long()]
        others = set(compacted) | plan.one_shot.keys()
        return HostStep(
            plan=plan,
            dense_table=cut_regions(plan, block_table, self.shape.block_size),
            endings=self.endings(plan, block_table),
            dense_rows=[row for row in range(common.num_reqs) if row not in others],
            one_shot_rows=list(plan.one_shot),
            compacted_rows=compacted,
            page_tables=[
                self._page_table(
                    self.requests.get(plan.request_ids[row]),
                    block_table[row].numpy(),
                    int(common.seq_lens[row]),
                    own_offsets,
                )
                for row, own_offsets in zip(compacted, offsets, strict=True)
            ],
            page_counts=offsets.diff(dim=1),
        )

    def _correct_slots(self, plan: StepPlan, common: Any) -> None:
        """Slots of tokens behind a region, which vLLM does not know of."""
        block_size = self.shape.block_size
        regions = plan.numbers[REGION_BLOCKS]
        starts, seq_lens = common.query_start_loc_cpu.numpy(), common.seq_lens.numpy()
        block_table, slots = common.block_table_tensor.numpy(), common.slot_mapping.numpy()
        for row in np.flatnonzero(regions).tolist():
            boundary, seq_len = int(plan.numbers[BOUNDARY_BLOCK, row]), int(seq_lens[row])
            end = int(starts[row + 1])
            num_new = end - int(starts[row])
            first = max(seq_len - num_new, boundary * block_size)
            positions = np.arange(first, seq_len)
            blocks = block_table[row, positions // block_size + regions[row]].astype(np.int64)
            slots[end - len(positions) : end] = blocks * block_size + positions % block_size

    def _page_table(
        self,
        request: CompressedRequest,
        row: np.ndarray,
        seq_len: int,
        page_offsets: torch.Tensor,
    ) -> torch.Tensor:
        """[S, width] int32 page ids of a compacted request's streams: region, then tail.

        Args:
            request: keeps the table for the next step.
            row: its block-table row.
            seq_len: its tokens.
            page_offsets: [S + 1] int32 of its region.
        """
        geometry = request.geometry
        start, boundary = geometry.first_kept_block, geometry.boundary_block
        region_end = boundary + geometry.num_region_blocks
        region = row[boundary:region_end]
        num_tail_blocks = -(-(seq_len - geometry.num_candidate_tokens) // geometry.block_size)
        num_generated = num_tail_blocks - (boundary - start)
        tail = np.concatenate([row[start:boundary], row[region_end : region_end + num_generated]])
        # The block ids are part of the key: a preempted request comes back with others.
        key = (*region.tolist(), *tail.tolist())
        if request.attention is None or request.attention[0] != key:
            table = ops.ragged_page_table(
                ops.region_page_ids(torch.from_numpy(region), self.shape.pages_per_block),
                page_offsets.long(),
                torch.from_numpy(tail),
                int(page_offsets.diff().max()) + num_tail_blocks,
            )
            request.attention = (key, table)
        return request.attention[1]
