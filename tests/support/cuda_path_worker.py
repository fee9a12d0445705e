"""vLLM's CPU worker with the CUDA side of compression; see cuda_on_cpu.py."""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.vllm_integration.platforms.cuda.engine import CUDAEngine
from vllm_kvcompress.vllm_integration.platforms.cuda.platform import CUDA
from vllm_kvcompress.vllm_integration.worker.worker import CompressionWorker


class CUDAOnCPU(CUDA):
    """The CUDA platform without a GPU: references compute, and nothing is compiled before."""

    worker = f"{__name__}.CUDAPathWorker"

    def is_current(self) -> bool:
        return True

    def refusals(self, vllm_config: Any) -> tuple[tuple[bool, str], ...]:
        return ()

    def check_heads(self, head_size: int, num_queries_per_kv: int) -> None:
        """References take any."""

    def make_engine(self, parts: Any, attention: dict[str, Any], is_first_rank: bool) -> CUDAEngine:
        return CUDAEngine(parts, os.environ.get("KVC_TEST_OPS", "reference"))

    def step_buffer_bytes(self, *args: Any) -> int:
        # The pool of a CPU has the size that the test says.
        return 0

    def warm_up(self, *args: Any) -> None:
        """Nothing is to be compiled."""


class CUDAPathWorker(CompressionWorker, CPUWorker):
    """As KVCompressCUDAWorker, without a GPU."""

    platform = CUDAOnCPU()
