"""vLLM's GPU worker with compression."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress.vllm_integration.platforms.cuda.platform import CUDA
from vllm_kvcompress.vllm_integration.worker.worker import CompressionWorker


class KVCompressCUDAWorker(CompressionWorker, Worker):
    """GPU worker of an engine with compression, on either of vLLM's model runners."""

    platform = CUDA()
