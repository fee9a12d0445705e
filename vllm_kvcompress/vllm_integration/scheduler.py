"""vLLM's schedulers, with chunks that end at the compaction point.

A new request's chunk ends at its prompt's end anyway. A preempted one comes back with tokens that
it had generated, which belong behind the compaction: computed with the prompt they would attend to
all of it, and the text would go on otherwise than if nothing had happened. And with the option
suffix_tokens the compaction point lies before the prompt's end.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_kvcompress.vllm_integration.kv_cache import compressing_manager


class _EndAtCompactionPoint:
    """Mixin for vLLM's schedulers."""

    def _reserve_prefill_lookahead(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        # vLLM asks this for every chunk of running and waiting requests alike.
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        manager = compressing_manager(self.kv_cache_manager.coordinator)
        geometry = manager.geometry.of(request.num_prompt_tokens)
        missing = geometry.compact_len - num_computed_tokens
        if geometry.is_compressed and 0 < missing < num_new_tokens:
            return missing
        return num_new_tokens


class KVCompressScheduler(_EndAtCompactionPoint, Scheduler):
    """vLLM's scheduler, chunks ending at the compaction point."""


class KVCompressAsyncScheduler(_EndAtCompactionPoint, AsyncScheduler):
    """vLLM's asynchronous scheduler, chunks ending at the compaction point."""
