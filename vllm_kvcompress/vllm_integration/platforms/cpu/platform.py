"""vLLM's CPU platform: its own attention kernels, on pages of single KV heads."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_kvcompress import ops
from vllm_kvcompress.config import DEFAULT_BLOCK_SIZE, KVCompressConfigError
from vllm_kvcompress.vllm_integration.platforms.base import Platform

if TYPE_CHECKING:
    from vllm_kvcompress.vllm_integration.worker.engine import EngineParts, WorkerEngine

logger = init_logger(f"vllm.{__name__}")

_FOLDER = "vllm_kvcompress.vllm_integration.platforms.cpu"
# Which ops an engine uses: 'torch', 'native' (compiled), or whichever there is.
_OPS = "VLLM_KVCOMPRESS_OPS"


class CPU(Platform):
    """See the module."""

    name = "CPU"
    worker = f"{_FOLDER}.worker.KVCompressCPUWorker"
    block_size = DEFAULT_BLOCK_SIZE["CPU"]
    attention = f"{_FOLDER}.attention.KVCompressCPUBackend"
    # vLLM resolves this one name here, whatever backend is selected.
    attention_name = "CPU_ATTN"

    def is_current(self) -> bool:
        """Whether vLLM runs on CPUs."""
        from vllm.platforms import current_platform

        return current_platform.is_cpu()

    def refusals(self, vllm_config: Any) -> tuple[tuple[bool, str], ...]:
        """What does not work on a CPU."""
        choose_ops()
        return (
            (vllm_config.use_v2_model_runner, "Model Runner V2; unset VLLM_USE_V2_MODEL_RUNNER"),
        )

    def page_order_name(self, layer: Any) -> str:
        """The instruction set, which vLLM's kernel orders its pages for."""
        return layer.isa

    def make_engine(
        self, parts: EngineParts, attention: dict[str, Any], is_first_rank: bool
    ) -> WorkerEngine:
        """An engine whose pool lies in huge pages, if there are any."""
        import torch

        from vllm_kvcompress.vllm_integration.platforms.cpu.engine import CPUEngine
        from vllm_kvcompress.vllm_integration.platforms.cpu.huge_pages import use_huge_pages
        from vllm_kvcompress.vllm_integration.platforms.cpu.page_order import find_page_order

        first = next(iter(attention.values()))
        # All layers share this storage, and nothing is in it yet.
        storage = first.kv_cache.untyped_storage()
        if not use_huge_pages(torch.empty(0, dtype=torch.int8).set_(storage)) and is_first_rank:
            logger.info(
                "kv-compress: no huge pages for the KV cache, which costs nothing but speed"
            )
        shape = parts.shape
        dtype = first.kv_cache.dtype
        order = find_page_order(shape.page.order, shape.block_size, shape.head_size, dtype)
        return CPUEngine(parts, order, *choose_ops())


def choose_ops() -> tuple[str, str | None]:
    """The backend of a CPU engine's ops: compiled ones if there are any.

    Returns:
        'native' or 'torch', and for a 'torch' that nobody asked for why it is that.

    Raises:
        KVCompressConfigError: if $VLLM_KVCOMPRESS_OPS is unknown, or asks for what is not there.
    """
    wish = os.environ.get(_OPS, "")
    if wish not in ("", "torch", "native"):
        raise KVCompressConfigError(f"${_OPS} must be 'torch' or 'native', got {wish!r}")
    if wish == "torch":
        return "torch", None
    problem = ops.native_problem("cpu")
    if problem is None:
        return "native", None
    if wish == "native":
        raise KVCompressConfigError(f"${_OPS} is 'native', but {problem}")
    return "torch", problem
