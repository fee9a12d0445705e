"""Our CPU worker: puts the compressing backend in place and binds it to the KV cache."""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.memory import CacheShape
from vllm_kvcompress.vllm_integration.platforms.cpu.engine import CPUEngine
from vllm_kvcompress.vllm_integration.platforms.cpu.huge_pages import use_huge_pages
from vllm_kvcompress.vllm_integration.platforms.cpu.page_order import find_page_order
from vllm_kvcompress.vllm_integration.validate import choose_cpu_ops
from vllm_kvcompress.vllm_integration.worker.worker import CompressionWorker, rows_of_v1

logger = init_logger(f"vllm.{__name__}")

_BACKEND_PATH = "vllm_kvcompress.vllm_integration.platforms.cpu.attention.KVCompressCPUBackend"


class KVCompressCPUWorker(CompressionWorker, CPUWorker):
    """CPU worker of an engine with compression."""

    def init_device(self) -> None:
        """As the stock worker, with our backend registered before the model is built."""
        # The CPU platform resolves this one name, whatever backend is selected.
        register_backend(AttentionBackendEnum.CPU_ATTN, _BACKEND_PATH)
        selector._cached_get_attn_backend.cache_clear()
        super().init_device()

    def _make_engine(
        self,
        shape: CacheShape,
        attention: dict[str, Attention],
        layers: list[LayerParameters],
    ) -> CPUEngine:
        first: Any = next(iter(attention.values()))
        dtype = first.kv_cache.dtype
        # All layers share this storage, and nothing is in it yet.
        storage = first.kv_cache.untyped_storage()
        if not use_huge_pages(torch.empty(0, dtype=torch.int8).set_(storage)) and self.rank == 0:
            logger.info(
                "kv-compress: no huge pages for the KV cache, which costs nothing but speed"
            )
        backend, why_torch = choose_cpu_ops()
        return CPUEngine(
            config=self._config,
            shape=shape,
            layer_views={name: layer.kv_cache for name, layer in attention.items()},
            order=find_page_order(first.isa, shape.block_size, shape.head_size, dtype),
            layers=layers,
            row_names=rows_of_v1(self.model_runner),
            max_num_reqs=self.vllm_config.scheduler_config.max_num_seqs,
            stats=self._stats,
            backend=backend,
            why_torch=why_torch,
        )

    def shutdown(self) -> None:
        """As the stock worker; the next engine of this process may be a stock one."""
        AttentionBackendEnum.CPU_ATTN.clear_override()
        selector._cached_get_attn_backend.cache_clear()
        super().shutdown()
