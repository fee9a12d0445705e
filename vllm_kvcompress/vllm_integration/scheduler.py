"""vLLM's schedulers, with chunks that end where compaction wants them to.

A new request's chunk ends at its prompt's end anyway. A preempted one comes back with tokens that
it had generated, which belong behind the compaction: computed with the prompt they would attend to
all of it, and the text would go on otherwise than if nothing had happened. And with the option
suffix_tokens the compaction point lies before the prompt's end.

No chunk before that point has a single token: on a GPU, vLLM runs such a row as a decode, in a
captured graph, where nobody could collect its query.
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
        if not geometry.is_compressed:
            return num_new_tokens
        return chunk_tokens(geometry.compact_len - num_computed_tokens, num_new_tokens)


def chunk_tokens(num_missing: int, num_new_tokens: int) -> int:
    """Tokens of a compressed prompt's next chunk.

    Args:
        num_missing: tokens from where the request is to its compaction point; never 1, because
            prefix-cache hits and earlier chunks leave more, and not positive behind that point.
        num_new_tokens: tokens that vLLM would compute.

    Returns:
        At most num_new_tokens; 0 to wait for a step with more room.
    """
    if num_missing <= 0:
        return num_new_tokens
    num_tokens = min(num_missing, num_new_tokens)
    if num_missing - num_tokens == 1:
        num_tokens -= 1
    return num_tokens if num_tokens > 1 else 0


class KVCompressScheduler(_EndAtCompactionPoint, Scheduler):
    """vLLM's scheduler, chunks ending at the compaction point."""


class KVCompressAsyncScheduler(_EndAtCompactionPoint, AsyncScheduler):
    """vLLM's asynchronous scheduler, chunks ending at the compaction point."""
