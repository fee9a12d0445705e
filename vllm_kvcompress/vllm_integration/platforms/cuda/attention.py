"""vLLM's FlashAttention backend with compacted rows.

Rows of several tokens that are not compacted (prompts) run the stock backend on their blocks.
Rows of one token, compacted or not, run `ops.ragged_decode`, which finds every token of a row from
five numbers and the row's page offsets. All that it reads lies at fixed addresses, so a captured
graph of a decode step may be replayed whatever the rows have become.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_kvcompress import ops
from vllm_kvcompress.vllm_integration.platforms.cuda.engine import CUDAEngine, DeviceStep


class KVCompressCUDABackend(FlashAttentionBackend):
    """FlashAttention on a block-outermost pool, with compacted rows."""

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

    # What FlashAttention can do and rows of one token, which are ours, cannot.

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """How streams are cut depends on how many rows there are."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """No attention in both directions among an image's tokens."""
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Causal attention only."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """No windows beside whole prefixes."""
        return False

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """The impl that runs both kinds of rows."""
        return KVCompressCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """The builder that tells rows apart."""
        return KVCompressCUDAMetadataBuilder


@dataclass(frozen=True)
class PromptRun:
    """Rows of several tokens, one after another, that the stock backend attends at once.

    Attributes:
        tokens: of the step.
        metadata: stock metadata of these rows.
        is_one_shot: whether their keys and values are staged, with the metadata's slots.
    """

    tokens: slice
    metadata: FlashAttentionMetadata
    is_one_shot: bool = False


@dataclass
class KVCompressCUDAMetadata:
    """What every layer of one step shares.

    Attributes:
        slot_mapping: [T] int64 cache slot of every token; -1 for one that gets none.
        runs: the rows behind the single ones, but for compacted ones.
        step: how the rows are attended; None before the cache is bound (profiling), where `runs`
            has all rows.
        engine: the worker's state, with `step`.
    """

    slot_mapping: torch.Tensor
    runs: list[PromptRun]
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

    def bind(self, engine: CUDAEngine) -> None:
        """Tell rows apart from now on."""
        self.engine = engine
        # The stock builder's runs are of prompts, and no captured graph has these: each may have
        # a schedule of its own, and FlashAttention chooses its splits.
        self.use_full_cuda_graph = False

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
            stock = super().build(common_prefix_len, common, fast_build)
            run = PromptRun(slice(0, stock.num_actual_tokens), stock)
            return KVCompressCUDAMetadata(common.slot_mapping, [run])
        step = self.engine.prepare(common)
        runs = [self._run(common, step, *run, fast_build) for run in step.runs]
        return KVCompressCUDAMetadata(common.slot_mapping, runs, step, self.engine)

    def _run(
        self,
        common: Any,
        step: DeviceStep,
        first: int,
        end: int,
        is_one_shot: bool,
        fast_build: bool,
    ) -> PromptRun:
        starts = common.query_start_loc_cpu
        tokens = slice(int(starts[first]), int(starts[end]))
        if is_one_shot:
            assert self.engine is not None and step.staged is not None
            index = [chunk.row for chunk in step.staged.chunks].index(first)
            table, slots = self.engine.staged_places(step, index, index + end - first)
        else:
            table = step.dense_table[first - step.first_dense : end - step.first_dense]
            slots = common.slot_mapping[tokens]
        rows = _only_rows(common, first, end, table, slots)
        return PromptRun(tokens, super().build(0, rows, fast_build), is_one_shot)


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
        """As the stock impl; `kv_cache` is one layer's strided view of the pool.

        A layer that shares the cache of an earlier one has no `key` and `value`. It reads what
        that layer keeps, and its queries have no say in that.
        """
        metadata = attn_metadata
        if metadata is None:
            return output.fill_(0)
        owns_cache = self.kv_sharing_target_layer_name is None
        if owns_cache:
            self.do_kv_cache_update(layer, key, value, kv_cache, metadata.slot_mapping)
        step, engine = metadata.step, metadata.engine
        layer_index, staged = 0, None
        lses: list[tuple[slice, torch.Tensor]] = []
        if step is not None:
            assert engine is not None
            layer_index = engine.layer_index[layer.layer_name]
            if step.staged is not None:
                if owns_cache:
                    staged = engine.begin_layer(step, layer_index)
                else:
                    staged = engine.current_layer(step)
        for run in metadata.runs:
            tokens, cache = run.tokens, kv_cache
            if run.is_one_shot:
                assert staged is not None
                cache = staged
                if owns_cache:
                    slots = run.metadata.slot_mapping
                    self.do_kv_cache_update(layer, key[tokens], value[tokens], cache, slots)
            fresh = (key[tokens], value[tokens]) if owns_cache else (None, None)
            own = (query[tokens], *fresh, cache, run.metadata, output[tokens])
            is_scored = owns_cache and self.tells_lse
            if is_scored and step and engine and engine.wants_lse(step, tokens):
                lses.append((tokens, attend_with_lse(self, *own)))
            else:
                super().forward(layer, *own)
        if step is None:
            return output
        assert engine is not None
        num_single = step.plan.num_single
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
                step.work,
            )
        for extended in step.extended:
            self._decode(
                query[extended.token_start : extended.token_end],
                output[extended.token_start : extended.token_end],
                engine,
                layer_index,
                extended.rows,
                extended.page_offsets,
                extended.block_table,
                extended.query_start_loc,
                extended.work,
                ops.MAX_QUERY_LEN,
            )
        if owns_cache:
            engine.after_attention(step, layer_index, query, lses)
        return output

    def warm_up(self, engine: CUDAEngine) -> None:
        """Compile and run the decode kernels before a request waits for them."""
        for query_len in (1, ops.MAX_QUERY_LEN):
            device = engine.pool.device
            size = (1, self.num_heads, self.head_size)
            query = torch.zeros(size, dtype=engine.pool.dtype, device=device)
            # A row without a query, of which nothing is computed.
            numbers = torch.zeros(1, len(ops.ROW_FIELDS), dtype=torch.int32, device=device)
            self._decode(
                query,
                query,
                engine,
                0,
                numbers,
                numbers.new_zeros(1, engine.shape.pages_per_block + 1),
                numbers,
                numbers.new_zeros(2),
                engine.warm_up_work(query_len),
                query_len,
            )

    @property
    def tells_lse(self) -> bool:
        """Whether attention can tell each query's sum over its keys, in terms that are known."""
        # FlashAttention 4 is called with more than is known here; with sinks it is not said
        # whether they are part of the sum.
        return self.vllm_flash_attn_version in (2, 3) and self.sinks is None

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
        work: ops.DecodeWork | None,
        max_query_len: int = 1,
    ) -> None:
        ops.ragged_decode(
            query,
            ops.Pool(engine.pool, engine.shape.num_layers, self.num_kv_heads),
            ops.Rows(rows, block_table, page_offsets, query_start_loc),
            layer_index,
            ops.Logits(self.scale, self.logits_soft_cap, self.sinks),
            max_query_len=max_query_len,
            work=work,
            out=output,
            backend=engine.backend,
        )


def attend_with_lse(
    impl: FlashAttentionImpl,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: FlashAttentionMetadata,
    output: torch.Tensor,
) -> torch.Tensor:
    """Attention of the stock impl, with what its kernel also knows. FlashAttention 2 or 3.

    Args:
        impl: of a causal layer without window, sinks or ALiBi, on a cache that is not quantized.
        query: [t, H * g, d].
        key, value: [t, H, d], which are in the cache.
        kv_cache: [blocks, H, b, 2 d].
        metadata: of all t tokens.
        output: [t, H * g, d], written.

    Returns:
        [H * g, t] float32 natural logarithm of each query's sum over its keys.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    key_cache, value_cache = kv_cache.transpose(1, 2).split(impl.head_size, dim=-1)
    _, lse = flash_attn_varlen_func(
        q=query,
        k=canonicalize_singleton_dim_strides(key_cache),
        v=canonicalize_singleton_dim_strides(value_cache),
        out=output,
        cu_seqlens_q=metadata.query_start_loc,
        max_seqlen_q=metadata.max_query_len,
        seqused_k=metadata.seq_lens,
        max_seqlen_k=metadata.max_seq_len,
        softmax_scale=impl.scale,
        causal=True,
        block_table=metadata.block_table,
        softcap=impl.logits_soft_cap,
        scheduler_metadata=metadata.scheduler_metadata,
        num_splits=metadata.max_num_splits,
        fa_version=cast(int, impl.vllm_flash_attn_version),
        return_softmax_lse=True,
    )
    return lse


def _only_rows(
    common: Any, first: int, end: int, block_table: torch.Tensor, slot_mapping: torch.Tensor
) -> Any:
    """The common metadata as if only the rows from `first` to `end` were there.

    Args:
        common: of all rows.
        first, end: rows.
        block_table: [end - first, W] int32 of these rows.
        slot_mapping: [t] int64 of their tokens.
    """
    rows = slice(first, end)
    starts_cpu = common.query_start_loc_cpu[first : end + 1]
    query_lens = starts_cpu.diff()
    seq_lens_bound = common.seq_lens_cpu_upper_bound
    is_prefilling = common.is_prefilling
    return replace(
        common,
        query_start_loc=common.query_start_loc[first : end + 1] - int(starts_cpu[0]),
        query_start_loc_cpu=starts_cpu - starts_cpu[0],
        seq_lens=common.seq_lens[rows],
        num_reqs=end - first,
        num_actual_tokens=int(starts_cpu[-1] - starts_cpu[0]),
        max_query_len=int(query_lens.max()),
        block_table_tensor=block_table,
        slot_mapping=slot_mapping,
        seq_lens_cpu_upper_bound=None if seq_lens_bound is None else seq_lens_bound[rows],
        is_prefilling=None if is_prefilling is None else is_prefilling[rows],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
