"""A plain worker's steps: where the tokens of each row lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.requests import OFFSETS_ROW
from vllm_kvcompress.compaction.scoring import Backends
from vllm_kvcompress.memory import cdiv
from vllm_kvcompress.ops import PageOrder, RowDescriptor
from vllm_kvcompress.vllm_integration.worker.engine import (
    EngineParts,
    Step,
    WorkerEngine,
    cut_regions,
)


@dataclass(frozen=True)
class PlainRow:
    """Where one row's tokens lie.

    Attributes:
        tokens: of the step.
        blocks: [n] int64 of its dense tokens.
        num_dense: tokens in them.
        region: per stream [pages] int64 page ids; empty without a region.
        is_staged: whether its dense tokens are in the buffer of one-shot prompts.
    """

    tokens: slice
    blocks: torch.Tensor
    num_dense: int
    region: tuple[torch.Tensor, ...] = ()
    is_staged: bool = False

    @classmethod
    def dense(
        cls, tokens: slice, table: torch.Tensor, seq_len: int, block_size: int, first: int = 0
    ) -> PlainRow:
        """A row without a region, from its block `first` on."""
        blocks = table[first : cdiv(seq_len, block_size)].long()
        return cls(tokens, blocks, seq_len - first * block_size)


@dataclass(kw_only=True)
class PlainStep(Step):
    """A step as the layers need it.

    Attributes:
        rows: all of them.
        staged_slots: [t] int64 places in the buffer of the one-shot rows' tokens, in their order.
    """

    rows: list[PlainRow]
    staged_slots: torch.Tensor


class PlainEngine(WorkerEngine):
    """One worker's side of the compression, by 'torch'."""

    shows_single = True

    def __init__(self, parts: EngineParts) -> None:
        order = PageOrder.plain(parts.shape.block_size, parts.shape.head_size)
        super().__init__(parts, order, Backends.all("torch"))

    def prepare(self, common: Any) -> PlainStep:
        """Find the tokens of a step's rows; corrects vLLM's slots in place."""
        plan = self.plan(common, common.seq_lens)
        table, numbers = common.block_table_tensor, torch.from_numpy(plan.numbers)
        descriptors = torch.column_stack([common.seq_lens, numbers[:OFFSETS_ROW].t()]).int()
        ops.token_slots(
            ops.Rows(descriptors, table, None, common.query_start_loc),
            len(common.slot_mapping),
            self.shape.block_size,
            out=common.slot_mapping,
            backend="reference",
        )
        for evicted in plan.one_shot.values():
            common.slot_mapping[evicted] = -1
        offsets = self.page_offsets[numbers[OFFSETS_ROW].long()]
        starts = common.query_start_loc_cpu.tolist()
        rows = [
            self._row(slice(*starts[i : i + 2]), RowDescriptor(*numbers), table[i], offsets[i])
            for i, numbers in enumerate(descriptors.tolist())
        ]
        step = PlainStep(
            plan=plan,
            dense_table=cut_regions(plan, table, self.shape.block_size),
            endings=self.endings(plan, table),
            rows=rows,
            staged_slots=torch.empty(0, dtype=torch.int64),
        )
        if step.staged is not None:
            order = [chunk.row for chunk in step.staged.chunks]
            staged_table, step.staged_slots = self.staged_places(step, 0, len(order))
            for i, row in enumerate(order):
                staged = rows[row]
                blocks = staged_table[i, : cdiv(staged.num_dense, self.shape.block_size)].long()
                rows[row] = PlainRow(staged.tokens, blocks, staged.num_dense, is_staged=True)
            # In the order of the slots, one after another.
            step.rows = [rows[row] for row in order]
            step.rows += [row for row in rows if not row.is_staged]
        return step

    def _row(
        self, tokens: slice, row: RowDescriptor, table: torch.Tensor, offsets: torch.Tensor
    ) -> PlainRow:
        """A row that has all its blocks."""
        numbers = range(row.first_kept_block, cdiv(row.seq_len, self.shape.block_size))
        blocks = table[[row.column_of(number) for number in numbers]].long()
        num_dense = row.seq_len - row.first_kept_block * self.shape.block_size
        if not int(offsets[-1]):
            return PlainRow(tokens, blocks, num_dense)
        region = table[row.region_column : row.region_column + row.num_region_blocks]
        pages = ops.region_page_ids(region, self.shape.pages_per_block)
        return PlainRow(tokens, blocks, num_dense, pages.tensor_split(offsets[1:-1].long()))
