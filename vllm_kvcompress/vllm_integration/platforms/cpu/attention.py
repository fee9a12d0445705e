"""vLLM's CPU attention with compacted rows: stock kernels on per-head pages.

Rows that are not compacted run the stock backend on the stock block table. So does a prompt
computed in one shot, in a buffer instead of the pool. A compacted row
becomes one sequence per KV head, each with its own page table and length, for the same kernel:
the pool is one buffer [block, layer, head, token, K|V], so that a page of one head looks like
a block of a model with a single KV head.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from vllm import _custom_ops as vllm_ops
from vllm import envs
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_kvcompress.compaction.requests import FIRST_KEPT_BLOCK
from vllm_kvcompress.vllm_integration.platforms.cpu.engine import CPUEngine, HostStep


class KVCompressCPUBackend(CPUAttentionBackend):
    """The CPU backend on a block-outermost pool, with compacted rows."""

    # The store needs our slot mapping, which the metadata carries, so forward() does it.
    forward_includes_kv_cache_update = True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Each (block, layer, head) must be one contiguous page."""
        return (KVCacheLayout.BLHNC,)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Pages of 16 tokens too: vLLM's slower 'vec16' kernel takes them."""
        return [MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The impl that runs both kinds of rows."""
        return KVCompressCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """The builder that tells rows apart."""
        return KVCompressCPUMetadataBuilder


@dataclass
class CompactedRows:
    """Decode rows over regions, as R * H single-KV-head sequences per layer.

    Attributes:
        page_tables: [L, R * H, width] int32 page ids.
        seq_lens: [L, R * H] int32 tokens of each stream.
        query_start_loc: [R * H + 1] int32.
        query_index: [sum of q_len * H] int64 into queries seen as [T * H, g, d], or None when
            that is the identity.
        scheduler_metadata: per layer, for the kernel.
    """

    page_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    query_index: torch.Tensor | None
    scheduler_metadata: list[torch.Tensor]


@dataclass
class RowsByHead:
    """The same rows for layers with attention sinks: R sequences per KV head and kernel call.

    The kernel takes one sink per query head of a call, and KV heads have sinks of their own.

    Attributes:
        page_tables: [L, R * H, width] int32 page ids, as in `CompactedRows`.
        seq_lens: [L, H, R] int32 tokens of each stream.
        query_start_loc: [R + 1] int32.
        tokens: [t] int64 tokens of the rows, or None when they are all tokens.
        scheduler_metadata: per layer and head, for the kernel.
    """

    page_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    tokens: torch.Tensor | None
    scheduler_metadata: list[list[torch.Tensor]]


@dataclass
class KVCompressCPUMetadata:
    """What every layer of one step shares.

    Attributes:
        slot_mapping: [T] int64 cache slot of every token; -1 for one that gets none.
        dense: stock metadata of the dense rows; None if there are none.
        dense_tokens: [t] int64 tokens of the dense rows, or None when they are all tokens.
        one_shot: stock metadata of the one-shot rows in the step's buffer; None if there are
            none.
        one_shot_tokens: [t] int64 tokens of the one-shot rows.
        compacted: the other rows; None if there are none.
        step: how rows were told apart; None before the cache is bound (profiling).
        engine: the worker's state, with `step`.
    """

    slot_mapping: torch.Tensor
    dense: CPUAttentionMetadata | None
    dense_tokens: torch.Tensor | None = None
    one_shot: CPUAttentionMetadata | None = None
    one_shot_tokens: torch.Tensor | None = None
    compacted: CompactedRows | RowsByHead | None = None
    step: HostStep | None = None
    engine: CPUEngine | None = field(default=None, repr=False)


class KVCompressCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds `KVCompressCPUMetadata`; the worker binds it to the runner's batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.engine: CPUEngine | None = None

    def bind(self, engine: CPUEngine) -> None:
        """Tell rows apart from now on."""
        self.engine = engine
        self._table_key: list[int] = []
        self._page_tables = torch.empty(0)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> KVCompressCPUMetadata:
        """Tell the step's rows apart and prepare both kernels' inputs."""
        common = common_attn_metadata
        if self.engine is None:
            dense = super().build(common_prefix_len, common, fast_build)
            return KVCompressCPUMetadata(common.slot_mapping, dense)
        step = self.engine.prepare(common)
        metadata = KVCompressCPUMetadata(common.slot_mapping, None, step=step, engine=self.engine)
        if step.compacted_rows:
            metadata.compacted = self._build_compacted(common, step)
        if step.one_shot_rows:
            table, slots = self.engine.staged_places(step, 0, len(step.one_shot_rows))
            tokens, only = _only_rows(common, step.one_shot_rows, table, slots)
            metadata.one_shot_tokens = tokens
            metadata.one_shot = super().build(common_prefix_len, only, fast_build)
        if step.dense_rows:
            if step.compacted_rows or step.one_shot_rows:
                table = step.dense_table[torch.tensor(step.dense_rows)]
                metadata.dense_tokens, common = _only_rows(common, step.dense_rows, table)
            else:
                common = replace(common, block_table_tensor=step.dense_table)
            metadata.dense = super().build(common_prefix_len, common, fast_build)
        return metadata

    def _build_compacted(self, common: Any, step: HostStep) -> CompactedRows | RowsByHead:
        engine = self.engine
        assert engine is not None
        shape = engine.shape
        num_heads = shape.num_kv_heads
        starts = common.query_start_loc_cpu
        rows = torch.tensor(step.compacted_rows)
        first_kept = torch.from_numpy(step.plan.numbers[FIRST_KEPT_BLOCK, step.compacted_rows])
        tails = common.seq_lens[rows] - first_kept * shape.block_size
        lens = step.page_counts * shape.block_size + tails[:, None]
        lens = lens.view(-1, shape.num_layers, num_heads).transpose(0, 1).contiguous()
        key = [id(table) for table in step.page_tables]
        if key != self._table_key:
            self._page_tables = _stack_tables(step.page_tables, shape.num_layers, num_heads)
            # Kept alive, or an id could be used again by another table.
            self._tables_alive: list[torch.Tensor] = step.page_tables
            self._table_key = key
        row_starts, row_lens = starts[rows].long(), (starts[rows + 1] - starts[rows]).long()
        if engine.has_sinks:
            return self._build_by_head(lens, row_starts, row_lens, common.num_actual_tokens)
        query_start_loc = _starts(row_lens.repeat_interleave(num_heads))
        query_index = None
        if step.dense_rows or step.one_shot_rows or int(row_lens.max()) > 1:
            query_index = _query_index(row_starts, row_lens, num_heads)
        lens = lens.reshape(shape.num_layers, -1)
        scheduler: list[torch.Tensor] = []
        for layer in range(shape.num_layers):
            if layer > 0 and torch.equal(lens[layer], lens[layer - 1]):
                scheduler.append(scheduler[-1])
                continue
            scheduler.append(self._kernel_plan(lens[layer], query_start_loc))
        return CompactedRows(self._page_tables, lens, query_start_loc, query_index, scheduler)

    def _build_by_head(
        self,
        lens: torch.Tensor,
        row_starts: torch.Tensor,
        row_lens: torch.Tensor,
        num_tokens: int,
    ) -> RowsByHead:
        """Rows of a model with sinks; `lens` is [L, R, H]."""
        query_start_loc = _starts(row_lens)
        tokens = None
        if int(query_start_loc[-1]) < num_tokens:
            tokens = _ranges(row_starts.tolist(), row_lens.tolist())
        lens = lens.transpose(1, 2).contiguous()
        # One plan serves all heads of the same lengths, as equal budgets give them.
        known: dict[tuple[int, ...], torch.Tensor] = {}
        scheduler = []
        for layer_lens in lens:
            of_layer = []
            for head_lens in layer_lens:
                key = tuple(head_lens.tolist())
                if key not in known:
                    known[key] = self._kernel_plan(head_lens, query_start_loc)
                of_layer.append(known[key])
            scheduler.append(of_layer)
        return RowsByHead(self._page_tables, lens, query_start_loc, tokens, scheduler)

    def _kernel_plan(self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
        """The kernel's plan for sequences of one KV head."""
        assert self.engine is not None
        shape = self.engine.shape
        return vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=shape.num_queries_per_kv,
            num_kv_heads=1,
            head_dim=shape.head_size,
            seq_lens=seq_lens,
            dtype=cast(torch.dtype, self.dtype),
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )


class KVCompressCPUImpl(CPUAttentionBackendImpl):
    """Stores, attends dense rows the stock way and compacted rows per head, then compacts."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KVCompressCPUMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the stock impl; `kv_cache` is one layer's strided view of the pool.

        A layer that shares the cache of an earlier one has no `key` and `value`. It reads what
        that layer keeps, and its queries have no say in that.
        """
        metadata = attn_metadata
        if metadata is None:
            return output
        owns_cache = self.kv_sharing_target_layer_name is None
        if owns_cache:
            self.do_kv_cache_update(layer, key, value, kv_cache, metadata.slot_mapping)
        if metadata.dense is not None:
            self._attend(layer, query, kv_cache, metadata.dense, metadata.dense_tokens, output)
        engine = metadata.engine
        if engine is None:
            return output
        step = metadata.step
        assert step is not None
        layer_index = engine.layer_index[layer.layer_name]
        if metadata.one_shot is not None:
            tokens, one_shot = metadata.one_shot_tokens, metadata.one_shot
            if not owns_cache:
                staged = engine.current_layer(step)
            else:
                staged = engine.begin_layer(step, layer_index)
                slots = one_shot.slot_mapping
                self.do_kv_cache_update(layer, key[tokens], value[tokens], staged, slots)
            self._attend(layer, query, staged, one_shot, tokens, output)
        if isinstance(metadata.compacted, RowsByHead):
            self._attend_by_head(layer, query, metadata.compacted, output, engine, layer_index)
        elif metadata.compacted is not None:
            self._attend_compacted(layer, query, metadata.compacted, output, engine, layer_index)
        if owns_cache:
            engine.after_attention(step, layer_index, query)
        return output

    def _attend(
        self,
        layer: Any,
        query: torch.Tensor,
        cache: torch.Tensor,
        metadata: CPUAttentionMetadata,
        tokens: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """The stock backend on some tokens, or on all (None)."""
        # It reads keys and values from the cache alone, as layers that share one need it to.
        unread: Any = None
        if tokens is None:
            super().forward(layer, query, unread, unread, cache, metadata, output)
            return
        part = torch.empty_like(output[: len(tokens)])
        super().forward(layer, query[tokens], unread, unread, cache, metadata, part)
        output[tokens] = part

    def _attend_compacted(
        self,
        layer: Any,
        query: torch.Tensor,
        rows: CompactedRows,
        output: torch.Tensor,
        engine: CPUEngine,
        layer_index: int,
    ) -> None:
        shape = engine.shape
        num_tokens = int(rows.query_start_loc[-1]) // shape.num_kv_heads
        group, head_size = shape.num_queries_per_kv, shape.head_size
        streams = query.reshape(-1, group, head_size)
        result = output.view(-1, group, head_size)
        if rows.query_index is not None:
            streams = streams[rows.query_index]
            part = torch.empty_like(streams)
        else:
            streams = streams[: num_tokens * shape.num_kv_heads]
            part = result[: num_tokens * shape.num_kv_heads]
        self._attend_streams(
            layer,
            streams,
            part,
            engine,
            rows.query_start_loc,
            rows.seq_lens[layer_index],
            rows.page_tables[layer_index],
            rows.scheduler_metadata[layer_index],
        )
        if rows.query_index is not None:
            result[rows.query_index] = part

    def _attend_by_head(
        self,
        layer: Any,
        query: torch.Tensor,
        rows: RowsByHead,
        output: torch.Tensor,
        engine: CPUEngine,
        layer_index: int,
    ) -> None:
        shape = engine.shape
        num_heads, group, head_size = shape.num_kv_heads, shape.num_queries_per_kv, shape.head_size
        num_tokens = int(rows.query_start_loc[-1])
        tokens: Any = slice(num_tokens) if rows.tokens is None else rows.tokens
        streams = query.view(-1, num_heads, group, head_size)[tokens]
        # Head by head, since the kernel writes to contiguous memory only.
        part = query.new_empty(num_heads, num_tokens, group, head_size)
        tables = rows.page_tables[layer_index].view(-1, num_heads, rows.page_tables.shape[-1])
        for head in range(num_heads):
            self._attend_streams(
                layer,
                streams[:, head],
                part[head],
                engine,
                rows.query_start_loc,
                rows.seq_lens[layer_index, head],
                tables[:, head],
                rows.scheduler_metadata[layer_index][head],
                None if self.sinks is None else self.sinks[head * group : (head + 1) * group],
            )
        output.view(-1, num_heads, group, head_size)[tokens] = part.transpose(0, 1)

    def _attend_streams(
        self,
        layer: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        engine: CPUEngine,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        page_table: torch.Tensor,
        scheduler_metadata: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """The stock kernel on sequences of one KV head over the flattened pool."""
        key_cache, value_cache = engine.kernel_pages
        vllm_ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=page_table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=scheduler_metadata,
            s_aux=sinks,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )


def _only_rows(
    common: Any,
    wanted: list[int],
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Any]:
    """The tokens of some rows, and the common metadata as if only they were there.

    Args:
        common: of all rows.
        wanted: their numbers.
        block_table: [r, W] int32 of these rows.
        slot_mapping: [t] int64 of their tokens; None = as in `common`.
    """
    starts = common.query_start_loc_cpu
    index = torch.tensor(wanted)
    lens = starts[index + 1] - starts[index]
    tokens = _ranges(starts[index].tolist(), lens.tolist())
    query_start_loc = _starts(lens)
    seq_lens = common.seq_lens[index]
    return tokens, replace(
        common,
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=seq_lens,
        num_reqs=len(wanted),
        num_actual_tokens=len(tokens),
        max_query_len=int(lens.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=block_table,
        slot_mapping=common.slot_mapping[tokens] if slot_mapping is None else slot_mapping,
    )


def _starts(lens: torch.Tensor) -> torch.Tensor:
    """[n + 1] int32 running sums of n lengths, from 0."""
    starts = torch.zeros(len(lens) + 1, dtype=torch.int32)
    starts[1:] = lens.cumsum(0)
    return starts


def _ranges(starts: list[int], lens: list[int]) -> torch.Tensor:
    """[sum of lens] int64: runs of numbers, one after another."""
    runs = zip(starts, lens, strict=True)
    return torch.cat([torch.arange(start, start + length) for start, length in runs])


def _query_index(row_starts: torch.Tensor, row_lens: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Order of (token, head) entries as one run of tokens per (row, head)."""
    parts = []
    heads = torch.arange(num_heads)[:, None]
    for start, length in zip(row_starts.tolist(), row_lens.tolist(), strict=True):
        tokens = torch.arange(start, start + length)[None, :]
        parts.append((tokens * num_heads + heads).flatten())
    return torch.cat(parts)


def _stack_tables(tables: list[torch.Tensor], num_layers: int, num_heads: int) -> torch.Tensor:
    """Join per-request tables [L * H, width_r] into [L, R * H, widest]."""
    width = max(table.shape[1] for table in tables)
    out = torch.zeros(num_layers, len(tables), num_heads, width, dtype=torch.int32)
    for i, table in enumerate(tables):
        out[:, i, :, : table.shape[1]] = table.view(num_layers, num_heads, -1)
    return out.view(num_layers, len(tables) * num_heads, width)
