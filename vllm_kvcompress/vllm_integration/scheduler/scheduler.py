"""vLLM's schedulers, with chunks that end where compaction wants them to.

A new request's chunk ends at its prompt's end anyway. A preempted one comes back with tokens that
it had generated, which belong behind the compaction: computed with the prompt they would attend to
all of it, and the text would go on otherwise than if nothing had happened. And with the option
suffix_tokens the compaction point lies before the prompt's end.

A token whose query has a say in what is kept is never alone in a chunk: on a GPU, vLLM runs such
a row as a decode, in a captured graph, where nobody could collect its query. If a step has no room
for two such tokens, the next one leaves decoding requests out for it, in turn.

A streaming-input session, whose prompt grows from chunk to chunk, stays whole and is served as by
stock vLLM.

And what tokens computed over a compressed prompt leave in the cache is for nobody else to read.

A compressed prompt is let in only where the pool has room for what will be generated (`headroom`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_kvcompress.memory import RequestGeometry
from vllm_kvcompress.vllm_integration.scheduler.headroom import OutputLengths, has_headroom
from vllm_kvcompress.vllm_integration.scheduler.manager import (
    KVCompressManager,
    cache_only_before_compaction,
    compressing_manager,
    needs_all_queries,
)
from vllm_kvcompress.vllm_integration.step_messages import StepMessage, tell

# Under "vllm", whose logging configuration would not reach a logger of our own name.
logger = init_logger(f"vllm.{__name__}")


if TYPE_CHECKING:
    # What the mixin is mixed into, or its asynchronous subclass.
    _Base = Scheduler
else:
    _Base = object


class _CompressionScheduler(_Base):
    """Mixin for vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._output_lengths = OutputLengths()
        cache_only_before_compaction(self.kv_cache_manager.coordinator)
        # Tokens that a prompt lacked room for in the step before, and who makes it in this one.
        self._num_lacking = 0
        self._left_out: set[str] = set()
        self._num_turns = 0

    @property
    def _manager(self) -> KVCompressManager:
        return compressing_manager(self.kv_cache_manager.coordinator)

    def add_request(self, request: Any) -> None:
        if request.resumable:
            logger.info_once(
                "kv-compress: streaming-input sessions keep all of their tokens, since their "
                "prompts grow"
            )
            self._manager.whole_ids.add(request.request_id)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._leave_out_decodes()
        output = super().schedule(*args, **kwargs)
        self._left_out.clear()
        tell(output, self._message(output))
        return output

    def _message(self, output: Any) -> StepMessage:
        """What workers must know of a step's requests."""
        manager = self._manager
        begun = [new.req_id for new in output.scheduled_new_reqs]
        begun += output.scheduled_cached_reqs.resumed_req_ids
        rows = {request_id: manager.rows.get(request_id) for request_id in begun}
        return StepMessage(
            whole_ids=frozenset(manager.whole_ids & output.num_scheduled_tokens.keys()),
            one_shot_ids=frozenset(name for name, row in rows.items() if row and row.is_one_shot),
        )

    def _leave_out_decodes(self) -> None:
        """Make room for a prompt, at the cost of one step of as few decoding requests as can be."""
        num_lacking, self._num_lacking = self._num_lacking, 0
        if not num_lacking:
            return
        decoding = [request for request in self.running if not request.is_prefill_chunk]
        for i in range(min(num_lacking, len(decoding))):
            turn = (self._num_turns + i) % len(decoding)
            self._left_out.add(decoding[turn].request_id)
        self._num_turns += num_lacking

    def _reserve_prefill_lookahead(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        # vLLM asks this for every chunk of running and waiting requests alike.
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        if request.request_id in self._left_out:
            return 0
        geometry = self._manager.geometry_of(request)
        if not geometry.is_compressed:
            return num_new_tokens
        if request.status != RequestStatus.RUNNING and not self._may_enter(request):
            return 0
        num_missing = geometry.compact_len - num_computed_tokens
        num_tokens = chunk_tokens(num_missing, num_new_tokens, self._num_collected(geometry))
        # Where vLLM offers none, it is not for want of room in the step.
        if num_tokens == 0 < num_new_tokens:
            self._num_lacking = fewest_tokens(num_missing) - num_new_tokens
        return num_tokens

    def _num_collected(self, geometry: RequestGeometry) -> int:
        """Tokens before the compaction point whose queries have a say in what is kept."""
        config = self._manager.config
        return geometry.compact_len if needs_all_queries(config) else config.window

    def _may_enter(self, request: Any) -> bool:
        headroom = self._manager.config.option("headroom")
        # Alone, waiting would not help.
        if not self.running or headroom == 0:
            return True
        return has_headroom(
            request,
            self.running,
            self._output_lengths,
            self._manager.geometry,
            headroom,
            self.kv_cache_manager.block_pool.get_num_free_blocks(),
            self.max_model_len,
        )

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._output_lengths.add(request.num_output_tokens)
        self._manager.whole_ids.discard(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self._forgo_prefix_cache(request)
        super()._preempt_request(request, *args, **kwargs)

    def _forgo_prefix_cache(self, request: Any) -> None:
        # When it is resumed, the lookup would start from prompt plus output and could hit past the
        # window (another prompt may contain our output), so that the window's queries would never
        # be computed. Not said earlier: vLLM counts no hits of such requests.
        geometry = self._manager.geometry_of(request)
        if geometry.is_compressed and request.num_computed_tokens >= geometry.compact_len:
            request.skip_reading_prefix_cache = True


def chunk_tokens(num_missing: int, num_new_tokens: int, num_collected: int) -> int:
    """Tokens of a compressed prompt's next chunk.

    Args:
        num_missing: tokens from where the request is to its compaction point; never 1, because
            prefix-cache hits and earlier chunks leave more, and not positive behind that point.
        num_new_tokens: tokens that vLLM would compute.
        num_collected: last tokens before the compaction point that may not be alone in a chunk.

    Returns:
        At most num_new_tokens; 0 to wait for a step with more room.
    """
    if num_missing <= 0:
        return num_new_tokens
    num_tokens = min(num_missing, num_new_tokens)
    if num_missing - num_tokens == 1:
        num_tokens -= 1
    return 0 if num_tokens == 1 and num_missing <= num_collected else num_tokens


def fewest_tokens(num_missing: int) -> int:
    """Tokens of the smallest chunk of collected tokens that leaves none alone."""
    return 3 if num_missing == 3 else 2


class KVCompressScheduler(_CompressionScheduler, Scheduler):
    """vLLM's scheduler, chunks ending at the compaction point."""


class KVCompressAsyncScheduler(_CompressionScheduler, AsyncScheduler):
    """vLLM's asynchronous scheduler, chunks ending at the compaction point."""
