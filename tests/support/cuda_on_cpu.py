"""The CUDA side of the seam inside a real engine on a CPU, on either of vLLM's model runners.

vLLM's own CPU worker, model runner, scheduler and block pool, with our CUDA engine, builder and
impl in place of the CPU ones. References stand in for our kernels and plain torch for vLLM's
compiled ops, while its FlashAttention builder and impl run. Model Runner V2 has its Triton kernels
run in Triton's interpreter.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any


def pretend_triton_has_a_cpu_backend() -> None:
    """Let vLLM's CPU build use Triton, which then has to run interpreted. Before importing vLLM."""
    assert "vllm" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def use_cuda_side(patch: Any) -> None:
    """Make engines of this process take the CUDA side; `patch` is a pytest MonkeyPatch.

    As on a GPU, layers with a sliding window get the stock FlashAttention backend. Engines without
    compression stay what they are.
    """
    from cuda_path_worker import CUDAPathWorker
    from plain_flash_attention import use_plain_attention
    from vllm.config import get_current_vllm_config
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_kvcompress.vllm_integration import platforms

    stock_choice = CpuPlatform.get_attn_backend_cls

    def choose(selected: Any, *args: Any, **kwargs: Any) -> str:
        if selected is AttentionBackendEnum.CUSTOM:
            return selected.get_path()
        kinds = get_current_vllm_config().attention_config.backend_per_kind
        if AttentionBackendEnum.CUSTOM in kinds.values():
            return AttentionBackendEnum.FLASH_ATTN.get_path()
        return stock_choice(selected, *args, **kwargs)

    patch.setattr(CpuPlatform, "get_attn_backend_cls", staticmethod(choose))
    patch.setattr(platforms, "PLATFORMS", (CUDAPathWorker.platform,))
    use_plain_attention(patch)
