"""What a platform has of its own. All else of the seam is the same on every one, and asks it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_kvcompress.memory.page_format import PLAIN

if TYPE_CHECKING:
    import torch

    from vllm_kvcompress.memory import CacheShape
    from vllm_kvcompress.vllm_integration.worker.engine import EngineParts, WorkerEngine


class Platform:
    """A kind of device that engines run on. It has no state.

    The process that starts an engine asks for the first half, before any worker is there. The
    second half is the worker's, and imports what it needs itself: the first does without. An
    instance belongs to each worker class, as its `platform`.

    Its attention backend has the layout BLHNC, and stores keys and values itself
    (`forward_includes_kv_cache_update`). The metadata builder has a method `bind`, which takes the
    engine; until then vLLM profiles. In every step it asks the engine to `prepare`. In every layer
    the impl writes keys and values by the slots that the engine has corrected, and those of staged
    prompts to the room that `begin_layer` gives. It attends, and then gives the queries to
    `after_attention`. A layer that shares another's cache writes nothing, reads what
    `current_layer` gives, and gives no queries.

    Attributes:
        name: for people.
        worker: path of the worker class: of `CompressionWorker` and one of vLLM's.
        block_size: tokens per block, where the user names none.
        block_unit: what tokens per block are a multiple of.
        attention: path of the attention backend, which keeps the rules above.
        attention_name: member of vLLM's `AttentionBackendEnum` that stands for this path.
        counts_memory: whether the pool is made as large as memory beside it allows. Then all that
            compression keeps is counted, and prompts without blocks share a buffer of fixed size.
        caveat: what people must know of it; logged at start-up.
    """

    name: str
    worker: str
    block_size: int
    # vLLM's kernels on a CPU, and FlashAttention's, take multiples of it.
    block_unit = 16
    attention: str
    attention_name: str
    counts_memory = False
    caveat: str | None = None

    # Where an engine is started.

    def is_current(self) -> bool:
        """Whether vLLM runs on this platform, and so takes its worker unless told otherwise."""
        raise NotImplementedError

    def refusals(self, vllm_config: Any) -> tuple[tuple[bool, str], ...]:
        """What does not work here, as (whether it is asked for, what it is)."""
        return ()

    def check_heads(self, head_size: int, num_queries_per_kv: int) -> None:
        """Refuse heads that the platform's kernels do not take.

        Raises:
            KVCompressConfigError: naming what it takes.
        """

    def use_attention(self, attention_config: Any) -> None:
        """Have full-attention layers take `attention`, where vLLM chooses by its configuration."""

    # In a worker.

    def make_engine(
        self, parts: EngineParts, attention: dict[str, Any], is_first_rank: bool
    ) -> WorkerEngine:
        """The engine of a worker.

        Args:
            parts: that every engine is made of.
            attention: vLLM's layers by name, in layer order, bound to the cache.
            is_first_rank: whether to log what people should know.
        """
        raise NotImplementedError

    def page_order_name(self, layer: Any) -> str:
        """Name of the elements' order in pages that a layer's kernel fills."""
        return PLAIN

    def step_buffer_bytes(
        self, shape: CacheShape, max_num_reqs: int, dtype: torch.dtype, device: torch.device
    ) -> int:
        """Memory of what its steps keep beside the pool; asked only where memory is counted."""
        return 0

    def warm_up(self, engine: WorkerEngine, attention: Any, max_len: int) -> None:
        """Compile and run what a request would otherwise wait for.

        Args:
            engine: of `make_engine`.
            attention: impl of one layer; they differ in weights only.
            max_len: tokens of the longest request.
        """
