"""vLLM's CPU worker with compression."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.vllm_integration.platforms.cpu.platform import CPU
from vllm_kvcompress.vllm_integration.worker.worker import CompressionWorker


class KVCompressCPUWorker(CompressionWorker, CPUWorker):
    """CPU worker of an engine with compression."""

    platform = CPU()
