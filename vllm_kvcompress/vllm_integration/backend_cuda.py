"""vLLM's FlashAttention backend with compressed rows.

Rows of several tokens that are not compressed (prompts) run the stock backend on their blocks.
Rows of one token, compressed or not, run `ops.ragged_decode`, which finds every token of a row from
four numbers and the row's page offsets. All that it reads lies at fixed addresses, so a captured
graph of a decode step may be replayed whatever the rows have become.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_kvcompress import ops
from vllm_kvcompress.vllm_integration.engine_cuda import CUDAEngine, DeviceStep


class KVCompressCUDABackend(FlashAttentionBackend):
    """FlashAttention on a block-outermost pool, with compressed rows."""

    # The store needs slots that know of the regions; the metadata has them.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """The name that vLLM resolves to this class."""
        return "CUSTOM"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Each (block, layer, head) must be one contiguous page."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Those that FlashAttention and our decode kernel both take."""
        return head_size in ops.HEAD_SIZES and super().supports_head_size(head_size)

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """The impl that runs both kinds of rows."""
        return KVCompressCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """The builder that tells rows apart."""
        return KVCompressCUDAMetadataBuilder


@dataclass
class KVCompressCUDAMetadata:
    """What every layer of one step shares.

    Attributes:
        slot_mapping: [T] int64 cache slot of every token; -1 for one that gets none.
        dense: stock metadata of the rows behind the single ones, compressed ones among them (what
            it gives those is overwritten); None if there are none.
        step: how the rows are attended; None before the cache is bound (profiling), where `dense`
            has all rows.
        engine: the worker's state, with `step`.
    """

    slot_mapping: torch.Tensor
    dense: FlashAttentionMetadata | None
    step: DeviceStep | None = None
    engine: CUDAEngine | None = field(default=None, repr=False)


class KVCompressCUDAMetadataBuilder(FlashAttentionMetadataBuilder):
    """Builds `KVCompressCUDAMetadata`; the worker binds it to its engine."""

    supports_update_block_table = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.engine: CUDAEngine | None = None
        # Rows of one token go to the front.
        self._init_reorder_batch_threshold(1)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Full graphs of decode steps; prompts are told apart and collected outside of graphs."""
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> KVCompressCUDAMetadata:
        """Tell the step's rows apart and prepare both kernels' inputs; waits for nothing."""
        common = common_attn_metadata
        if self.engine is None:
            dense = super().build(common_prefix_len, common, fast_build)
            return KVCompressCUDAMetadata(common.slot_mapping, dense)
        step = self.engine.prepare(common)
        dense = None
        if step.num_single < common.num_reqs:
            behind = _rows_behind(common, step)
            dense = super().build(0, behind, fast_build)
        return KVCompressCUDAMetadata(common.slot_mapping, dense, step, self.engine)


class KVCompressCUDAImpl(FlashAttentionImpl):
    """Stores, attends prompts the stock way and single tokens on ragged heads, then compacts."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KVCompressCUDAMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the stock impl; `kv_cache` is one layer's strided view of the pool."""
        metadata = attn_metadata
        if metadata is None:
            return output.fill_(0)
        self.do_kv_cache_update(layer, key, value, kv_cache, metadata.slot_mapping)
        step, engine, dense = metadata.step, metadata.engine, metadata.dense
        num_single = 0 if step is None else step.num_single
        if dense is not None:
            end = num_single + dense.num_actual_tokens
            behind = slice(num_single, end)
            super().forward(
                layer, query[behind], key[behind], value[behind], kv_cache, dense, output[behind]
            )
        if step is None:
            return output
        assert engine is not None
        layer_index = engine.layer_index[layer.layer_name]
        if num_single:
            self._decode(
                query[:num_single],
                output[:num_single],
                engine,
                layer_index,
                step.rows[:num_single],
                step.page_offsets[:num_single],
                step.block_table[:num_single],
                step.query_start_loc[: num_single + 1],
            )
        for run in step.extended:
            self._decode(
                query[run.token_start : run.token_end],
                output[run.token_start : run.token_end],
                engine,
                layer_index,
                run.rows,
                run.page_offsets,
                run.block_table,
                run.query_start_loc,
                ops.MAX_QUERY_LEN,
            )
        engine.after_attention(step, layer_index, query)
        return output

    def _decode(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        engine: CUDAEngine,
        layer_index: int,
        rows: torch.Tensor,
        page_offsets: torch.Tensor,
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        max_query_len: int = 1,
    ) -> None:
        ops.ragged_decode(
            query,
            engine.pool,
            rows,
            page_offsets,
            block_table,
            query_start_loc,
            layer=layer_index,
            num_kv_heads=self.num_kv_heads,
            scale=self.scale,
            max_query_len=max_query_len,
            logits_soft_cap=self.logits_soft_cap,
            sinks=self.sinks if self.sinks is None else self.sinks.float(),
            out=output,
            backend=engine.backend,
        )


def _rows_behind(common: Any, step: DeviceStep) -> Any:
    """The common metadata as if only the rows behind the single ones were there."""
    first = step.num_single
    if first == 0:
        return replace(common, block_table_tensor=step.dense_table)
    seq_lens_bound = common.seq_lens_cpu_upper_bound
    is_prefilling = common.is_prefilling
    return replace(
        common,
        # One token in each row before them.
        query_start_loc=common.query_start_loc[first:] - first,
        query_start_loc_cpu=common.query_start_loc_cpu[first:] - first,
        seq_lens=common.seq_lens[first:],
        num_reqs=common.num_reqs - first,
        num_actual_tokens=common.num_actual_tokens - first,
        block_table_tensor=step.dense_table,
        slot_mapping=common.slot_mapping[first:],
        seq_lens_cpu_upper_bound=None if seq_lens_bound is None else seq_lens_bound[first:],
        is_prefilling=None if is_prefilling is None else is_prefilling[first:],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
