"""vLLM's CPU worker on the plain platform."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from plain_platform.platform import Plain
from vllm_kvcompress.vllm_integration.worker.worker import CompressionWorker


class PlainWorker(CompressionWorker, CPUWorker):
    """See the package."""

    platform = Plain()
