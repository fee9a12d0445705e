"""The block manager of compressed layers.

It sees block counts only. Per-head budgets never reach it, because they always sum
to whole blocks (see `memory.geometry`).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, KVCacheBlock
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import CompressedRow, Geometry, RequestGeometry, cdiv
from vllm_kvcompress.policies import scorer_class
from vllm_kvcompress.vllm_integration.scheduler.spec import KVCompressSpec

_MOST_FREED = 4096


class KVCompressManager(FullAttentionManager):
    """Block manager that adds a region to each compressed request and frees its prompt blocks.

    A prompt that is computed in one shot, in a single step, never gets the blocks that would be
    freed: its row starts with vLLM's null block in their place.

    Everything is derived from (tokens, prompt length, config), so it needs no message from
    the workers: a request is compressed by the step that reaches its compaction point, and
    `remove_skipped_blocks` is called with settled token counts only.

    Attributes:
        rows: state of every request that vLLM has asked blocks for, but for those of `whole_ids`.
            It is as settled, so a compaction in flight is not among it.
        whole_ids: requests that are never compressed; the scheduler adds and removes them.
    """

    kv_cache_spec: KVCompressSpec

    def __init__(self, kv_cache_spec: KVCompressSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.rows: dict[str, CompressedRow] = {}
        # Prompt lengths of the last requests that gave their blocks up: preempted ones come back.
        self._freed: OrderedDict[str, int] = OrderedDict()
        self.whole_ids: set[str] = set()

    @property
    def config(self) -> KVCompressConfig:
        """The setting."""
        return self.kv_cache_spec.kv_compress

    @property
    def geometry(self) -> Geometry:
        """Geometry of requests under the setting."""
        return self.kv_cache_spec.geometry

    def geometry_of(self, request: Any) -> RequestGeometry:
        """Geometry of one of vLLM's requests."""
        return request_geometry(self.geometry, request)

    def reconfigure(self, config: KVCompressConfig) -> None:
        """Use another setting from now on.

        The spec, which vLLM's coordinator shares, is changed in place.

        Raises:
            RuntimeError: if a request still holds blocks.
        """
        num_known = len(self.rows) + len(self.whole_ids)
        if num_known:
            raise RuntimeError(f"{num_known} requests still run under the old setting")
        object.__setattr__(self.kv_cache_spec, "kv_compress", config)

    def _row_tokens(self, prompt_len: int, num_tokens: int) -> int:
        # vLLM's own allocation counts in tokens; the region enters it as whole blocks of them.
        return self.geometry.of(prompt_len).num_row_blocks(num_tokens) * self.block_size

    def _find_prompt_len(self, request_id: str, num_tokens: int, prefill_end: int) -> int | None:
        """Prompt length of a request; None if vLLM has not told it yet."""
        if request_id in self.rows:
            return self.rows[request_id].prompt_len
        # The admission check comes before `remove_skipped_blocks`.
        if prefill_end == num_tokens:
            return num_tokens
        return self._freed.get(request_id)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks missing from the request's row, its region included."""
        is_whole = request_id in self.whole_ids
        prompt_len = self._find_prompt_len(request_id, num_tokens, prefill_end)
        if is_whole:
            row_tokens = num_tokens
        elif prompt_len is None:
            # Room for the largest region of a shorter prompt.
            num_blocks = cdiv(num_tokens, self.block_size)
            num_blocks += self.geometry.max_region_blocks(num_tokens)
            row_tokens = num_blocks * self.block_size
        else:
            row_tokens = self._row_tokens(prompt_len, num_tokens)
        if (
            prompt_len is not None
            and not is_whole
            and total_computed_tokens == 0
            and not self.req_to_blocks.get(request_id)
            and self._may_be_one_shot(self.geometry.of(prompt_len))
        ):
            geometry = self.geometry.of(prompt_len)
            if apply_admission_cap:
                # Whether the whole request can come in; how is settled with its first chunk.
                return geometry.num_row_blocks(num_tokens) - geometry.first_kept_block
            full_tokens = max(num_tokens, prefill_end)
            one_shot_blocks = self._one_shot_blocks(
                request_id, geometry, num_tokens, num_tokens_main_model, full_tokens
            )
            if one_shot_blocks is not None:
                return one_shot_blocks
        return super().get_num_blocks_to_allocate(
            request_id,
            row_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )

    def _may_be_one_shot(self, geometry: RequestGeometry) -> bool:
        """Whether a prompt can do without blocks for what it evicts."""
        spec, one_shot = self.kv_cache_spec, self.config.one_shot
        return (
            one_shot.when != "never"
            and geometry.is_compressed
            and geometry.compact_len <= spec.one_shot_tokens
            and (not spec.is_buffer_counted or one_shot.fits_counted_buffer(geometry))
        )

    def _one_shot_blocks(
        self,
        request_id: str,
        geometry: RequestGeometry,
        num_tokens: int,
        num_step_tokens: int,
        full_tokens: int,
    ) -> int | None:
        """Blocks for the first chunk of a prompt that may be computed in one shot.

        Args:
            request_id: its row's state says afterwards whether it will be.
            geometry: of the request.
            num_tokens: tokens that need a slot.
            num_step_tokens: tokens computed in this step.
            full_tokens: tokens of the whole request as far as they are known.

        Returns:
            Blocks to allocate, more than there are if the request had better wait for a step
            that has room for all of its prompt; None to give it dense blocks first.
        """
        # Others may want the prompt's blocks from the prefix cache.
        is_shared = self.enable_caching and self.config.one_shot.when == "auto"
        num_free = self.block_pool.get_num_free_blocks()
        if is_shared and geometry.num_row_blocks(full_tokens) <= num_free:
            return None
        if num_step_tokens >= geometry.compact_len:
            self.rows[request_id] = CompressedRow.begin(geometry, is_one_shot=True)
            return geometry.num_row_blocks(num_tokens) - geometry.first_kept_block
        # Alone, a request has the whole step: should it not be enough, waiting would not help.
        is_alone = not any(self.req_to_blocks.values())
        return None if is_alone else self.block_pool.num_gpu_blocks + 1

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Grow the request's row to hold `num_tokens`, its region included."""
        if request_id in self.whole_ids:
            return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        row = self.rows[request_id]
        if row.is_one_shot and not self.req_to_blocks.get(request_id):
            num_absent = self.geometry.of(row.prompt_len).first_kept_block
            self.req_to_blocks[request_id].extend([self._null_block] * num_absent)
        return super().allocate_new_blocks(
            request_id, self._row_tokens(row.prompt_len, num_tokens), num_tokens_main_model
        )

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the prompt blocks that a settled compaction has made needless."""
        if num_prompt_tokens is None or request_id in self.whole_ids:
            return
        geometry = self.geometry.of(num_prompt_tokens)
        row = self.rows.get(request_id)
        if row is None or not self.req_to_blocks.get(request_id):
            # Whatever was thought of it when it found no room.
            row = self.rows[request_id] = CompressedRow.begin(geometry)
        if (
            geometry.is_compressed
            and not row.is_compacted
            and processed_computed_tokens >= geometry.compact_len
        ):
            self.rows[request_id] = row.compacted(geometry.point)
            self._remove_blocks_in_range(request_id, 0, geometry.first_kept_block)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request; also the first half of a preemption."""
        row = self.rows.pop(request_id, None)
        if row is not None:
            self._freed[request_id] = row.prompt_len
            if len(self._freed) > _MOST_FREED:
                self._freed.popitem(last=False)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: KVCompressSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Longest hit that leaves those tokens to be computed whose queries score the rest."""
        geometry = kv_cache_spec.geometry.of(max_length + 1)
        if geometry.is_compressed:
            config = kv_cache_spec.kv_compress
            if needs_all_queries(config):
                max_length = 0
            else:
                # At least two: one whose query is collected is never alone (see scheduler.py).
                max_length = geometry.compact_len - max(config.window, 2)
        return super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            dcp_world_size,
            pcp_world_size,
        )


def needs_all_queries(config: KVCompressConfig) -> bool:
    """Whether every query of a prompt has a say in what is kept."""
    return _scorer_needs_all_queries(config.recipe.scorer)


@functools.cache
def _scorer_needs_all_queries(scorer: str) -> bool:
    return "all_queries" in scorer_class(scorer).needs


def request_geometry(geometry: Geometry, request: Any) -> RequestGeometry:
    """Geometry of one of vLLM's requests.

    A streaming-input session stays whole: its prompt grows, and takes in what was generated.
    """
    return geometry.of_request(request.num_prompt_tokens, request.streaming_queue is not None)


def compressing_manager(coordinator: Any) -> KVCompressManager:
    """The one of a coordinator's block managers that compresses."""
    (manager,) = (m for m in coordinator.single_type_managers if isinstance(m, KVCompressManager))
    return manager


def cache_only_before_compaction(coordinator: Any) -> None:
    """Keep blocks out of the prefix cache that no other request may read, or can.

    K and V of tokens past a compaction point depend on what was evicted, in windowed layers too.
    The blocks that a one-shot prompt has are of no use without those that it never had.
    """
    manager, cache_blocks = compressing_manager(coordinator), coordinator.cache_blocks

    def cache_exact_blocks(request: Any, num_computed_tokens: int) -> None:
        geometry = manager.geometry_of(request)
        if geometry.is_compressed:
            row = manager.rows.get(request.request_id)
            if row is not None and (row.is_one_shot or row.is_compacted):
                # Of a compacted one, all that may be cached is.
                return
            last = geometry.boundary_block * manager.block_size
            num_computed_tokens = min(num_computed_tokens, last)
        cache_blocks(request, num_computed_tokens)

    coordinator.cache_blocks = cache_exact_blocks


def register_spec() -> None:
    """Tell vLLM which manager serves our spec. Idempotent."""
    # Looking a stock spec up makes vLLM register its own first; it skips that when the
    # registry is not empty.
    KVCacheSpecRegistry.get_manager_class(
        # No dtype: only the class counts, and torch is not needed for it.
        FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=None)  # type: ignore[arg-type]
    )
    KVCacheSpecRegistry.register(
        KVCompressSpec,
        manager_class=KVCompressManager,
        uniform_type_base_spec=FullAttentionSpec,
    )


# The scheduler's process first meets the spec when it unpickles one, so importing registers.
register_spec()
