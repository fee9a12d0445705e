"""What our workers share: specs that carry the setting, and an engine bound to the KV cache."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.compaction.score_memory import score_memory_of
from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.memory import CacheShape
from vllm_kvcompress.policies import scorer_class
from vllm_kvcompress.policies.registry import clashes
from vllm_kvcompress.vllm_integration.platforms.base import Platform
from vllm_kvcompress.vllm_integration.scheduler.spec import KVCompressSpec
from vllm_kvcompress.vllm_integration.step_messages import told
from vllm_kvcompress.vllm_integration.validate import check_table_shape
from vllm_kvcompress.vllm_integration.worker.engine import EngineParts, WorkerEngine
from vllm_kvcompress.vllm_integration.worker.layers import layer_parameters, output_copy_bytes
from vllm_kvcompress.vllm_integration.worker.metrics import CompressionStats
from vllm_kvcompress.vllm_integration.worker.row_names import rows_of_v1, rows_of_v2
from vllm_kvcompress.vllm_integration.worker.specs import (
    compressed_specs,
    group_to_compress,
    readers_of,
    unwrapped,
    with_setting,
)

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
    batch tells request ids and prompt lengths. A worker class mixes it into one of vLLM's and says
    its platform.

    Attributes:
        platform: what differs from other workers.
    """

    platform: Platform

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._config = KVCompressConfig.from_dict(vllm_config.additional_config["kv_compress"])
        self._stats = CompressionStats(log=self.rank == 0, budget=self._config.budget)
        self._engine: WorkerEngine | None = None
        self._is_warming_up = False

    def init_device(self) -> None:
        """As the stock worker, with our backend registered before the model is built."""
        name = AttentionBackendEnum[self.platform.attention_name]
        register_backend(name, self.platform.attention)
        # An engine without compression may have been in this process.
        selector._cached_get_attn_backend.cache_clear()
        if self.platform.caveat is not None and self.rank == 0:
            logger.warning("kv-compress: %s", self.platform.caveat)
        super().init_device()

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

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The stock specs, full-attention layers carrying our config.

        Layers with a sliding window stay stock.

        Raises:
            KVCompressConfigError: if the model has layers that cannot be compressed.
        """
        return with_setting(
            super().get_kv_cache_spec(),
            self._layers,
            self._config,
            self._one_shot_tokens(),
            self.platform.counts_memory,
        )

    def determine_available_memory(self) -> int:
        """As the stock worker, less what compression keeps beside the pool."""
        available = super().determine_available_memory()
        if not self.platform.counts_memory:
            return available
        if self.vllm_config.cache_config.kv_cache_memory_bytes:
            # Somebody chose the pool's size; or an earlier start did, which counted ours.
            return available
        own = self._own_bytes(available)
        # So that it is part of what vLLM advises, and saves for another start.
        self.total_consumed += own
        return available - own

    def _cache_shape(self, spec: KVCompressSpec, layer: Any, num_layers: int) -> CacheShape:
        """Shape of a cache whose layers are all like this one."""
        page = spec.page_format(self.platform.page_order_name(layer))
        return CacheShape(num_layers, spec.num_kv_heads, layer.num_heads // spec.num_kv_heads, page)

    def _own_bytes(self, available: int) -> int:
        """What compression keeps beside a pool that has the rest of the available bytes."""
        specs = compressed_specs(self.get_kv_cache_spec())
        name, spec = next(iter(specs.items()))
        shape = self._cache_shape(spec, self._layers[name], len(specs))
        self.platform.check_heads(shape.head_size, shape.num_queries_per_kv)
        max_num_reqs, staged_tokens = self._max_num_reqs(), self._staged_tokens()
        assert self.device is not None
        own = self.platform.step_buffer_bytes(shape, max_num_reqs, spec.dtype, self.device)
        pages = self._config.one_shot.counted_buffer_pages(shape, staged_tokens, max_num_reqs)
        own += pages * shape.page.num_bytes
        scores = score_memory_of(self._config, shape)
        own += scores.staged_entry_bytes(staged_tokens)
        own += scores.most_bytes(
            self.vllm_config.model_config.max_model_len,
            self.vllm_config.scheduler_config.max_num_seqs,
        )
        if "output_weight" in _needs_of(self._config):
            model = self.model_runner.get_model()
            own += sum(output_copy_bytes(model, name, self._layers[name]) for name in specs)
        # And a part of what is left, as large a pool as that may be.
        share = scores.entry_share()
        return own + int(max(0, available - own) * share / (1 + share))

    def _max_num_reqs(self) -> int:
        """Rows of the largest step, a captured graph's padding included."""
        captured = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        return max(self.vllm_config.scheduler_config.max_num_seqs, captured)

    def _staged_tokens(self) -> int:
        """Most tokens of a step whose prompts have no blocks for what they evict."""
        return self._step_tokens() if self._one_shot_tokens() else 0

    @property
    def _layers(self) -> dict[str, Any]:
        """vLLM's attention layers by name."""
        return self.vllm_config.compilation_config.static_forward_context

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache, then bind our builders to it."""
        super().initialize_from_config(unwrapped(kv_cache_config))
        groups = self.model_runner.kv_cache_config.kv_cache_groups
        ours = group_to_compress(groups)
        group = groups[ours]
        spec = group.kv_cache_spec
        assert isinstance(spec, KVCompressSpec)
        readers = readers_of(self._layers, group.layer_names)
        owners = (name for name in group.layer_names if name not in readers)
        self._layer_names = sorted(owners, key=extract_layer_index)
        layers: dict[str, Attention] = {name: self._layers[name] for name in self._layer_names}
        shape = self._cache_shape(spec, next(iter(layers.values())), len(layers))
        check_table_shape(self._config, shape.num_layers, shape.num_kv_heads)
        self.platform.check_heads(shape.head_size, shape.num_queries_per_kv)
        self._check_layers(layers, shape)
        names = rows_of_v2 if self.use_v2_model_runner else rows_of_v1
        parts = EngineParts(
            config=self._config,
            shape=shape,
            layer_views={name: layer.kv_cache for name, layer in layers.items()},
            layers=self._layer_parameters(_needs_of(self._config)),
            row_names=names(self.model_runner),
            max_num_reqs=self._max_num_reqs(),
            stats=self._stats,
            one_shot_tokens=self._staged_tokens() if self.platform.counts_memory else None,
        )
        self._engine = self.platform.make_engine(parts, layers, self.rank == 0)
        self._engine.add_readers(readers)
        for attn_group in itertools.chain.from_iterable(self.model_runner.attn_groups):
            if attn_group.kv_cache_group_id != ours:
                continue
            builders: list[Any] = attn_group.metadata_builders
            for builder in builders:
                builder.bind(self._engine)
        if self.rank == 0:
            self._log_start(self._engine)

    def _check_layers(self, layers: dict[str, Attention], shape: CacheShape) -> None:
        """Refuse layers that vLLM has laid out otherwise, or that chose another attention."""
        first = next(iter(layers.values()))
        if first.kv_cache.stride(0) != shape.pages_per_block * shape.page.num_elements:
            raise KVCompressConfigError(
                f"KV compression does not support how vLLM lays out this model: blocks of its "
                f"{shape.num_layers} full-attention layers are padded to the size of the others'"
            )
        for name, layer in layers.items():
            backend = layer.get_attn_backend()
            # By name: vLLM loads the backend from its path.
            if f"{backend.__module__}.{backend.__qualname__}" != self.platform.attention:
                raise KVCompressConfigError(
                    f"KV compression brings its own attention, and layer {name} of this model "
                    "has chosen another"
                )

    def _log_start(self, engine: WorkerEngine) -> None:
        """Say what this engine does, and what its user should know."""
        config, shape = self._config, engine.shape
        asked = f"ratio {config.ratio}" if config.ratio is not None else f"budget {config.budget}"
        logger.info(
            "kv-compress: %s, %s, window %d, granularity %s; pages of %d tokens, "
            "%d layers x %d KV heads, ops: %s",
            config.method,
            asked,
            config.window,
            config.granularity,
            shape.block_size,
            shape.num_layers,
            shape.num_kv_heads,
            engine.ops_name,
        )
        weakness = config.recipe.weakness
        if weakness:
            logger.warning("kv-compress: %s %s (docs/quality.md)", config.method, weakness)
        for advice in (clashes().get(config.method), config.few_pages_advice(shape.block_size)):
            if advice is not None:
                logger.warning("kv-compress: %s", advice)

    def _layer_parameters(self, needs: frozenset[str]) -> list[LayerParameters]:
        """What a scorer with these needs must know of each layer."""
        model = self.model_runner.get_model()
        return [
            layer_parameters(model, name, self._layers[name], needs) for name in self._layer_names
        ]

    def kv_compress_reconfigure(self, raw: dict[str, Any]) -> None:
        """Use another setting from now on; see `LLM.kv_compress_reconfigure`."""
        assert self._engine is not None
        config = KVCompressConfig.from_dict(raw)
        shape = self._engine.shape
        check_table_shape(config, shape.num_layers, shape.num_kv_heads)
        self._engine.configure(config, self._layer_parameters(_needs_of(config)))
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
            self._engine.use_parameters(self._layer_parameters(_needs_of(self._config)))

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock worker, after dropping requests that have left, or begin again."""
        if self._engine is not None:
            self._engine.forget(scheduler_output.finished_req_ids)
            self._engine.forget(scheduler_output.preempted_req_ids or ())
            self._engine.forget(new.req_id for new in scheduler_output.scheduled_new_reqs)
            self._engine.forget(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        if scheduler_output.total_num_scheduled_tokens == 0:
            # Nothing runs any more. A command that ends now kills this process within moments.
            self._stats.flush()
        if self._engine is None or self._is_warming_up:
            return super().execute_model(scheduler_output, *args, **kwargs)
        message = told(scheduler_output)
        with self._engine.scheduled_step(message.one_shot_ids, message.whole_ids):
            return super().execute_model(scheduler_output, *args, **kwargs)

    def compile_or_warm_up_model(self) -> Any:
        """Our own kernels, then as the stock worker, whose made-up batches are no requests."""
        assert self._engine is not None
        attention = self._layers[self._layer_names[0]].impl
        max_len = self.vllm_config.model_config.max_model_len
        self.platform.warm_up(self._engine, attention, max_len)
        self._is_warming_up = True
        try:
            return super().compile_or_warm_up_model()
        finally:
            self._is_warming_up = False

    def kv_compress_stats(self) -> dict[str, Any]:
        """This rank's counts, for `collective_rpc`."""
        return self._stats.snapshot()

    def kv_compress_rows(self) -> dict[str, dict[str, Any]]:
        """State of every known request's row on this rank, for `collective_rpc`.

        Returns:
            By vLLM's internal request id, what `memory.CompressedRow.from_dict` reads.
        """
        if self._engine is None:
            return {}
        known = self._engine.requests.ids()
        return {request_id: self._engine.row_state(request_id).to_dict() for request_id in known}

    def shutdown(self) -> None:
        """As the stock worker, after a last log line."""
        self._stats.flush()
        # It has the KV cache, whose memory the stock worker gives back.
        self._engine = None
        # The next engine of this process may be a stock one.
        AttentionBackendEnum[self.platform.attention_name].clear_override()
        selector._cached_get_attn_backend.cache_clear()
        super().shutdown()


def _needs_of(config: KVCompressConfig) -> frozenset[str]:
    """What a setting's scorer needs of a model."""
    return scorer_class(config.recipe.scorer).needs
