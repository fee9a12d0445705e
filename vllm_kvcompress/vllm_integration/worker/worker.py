"""What our workers share: specs that carry the setting, and an engine bound to the KV cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    KVQuantMode,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.memory import NULL_BLOCK, CacheShape
from vllm_kvcompress.policies import scorer_class
from vllm_kvcompress.policies.registry import clashes
from vllm_kvcompress.vllm_integration.scheduler.spec import KVCompressSpec
from vllm_kvcompress.vllm_integration.step_messages import told_whole_ids
from vllm_kvcompress.vllm_integration.validate import check_table_shape
from vllm_kvcompress.vllm_integration.worker.engine import RowNames, WorkerEngine
from vllm_kvcompress.vllm_integration.worker.layers import layer_parameters
from vllm_kvcompress.vllm_integration.worker.metrics import CompressionStats

# Under "vllm", whose logging configuration would not reach a logger of our own name.
logger = init_logger(f"vllm.{__name__}")


if TYPE_CHECKING:
    # What the mixin is mixed into, or its subclass for CPUs.
    from vllm.v1.worker.gpu_worker import Worker as _Base
else:
    _Base = object


class CompressionWorker(_Base):
    """Mixin for vLLM's workers of an engine with `additional_config["kv_compress"]`.

    Workers are subclassed because nothing else of vLLM's plugin points sees the model runner, whose
    batch tells request ids and prompt lengths.
    """

    # Whether one-shot prompts share a buffer of fixed size.
    _is_buffer_counted = False

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._config = KVCompressConfig.from_dict(vllm_config.additional_config["kv_compress"])
        self._stats = CompressionStats(log=self.rank == 0, budget=self._config.budget)
        self._engine: WorkerEngine | None = None
        self._is_warming_up = False

    def _one_shot_tokens(self) -> int:
        """Tokens of one request that fit a step beside one token of every other; 0 if none do."""
        scheduler = self.vllm_config.scheduler_config
        budget = self._step_tokens() - scheduler.max_num_seqs
        if scheduler.long_prefill_token_threshold > 0:
            budget = min(budget, scheduler.long_prefill_token_threshold)
        return max(0, budget)

    def _step_tokens(self) -> int:
        """Most tokens of a step."""
        scheduler = self.vllm_config.scheduler_config
        limits = (scheduler.max_num_batched_tokens, scheduler.max_num_scheduled_tokens)
        return min(limit for limit in limits if limit is not None)

    def _one_shot_ids(self, scheduler_output: Any) -> set[str]:
        """Requests that begin in a step and have vLLM's null block for what they evict."""
        cached = scheduler_output.scheduled_cached_reqs
        rows = [(new.req_id, new.block_ids) for new in scheduler_output.scheduled_new_reqs]
        # Few steps resume any, and a step may have a thousand others.
        if cached.resumed_req_ids:
            rows += [
                (request_id, blocks)
                for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True)
                if blocks and request_id in cached.resumed_req_ids
            ]
        return {name for name, blocks in rows if blocks[self._group][:1] == [NULL_BLOCK]}

    def _make_engine(
        self,
        shape: CacheShape,
        attention: dict[str, Attention],
        layers: list[LayerParameters],
    ) -> WorkerEngine:
        """The engine of this kind of worker.

        Args:
            shape: of the cache.
            attention: vLLM's layers by name, in layer order, bound to the cache.
            layers: what scoring must know of each.
        """
        raise NotImplementedError

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The stock specs, full-attention layers carrying our config.

        Layers with a sliding window stay stock.

        Raises:
            KVCompressConfigError: if the model has layers that cannot be compressed.
        """
        specs = super().get_kv_cache_spec()
        attention = self.vllm_config.compilation_config.static_forward_context
        one_shot_tokens = self._one_shot_tokens()
        out: dict[str, KVCacheSpec] = {}
        compressed: dict[str, KVCompressSpec] = {}
        for name, spec in specs.items():
            if type(spec) is SlidingWindowSpec:
                out[name] = spec
                continue
            if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
                raise KVCompressConfigError(
                    "KV compression needs layers with full attention or a sliding window; layer "
                    f"{name} has {type(spec).__name__}"
                )
            problem = _layer_problem(attention[name], spec)
            if problem:
                raise KVCompressConfigError(f"KV compression cannot handle layer {name}: {problem}")
            compressed[name] = KVCompressSpec.from_full_attention(
                spec, self._config, one_shot_tokens, self._is_buffer_counted
            )
        out.update(compressed)
        shapes = {(spec, attention[name].num_heads) for name, spec in compressed.items()}
        if len(shapes) > 1:
            raise KVCompressConfigError(
                f"KV compression needs the same heads in every full layer; found {shapes}"
            )
        if not compressed:
            raise KVCompressConfigError("KV compression: this model has no KV cache to compress")
        return out

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache, then bind our builders to it."""
        super().initialize_from_config(_unwrapped(kv_cache_config))
        runner = self.model_runner
        context = self.vllm_config.compilation_config.static_forward_context
        groups = runner.kv_cache_config.kv_cache_groups
        ours = [i for i, g in enumerate(groups) if isinstance(g.kv_cache_spec, KVCompressSpec)]
        if len(ours) != 1:
            raise KVCompressConfigError(
                "KV compression needs all layers with full attention in one group of blocks; vLLM "
                f"makes {len(ours)} of them beside {len(groups) - len(ours)} groups of other layers"
            )
        group = groups[ours[0]]
        spec = group.kv_cache_spec
        assert isinstance(spec, KVCompressSpec)
        readers = _readers(context, group.layer_names)
        owners = (name for name in group.layer_names if name not in readers)
        names = sorted(owners, key=extract_layer_index)
        self._layer_names = names
        self._group = ours[0]
        layers: dict[str, Attention] = {name: context[name] for name in names}
        first = layers[names[0]]
        shape = CacheShape(
            num_layers=len(layers),
            num_kv_heads=spec.num_kv_heads,
            num_queries_per_kv=first.num_heads // spec.num_kv_heads,
            head_size=spec.head_size,
            block_size=spec.block_size,
        )
        check_table_shape(self._config, shape.num_layers, shape.num_kv_heads)
        block_elements = shape.pages_per_block * 2 * shape.block_size * shape.head_size
        if first.kv_cache.stride(0) != block_elements:
            raise KVCompressConfigError(
                f"KV compression does not support how vLLM lays out this model: blocks of its "
                f"{shape.num_layers} full-attention layers are padded to the size of the others'"
            )
        needs = scorer_class(self._config.recipe.scorer).needs
        self._engine = self._make_engine(shape, layers, self._layer_parameters(needs))
        self._engine.add_readers(readers)
        for attn_group in itertools.chain.from_iterable(runner.attn_groups):
            if attn_group.kv_cache_group_id != ours[0]:
                continue
            builders: list[Any] = attn_group.metadata_builders
            for builder in builders:
                builder.bind(self._engine)
        if self.rank == 0:
            asked = (
                f"ratio {self._config.ratio}"
                if self._config.ratio is not None
                else f"budget {self._config.budget}"
            )
            logger.info(
                "kv-compress: %s, %s, window %d, granularity %s; pages of %d tokens, "
                "%d layers x %d KV heads, ops: %s",
                self._config.method,
                asked,
                self._config.window,
                self._config.granularity,
                shape.block_size,
                shape.num_layers,
                shape.num_kv_heads,
                self._engine.ops_name,
            )
            weakness = self._config.recipe.weakness
            if weakness:
                logger.warning(
                    "kv-compress: %s %s (docs/quality.md)", self._config.method, weakness
                )
            clash = clashes().get(self._config.method)
            if clash is not None:
                logger.warning("kv-compress: %s", clash)
            advice = self._config.few_pages_advice(shape.block_size)
            if advice is not None:
                logger.warning("kv-compress: %s", advice)

    def _layer_parameters(self, needs: frozenset[str]) -> list[LayerParameters]:
        context = self.vllm_config.compilation_config.static_forward_context
        model = self.model_runner.get_model()
        return [layer_parameters(model, name, context[name], needs) for name in self._layer_names]

    def kv_compress_reconfigure(self, raw: dict[str, Any]) -> None:
        """Use another setting from now on; see `LLM.kv_compress_reconfigure`."""
        assert self._engine is not None
        config = KVCompressConfig.from_dict(raw)
        shape = self._engine.shape
        check_table_shape(config, shape.num_layers, shape.num_kv_heads)
        needs = scorer_class(config.recipe.scorer).needs
        self._engine.configure(config, self._layer_parameters(needs))
        self._config = config
        self._stats.budget = config.budget

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the stock worker; scores then use the new weights too."""
        super().reload_weights(*args, **kwargs)
        self._use_new_weights()

    def finish_weight_update(self) -> None:
        """As the stock worker; scores then use the new weights too."""
        super().finish_weight_update()
        self._use_new_weights()

    def _use_new_weights(self) -> None:
        # What is derived from weights does not follow them by itself.
        if self._engine is not None:
            needs = scorer_class(self._config.recipe.scorer).needs
            self._engine.use_parameters(self._layer_parameters(needs))

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock worker, after dropping requests that have left."""
        if self._engine is not None:
            self._engine.forget(scheduler_output.finished_req_ids)
            self._engine.forget(scheduler_output.preempted_req_ids or ())
            self._engine.keep_whole(told_whole_ids(scheduler_output))
        if scheduler_output.total_num_scheduled_tokens == 0:
            # Nothing runs any more. A command that ends now kills this process within moments.
            self._stats.flush()
        if self._engine is None or self._is_warming_up:
            return super().execute_model(scheduler_output, *args, **kwargs)
        with self._engine.scheduled_step(self._one_shot_ids(scheduler_output)):
            return super().execute_model(scheduler_output, *args, **kwargs)

    def compile_or_warm_up_model(self) -> Any:
        """As the stock worker, whose made-up batches are no requests."""
        self._is_warming_up = True
        try:
            return super().compile_or_warm_up_model()
        finally:
            self._is_warming_up = False

    def kv_compress_stats(self) -> dict[str, Any]:
        """This rank's counts, for `collective_rpc`."""
        return self._stats.snapshot()

    def shutdown(self) -> None:
        """As the stock worker, after a last log line."""
        self._stats.flush()
        # It has the KV cache, whose memory the stock worker gives back.
        self._engine = None
        super().shutdown()


def rows_of_v1(runner: Any) -> RowNames:
    """Rows of Model Runner V1, whose batch is in the order of the step's."""
    batch = runner.input_batch

    def names(common: Any) -> tuple[Sequence[str], np.ndarray]:
        return batch.req_ids, batch.num_prompt_tokens[: batch.num_reqs]

    return names


def _unwrapped(kv_cache_config: KVCacheConfig) -> KVCacheConfig:
    """The same, without vLLM's wrapper around the specs of a group where all are equal.

    vLLM wraps them where groups differ in bytes per layer, and its wrapper does not know of layers
    that join a group later, since they share another's cache.
    """
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            first, *others = spec.kv_cache_specs.values()
            if all(other == first for other in others):
                group = replace(group, kv_cache_spec=first)
        groups.append(group)
    return replace(kv_cache_config, kv_cache_groups=groups)


def _readers(context: dict[str, Any], names: list[str]) -> dict[str, str]:
    """Layers without a cache of their own, and the layers whose cache they read.

    Args:
        context: vLLM's layers by name.
        names: of a group of full-attention layers.

    Raises:
        KVCompressConfigError: if a layer with a cache lies between, or they have other heads.
    """
    targets = {name: context[name].kv_sharing_target_layer_name for name in names}
    readers = {name: target for name, target in targets.items() if target is not None}
    for name, target in readers.items():
        index = extract_layer_index(name)
        before = [n for n in names if n not in readers and extract_layer_index(n) < index]
        # What a one-shot prompt evicts is there only until the next layer's is.
        if target != max(before, key=extract_layer_index, default=None):
            raise KVCompressConfigError(
                f"KV compression needs layer {name} to share the cache of the last full-attention "
                f"layer before it that has one; it shares that of {target}"
            )
        if context[name].num_heads != context[target].num_heads:
            raise KVCompressConfigError(
                f"KV compression needs layers that share a cache to have the same heads; {name} "
                f"has {context[name].num_heads}, {target} {context[target].num_heads}"
            )
    return readers


def _layer_problem(layer: Any, spec: FullAttentionSpec) -> str | None:
    """Why a full-attention layer cannot be compressed; None if it can."""
    if spec.kv_quant_mode != KVQuantMode.NONE:
        # A checkpoint may ask for this itself, whatever --kv-cache-dtype says.
        return f"its KV cache is quantized ({spec.kv_quant_mode.name})"
    if layer.impl.alibi_slopes is not None:
        return "ALiBi needs every key's position in the cache"
    if layer.head_size_v != layer.head_size:
        return f"value head size {layer.head_size_v} differs from {layer.head_size}"
    return None
