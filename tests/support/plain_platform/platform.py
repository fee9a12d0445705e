"""What the plain platform has of its own."""

from __future__ import annotations

from typing import Any

from vllm_kvcompress.vllm_integration.platforms.base import Platform


class Plain(Platform):
    """See the package. Tests choose its worker, or make it the only platform."""

    name = "plain"
    worker = "plain_platform.worker.PlainWorker"
    block_size = 8
    block_unit = 1
    attention = "plain_platform.attention.PlainBackend"
    # vLLM's CPU platform resolves no other.
    attention_name = "CPU_ATTN"

    def is_current(self) -> bool:
        return True

    def make_engine(self, parts: Any, attention: dict[str, Any], is_first_rank: bool) -> Any:
        from plain_platform.engine import PlainEngine

        return PlainEngine(parts)
