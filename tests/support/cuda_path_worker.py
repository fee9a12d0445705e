"""vLLM's CPU worker with the CUDA side of compression; see cuda_on_cpu.py."""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.vllm_integration.platforms.cuda.engine import CUDAEngine
from vllm_kvcompress.vllm_integration.platforms.cuda.worker import _BACKEND_PATH, rows_of_v2
from vllm_kvcompress.vllm_integration.worker.worker import CompressionWorker, rows_of_v1


class CUDAPathWorker(CompressionWorker, CPUWorker):
    """As KVCompressCUDAWorker, without a GPU."""

    _is_buffer_counted = True

    def init_device(self) -> None:
        register_backend(AttentionBackendEnum.CUSTOM, _BACKEND_PATH)
        # An engine without compression may have been here before, and may follow.
        selector._cached_get_attn_backend.cache_clear()
        super().init_device()

    def _make_engine(self, shape: Any, attention: dict[str, Any], layers: list[Any]) -> CUDAEngine:
        names = rows_of_v2 if self.use_v2_model_runner else rows_of_v1
        return CUDAEngine(
            config=self._config,
            shape=shape,
            layer_views={name: layer.kv_cache for name, layer in attention.items()},
            layers=layers,
            row_names=names(self.model_runner),
            max_num_reqs=self.vllm_config.scheduler_config.max_num_seqs,
            stats=self._stats,
            one_shot_tokens=self._step_tokens(),
            backend=os.environ.get("KVC_TEST_OPS", "reference"),
        )

    def shutdown(self) -> None:
        selector._cached_get_attn_backend.cache_clear()
        super().shutdown()
