"""Attention of a row's queries to its region and its dense tokens, head by head, in torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import KVCacheLayout

from plain_platform.engine import PlainEngine, PlainRow, PlainStep


class PlainBackend(AttentionBackend):
    """Any block size, head size and window."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Each (block, layer, head) must be one contiguous page."""
        return (KVCacheLayout.BLHNC,)

    @staticmethod
    def get_impl_cls() -> type[PlainImpl]:
        return PlainImpl

    @staticmethod
    def get_builder_cls() -> type[PlainMetadataBuilder]:
        return PlainMetadataBuilder


@dataclass
class PlainMetadata:
    """What every layer of one step shares.

    Attributes:
        slot_mapping: [T] int64 cache slot of every token; -1 for one that gets none.
        rows: of the step.
        step, engine: of compressed layers; None for those with a window, and in profiling.
    """

    slot_mapping: torch.Tensor
    rows: list[PlainRow]
    step: PlainStep | None = None
    engine: PlainEngine | None = field(default=None, repr=False)


class PlainMetadataBuilder(AttentionMetadataBuilder):
    """Builds `PlainMetadata`; the worker binds that of compressed layers to its engine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.engine: PlainEngine | None = None

    def bind(self, engine: PlainEngine) -> None:
        """Tell rows apart from now on."""
        self.engine = engine

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> PlainMetadata:
        """Find the tokens of the step's rows."""
        common = common_attn_metadata
        if self.engine is not None:
            step = self.engine.prepare(common)
            return PlainMetadata(common.slot_mapping, step.rows, step, self.engine)
        starts, block_size = common.query_start_loc_cpu.tolist(), self.kv_cache_spec.block_size
        window = getattr(self.kv_cache_spec, "sliding_window", None)
        rows = []
        for i, seq_len in enumerate(common.seq_lens.tolist()):
            tokens = slice(*starts[i : i + 2])
            # What lies before every query's window may have no block any more.
            first = 0 if window is None else seq_len - (tokens.stop - tokens.start) - window + 1
            first = max(0, first) // block_size
            table = common.block_table_tensor[i]
            rows.append(PlainRow.dense(tokens, table, seq_len, block_size, first))
        return PlainMetadata(common.slot_mapping, rows)


class PlainImpl(AttentionImpl):
    """Stores, attends row by row, then compacts."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        assert attn_type == "decoder"
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.logits_soft_cap = scale, logits_soft_cap or 0.0
        self.alibi_slopes, self.kv_cache_dtype = alibi_slopes, kv_cache_dtype
        self.window = sliding_window
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PlainMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, Hq, d] queries, [T, H, d] keys and values, [blocks, H, b, 2 d] one layer's cache."""
        metadata = attn_metadata
        if metadata is None:
            return output.zero_()
        owns_cache = self.kv_sharing_target_layer_name is None
        if owns_cache:
            store(kv_cache, key, value, metadata.slot_mapping)
        step, engine = metadata.step, metadata.engine
        layer_index, staged = 0, None
        if step is not None and engine is not None:
            layer_index = engine.layer_index[layer.layer_name]
            if step.staged is not None and owns_cache:
                staged = engine.begin_layer(step, layer_index)
                new = [row.tokens for row in metadata.rows if row.is_staged]
                keys, values = (torch.cat([x[tokens] for tokens in new]) for x in (key, value))
                store(staged, keys, values, step.staged_slots)
            elif step.staged is not None:
                staged = engine.current_layer(step)
        for row in metadata.rows:
            cache = staged if row.is_staged else kv_cache
            assert cache is not None
            dense = cache[row.blocks].transpose(0, 1).flatten(1, 2)[:, : row.num_dense]
            for head in range(self.num_kv_heads):
                entries = dense[head]
                if row.region:
                    assert engine is not None
                    pages = row.region[layer_index * self.num_kv_heads + head]
                    entries = torch.cat([engine.pool[pages].flatten(0, 1), entries])
                self._attend(query[row.tokens], entries, head, output[row.tokens])
        if step is not None and engine is not None and owns_cache:
            engine.after_attention(step, layer_index, query)
        return output

    def _attend(
        self, query: torch.Tensor, entries: torch.Tensor, head: int, output: torch.Tensor
    ) -> None:
        """The last m of a KV head's [n, 2 d] entries are those of the m queries."""
        group = self.num_heads // self.num_kv_heads
        own = slice(head * group, (head + 1) * group)
        keys, values = entries.float().chunk(2, dim=-1)
        logits = torch.einsum("mgd,nd->gmn", query[:, own].float(), keys) * self.scale
        if self.logits_soft_cap:
            logits = self.logits_soft_cap * (logits / self.logits_soft_cap).tanh()
        num_queries, num_entries = logits.shape[1:]
        is_read = torch.ones(num_queries, num_entries, dtype=torch.bool)
        is_read = is_read.tril(num_entries - num_queries)
        if self.window is not None:
            is_read = is_read.triu(num_entries - num_queries - self.window + 1)
        logits = logits.masked_fill(~is_read, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks[own].float()[:, None, None].expand(-1, num_queries, 1)
            logits = torch.cat([logits, sinks], dim=-1)
        weights = logits.softmax(dim=-1)[..., :num_entries]
        output[:, own] = torch.einsum("gmn,nd->mgd", weights, values).to(output.dtype)


def store(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Write [t, H, d] keys and values to [blocks, H, b, 2 d]; slots below 0 are nowhere."""
    used = slots >= 0
    blocks, places = slots[used] // cache.shape[2], slots[used] % cache.shape[2]
    cache[blocks, :, places] = torch.cat([key, value], dim=-1)[: len(slots)][used]
