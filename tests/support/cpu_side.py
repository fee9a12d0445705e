"""The CPU platform in a rig: vLLM's real CPU kernels, and the ops in torch or compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled_ops import need_compiled_ops
from rig_side import Side
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend

from vllm_kvcompress.memory import CacheShape
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.vllm_integration.worker.engine import EngineParts, WorkerEngine

# Our modules of this platform are imported where they are needed: those of vLLM below them are
# not meant for a GPU's vLLM.


class CPUSide(Side):
    """vLLM for a CPU.

    Args:
        backend: of the ops, 'torch' or 'native'.
    """

    def __init__(self, backend: str) -> None:
        super().__init__(backend, torch.device("cpu"))

    @property
    def attention(self) -> type[AttentionBackend]:
        """Ours on vLLM's CPU kernels."""
        from vllm_kvcompress.vllm_integration.platforms.cpu.attention import KVCompressCPUBackend

        return KVCompressCPUBackend

    def prepare(self, patch: Any) -> None:
        """Skip where vLLM has no CPU kernels."""
        if not current_platform.is_cpu():
            pytest.skip("this vLLM is not the one for a CPU")
        if self.backend == "native":
            need_compiled_ops()

    def page_order(self, layer: Attention, shape: CacheShape, dtype: torch.dtype) -> PageOrder:
        """That of the kernel which vLLM's builder has chosen for its layers."""
        from vllm_kvcompress.vllm_integration.platforms.cpu.page_order import find_page_order

        isa: Any = layer.isa
        return find_page_order(isa, shape.block_size, shape.head_size, dtype)

    def make_engine(self, parts: EngineParts, order: PageOrder, impl: Any) -> WorkerEngine:
        """As in the CPU's worker."""
        from vllm_kvcompress.vllm_integration.platforms.cpu.engine import CPUEngine

        return CPUEngine(parts, order, self.backend)
