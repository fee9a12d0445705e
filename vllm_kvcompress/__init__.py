"""KV-cache compression for stock vLLM: per-head budgets, evicted pages back to the block pool."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError

if TYPE_CHECKING:
    from vllm_kvcompress.vllm_integration.llm import LLM

__version__ = metadata.version("vllm-kvcompress")
__all__ = ["LLM", "KVCompressConfig", "KVCompressConfigError", "__version__"]


def __getattr__(name: str) -> Any:
    # vLLM is imported only by those who ask for the engine.
    if name == "LLM":
        from vllm_kvcompress.vllm_integration.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
