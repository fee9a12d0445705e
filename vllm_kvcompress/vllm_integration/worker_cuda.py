"""Our GPU worker: puts the compressing backend in place and binds it to the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress import ops
from vllm_kvcompress.compaction import CacheShape, LayerParameters
from vllm_kvcompress.config import KVCompressConfigError
from vllm_kvcompress.vllm_integration.engine_cuda import CUDAEngine, RowNames
from vllm_kvcompress.vllm_integration.worker import CompressionWorker

logger = init_logger(f"vllm.{__name__}")

_BACKEND_PATH = "vllm_kvcompress.vllm_integration.backend_cuda.KVCompressCUDABackend"


class KVCompressCUDAWorker(CompressionWorker, Worker):
    """GPU worker of an engine with compression, on either of vLLM's model runners."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_warming_up = False

    def init_device(self) -> None:
        """As the stock worker, with our backend registered before the model is built."""
        register_backend(AttentionBackendEnum.CUSTOM, _BACKEND_PATH)
        if self.rank == 0:
            logger.warning(
                "kv-compress: the CUDA backend of this release has been tested without a GPU only"
            )
        super().init_device()

    def _one_shot_tokens(self) -> int:
        """None yet: on a GPU every prompt has dense blocks until it is compacted."""
        return 0

    def _make_engine(
        self,
        shape: CacheShape,
        attention: dict[str, Attention],
        layers: list[LayerParameters],
    ) -> CUDAEngine:
        if shape.num_queries_per_kv > ops.MAX_GROUP:
            raise KVCompressConfigError(
                f"KV compression takes at most {ops.MAX_GROUP} query heads per KV head on a GPU; "
                f"this model has {shape.num_queries_per_kv}"
            )
        missing = ops.native_problem("cuda")
        if missing and self.rank == 0:
            logger.info("kv-compress: no compiled selection, Triton's instead: %s", missing)
        capture_size = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        names = _rows_of_v2 if self.use_v2_model_runner else _rows_of_v1
        return CUDAEngine(
            config=self._config,
            shape=shape,
            layer_views={name: layer.kv_cache for name, layer in attention.items()},
            layers=layers,
            row_names=names(self.model_runner),
            max_num_reqs=max(self.vllm_config.scheduler_config.max_num_seqs, capture_size),
            stats=self._stats,
            select_backend=None if missing else "native",
        )

    def compile_or_warm_up_model(self) -> Any:
        """Our own kernels, then as the stock worker, whose made-up batches are no requests."""
        self._engine.warm_up(self.vllm_config.model_config.max_model_len)
        self._is_warming_up = True
        try:
            return super().compile_or_warm_up_model()
        finally:
            self._is_warming_up = False

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock worker, the engine knowing that these are requests."""
        if self._engine is None or self._is_warming_up:
            return super().execute_model(scheduler_output, *args, **kwargs)
        with self._engine.scheduled_step():
            return super().execute_model(scheduler_output, *args, **kwargs)


def _rows_of_v1(runner: Any) -> RowNames:
    """Rows of Model Runner V1, whose batch is in the order of the step's."""
    batch = runner.input_batch

    def names(common: Any) -> tuple[Sequence[str], np.ndarray]:
        return batch.req_ids, batch.num_prompt_tokens[: batch.num_reqs]

    return names


def _rows_of_v2(runner: Any) -> RowNames:
    """Rows of Model Runner V2, whose metadata has each row's place in the table of requests."""
    states = runner.req_states

    def names(common: Any) -> tuple[Sequence[str], np.ndarray]:
        places = common.req_idx
        return [states.index_to_req_id[int(i)] for i in places], states.prompt_len.np[places]

    return names
