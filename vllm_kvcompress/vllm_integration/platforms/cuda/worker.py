"""Our GPU worker: puts the compressing backend in place and binds it to the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.compaction.score_memory import score_memory_of
from vllm_kvcompress.config import KVCompressConfigError
from vllm_kvcompress.memory import CacheShape
from vllm_kvcompress.memory.one_shot import counted_buffer_pages
from vllm_kvcompress.policies import scorer_class
from vllm_kvcompress.vllm_integration.platforms.cuda.engine import CUDAEngine
from vllm_kvcompress.vllm_integration.platforms.cuda.step_buffers import StepBuffers
from vllm_kvcompress.vllm_integration.scheduler.spec import KVCompressSpec
from vllm_kvcompress.vllm_integration.validate import check_gpu_heads
from vllm_kvcompress.vllm_integration.worker.engine import RowNames
from vllm_kvcompress.vllm_integration.worker.layers import output_copy_bytes
from vllm_kvcompress.vllm_integration.worker.worker import CompressionWorker, rows_of_v1

logger = init_logger(f"vllm.{__name__}")

_BACKEND_PATH = "vllm_kvcompress.vllm_integration.platforms.cuda.attention.KVCompressCUDABackend"


class KVCompressCUDAWorker(CompressionWorker, Worker):
    """GPU worker of an engine with compression, on either of vLLM's model runners."""

    _is_buffer_counted = True

    def init_device(self) -> None:
        """As the stock worker, with our backend registered before the model is built."""
        register_backend(AttentionBackendEnum.CUSTOM, _BACKEND_PATH)
        if self.rank == 0:
            logger.warning(
                "kv-compress: the CUDA backend of this release has been tested without a GPU only"
            )
        super().init_device()

    def determine_available_memory(self) -> int:
        """As the stock worker, less what compression keeps beside the pool."""
        available = super().determine_available_memory()
        if self.vllm_config.cache_config.kv_cache_memory_bytes:
            # Somebody chose the pool's size; or an earlier start did, which counted ours.
            return available
        specs = self._compressed_specs()
        spec = next(iter(specs.values()))
        shape = self._cache_shape(specs)
        own = self._own_bytes(specs, shape)
        # And a part of what is left, as large a pool as that may be.
        share = score_memory_of(self._config, shape, spec.dtype.itemsize).entry_share()
        own += int(max(0, available - own) * share / (1 + share))
        # So that it is part of what vLLM advises, and saves for another start.
        self.total_consumed += own
        return available - own

    def _compressed_specs(self) -> dict[str, KVCompressSpec]:
        """By layer name."""
        all_specs = self.get_kv_cache_spec().items()
        return {name: spec for name, spec in all_specs if isinstance(spec, KVCompressSpec)}

    def _cache_shape(self, specs: dict[str, KVCompressSpec]) -> CacheShape:
        layers = self.vllm_config.compilation_config.static_forward_context
        name, spec = next(iter(specs.items()))
        group = layers[name].num_heads // layers[name].num_kv_heads
        check_gpu_heads(spec.head_size, group)
        return CacheShape(len(specs), spec.num_kv_heads, group, spec.head_size, spec.block_size)

    def _own_bytes(self, specs: dict[str, KVCompressSpec], shape: CacheShape) -> int:
        """Memory for what steps read, one-shot prompts, scores, and copied output projections."""
        layers = self.vllm_config.compilation_config.static_forward_context
        spec = next(iter(specs.values()))
        assert self.device is not None
        meta, num_sms = torch.device("meta"), ops.num_multiprocessors(self.device)
        own = StepBuffers(shape, self._max_num_reqs(), spec.dtype, meta, num_sms).num_bytes
        pages = counted_buffer_pages(
            self._config, shape, self._staged_tokens(), self._max_num_reqs()
        )
        own += pages * spec.page_size_bytes // spec.num_kv_heads
        scores = score_memory_of(self._config, shape, spec.dtype.itemsize)
        own += scores.staged_entry_bytes(self._staged_tokens())
        own += scores.most_bytes(
            self.vllm_config.model_config.max_model_len,
            self.vllm_config.scheduler_config.max_num_seqs,
        )
        if "output_weight" in scorer_class(self._config.recipe.scorer).needs:
            model = self.model_runner.get_model()
            own += sum(output_copy_bytes(model, name, layers[name]) for name in specs)
        return own

    def _max_num_reqs(self) -> int:
        """Rows of the largest step, a captured graph's padding included."""
        captured = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        return max(self.vllm_config.scheduler_config.max_num_seqs, captured)

    def _staged_tokens(self) -> int:
        """Most tokens of a step whose prompts have no blocks for what they evict."""
        return self._step_tokens() if self._one_shot_tokens() else 0

    def _make_engine(
        self,
        shape: CacheShape,
        attention: dict[str, Attention],
        layers: list[LayerParameters],
    ) -> CUDAEngine:
        check_gpu_heads(shape.head_size, shape.num_queries_per_kv)
        others = [name for name, x in attention.items() if not _is_ours(x)]
        if others:
            raise KVCompressConfigError(
                f"KV compression brings its own attention, and layer {others[0]} of this model "
                "has chosen another"
            )
        missing = ops.native_problem("cuda")
        if missing and self.rank == 0:
            logger.info("kv-compress: no compiled selection, Triton's instead: %s", missing)
        names = rows_of_v2 if self.use_v2_model_runner else rows_of_v1
        impls: list[Any] = [layer.impl for layer in attention.values()]
        self._impl = impls[0]
        # Layers are scored together: all of them tell their sums, or nobody is asked.
        self._tells_lse = all(impl.tells_lse for impl in impls)
        return CUDAEngine(
            config=self._config,
            shape=shape,
            layer_views={name: layer.kv_cache for name, layer in attention.items()},
            layers=layers,
            row_names=names(self.model_runner),
            max_num_reqs=self._max_num_reqs(),
            stats=self._stats,
            one_shot_tokens=self._staged_tokens(),
            select_backend=None if missing else "native",
            tells_lse=self._tells_lse,
        )

    def compile_or_warm_up_model(self) -> Any:
        """Our own kernels, then as the stock worker, whose made-up batches are no requests."""
        max_len = self.vllm_config.model_config.max_model_len
        assert isinstance(self._engine, CUDAEngine)
        # Layers differ in weights only.
        self._impl.warm_up(self._engine)
        self._engine.warm_up(max_len, self._tells_lse)
        return super().compile_or_warm_up_model()


def _is_ours(layer: Attention) -> bool:
    # By name: vLLM loads the backend from its path.
    return layer.get_attn_backend().get_name() == AttentionBackendEnum.CUSTOM.name


def rows_of_v2(runner: Any) -> RowNames:
    """Rows of Model Runner V2, whose metadata has each row's place in the table of requests."""
    states = runner.req_states

    def names(common: Any) -> tuple[Sequence[str], np.ndarray]:
        places = common.req_idx
        ids = list(map(states.index_to_req_id.__getitem__, places.tolist()))
        return ids, states.prompt_len.np[places]

    return names
