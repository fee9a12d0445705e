"""What a scheduler and a worker know around vLLM's KVCacheManager with our block manager in it.

`State.check` holds the invariants. `block_manager_machine.Machine` adds the operations.
"""

import random
from collections import Counter, deque
from typing import Any

from block_manager_setup import FIRST_UNIQUE_TOKEN, Chunk, Sequence, Setup
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_block_hash, get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_kvcompress.memory import RowState
from vllm_kvcompress.vllm_integration.scheduler.manager import (
    KVCompressManager,
    cache_only_before_compaction,
)
from vllm_kvcompress.vllm_integration.scheduler.scheduler import KVCompressScheduler


class State:
    """A scheduler's and a worker's state around one real KVCacheManager."""

    def __init__(self, setup: Setup, seed: int = 0) -> None:
        init_none_hash(sha256)
        self.setup, self.rng = setup, random.Random(seed)
        self.bs = setup.block_size
        spec = setup.spec()
        self.geometry = spec.geometry
        self.max_request_blocks = self.geometry.max_request_blocks(setup.max_model_len)
        self.num_usable_blocks = self.max_request_blocks + setup.num_spare_blocks
        self.kv = KVCacheManager(
            KVCacheConfig(
                num_blocks=self.num_usable_blocks + 1,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
                prefix_cache_retention_interval=setup.retention,
            ),
            max_model_len=setup.max_model_len,
            scheduler_block_size=self.bs,
            hash_block_size=self.bs,
            enable_caching=setup.caching,
            watermark=setup.watermark,
        )
        self.pool = self.kv.block_pool
        (self.manager,) = self.kv.coordinator.single_type_managers
        assert type(self.manager) is KVCompressManager
        cache_only_before_compaction(self.kv.coordinator)
        # Of the scheduler, only what it adds to vLLM's is asked for.
        self.scheduler = object.__new__(KVCompressScheduler)
        self.scheduler.kv_cache_manager, self.scheduler.num_prefill_lookahead = self.kv, 0
        # Whom it lets in, and whom it leaves out, are other matters (test_headroom.py,
        # test_small_steps.py).
        self.scheduler.running, self.scheduler._left_out = [], set()
        self.hasher = get_request_block_hasher(self.bs, sha256) if setup.caching else None
        self.slots: list[list[Any]] = [[None] * self.bs for _ in self.pool.blocks]
        self.content_of_hash: dict[bytes, list[Any]] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.step: list[Chunk] = []
        self.in_flight: deque[tuple[int, list[Chunk]]] = deque()
        self.launched_step = self.settled_step = 0
        self.num_added = self.num_ops = 0
        self.next_unique_token = FIRST_UNIQUE_TOKEN
        self.seen: Counter[str] = Counter()
        self.log: list[str] = []

    # What the tests below read.

    @property
    def num_free(self) -> int:
        return self.pool.get_num_free_blocks()

    def blocks(self, sequence: Sequence) -> list[Any]:
        return self.manager.req_to_blocks[sequence.id]

    def nulls(self, sequence: Sequence) -> list[int]:
        return [i for i, block in enumerate(self.blocks(sequence)) if block.is_null]

    def unique_token(self) -> int:
        self.next_unique_token += 1
        return self.next_unique_token

    def hit(self, prompt: list[int]) -> int:
        """Tokens that a new request with this prompt would find in the prefix cache."""
        return self.kv.get_computed_blocks(self.new_request("probe", prompt, 1))[1]

    def new_request(self, request_id: str, prompt: list[int], max_tokens: int) -> Request:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        return Request(request_id, list(prompt), params, None, block_hasher=self.hasher)

    # The layout, derived here once more so that the geometry is not its own judge.

    def geometry_of(self, sequence: Sequence) -> Any:
        return self.geometry.of(sequence.prompt_len)

    def is_compressed(self, sequence: Sequence) -> bool:
        return self.geometry_of(sequence).num_region_blocks > 0

    def compact_len(self, sequence: Sequence) -> int:
        """Tokens before the compaction point; of a dense prompt, all its tokens."""
        return sequence.prompt_len - (self.setup.suffix if self.is_compressed(sequence) else 0)

    def row_len(self, sequence: Sequence, num_tokens: int) -> int:
        compact_len = self.compact_len(sequence)
        num_region = self.geometry_of(sequence).num_region_blocks
        in_full_prompt_blocks = num_tokens <= compact_len // self.bs * self.bs
        has_region = num_tokens >= compact_len or not in_full_prompt_blocks
        return -(-num_tokens // self.bs) + (num_region if has_region else 0)

    def block_at(self, sequence: Sequence, position: int) -> int:
        index, boundary = position // self.bs, self.compact_len(sequence) // self.bs
        if index >= boundary:
            index += self.geometry_of(sequence).num_region_blocks
        return sequence.row[index]

    def region(self, sequence: Sequence) -> list[int]:
        first = self.compact_len(sequence) // self.bs
        return sequence.row[first : first + self.geometry_of(sequence).num_region_blocks]

    def region_content(self, sequence: Sequence, index: int) -> list[Any]:
        attempt = sequence.request.num_preemptions
        return [("region", sequence.id, attempt, index, slot) for slot in range(self.bs)]

    def first_dense_block(self, sequence: Sequence) -> int:
        """Row entries before this one hold no block."""
        is_freed = sequence.is_compacted or sequence.is_one_shot
        return self.geometry_of(sequence).first_kept_block if is_freed else 0

    # Invariants.

    def done(self, what: str) -> None:
        self.num_ops += 1
        self.log.append(what)
        self.check()

    def check(self) -> None:
        """Everything that must hold after every operation."""
        rows = self.manager.req_to_blocks
        assert set(rows) == {sequence.id for sequence in self.running}
        assert set(self.manager.num_cached_block) <= set(rows)
        live = set(rows) | {sequence.id for sequence in self.waiting}
        assert set(rows) <= set(self.manager.rows) <= live
        self.check_pool(rows)
        for sequence in self.running:
            self.check_row(sequence)
            self.check_prompt_blocks(sequence)
            if sequence.has_region:
                for index, block_id in enumerate(self.region(sequence)):
                    expected = self.region_content(sequence, index)
                    assert self.slots[block_id] == expected, f"region of {sequence.id}"
        for block in self.pool.blocks:
            if block.block_hash is not None:
                cached = self.content_of_hash[get_block_hash(block.block_hash)]
                assert self.slots[block.block_id] == cached, (
                    f"block {block.block_id} does not hold what its hash says"
                )

    def check_pool(self, rows: dict[str, list[Any]]) -> None:
        owners: Counter[int] = Counter()
        for request_id, row in rows.items():
            ids = [block.block_id for block in row if not block.is_null]
            assert len(ids) == len(set(ids)), f"{request_id} holds a block twice: {ids}"
            assert len(ids) <= self.max_request_blocks
            owners.update(ids)
        for block in self.pool.blocks[1:]:
            num_owners = owners[block.block_id]
            assert block.ref_cnt == num_owners, f"{block} has {num_owners} owners"
            if num_owners > 1:
                assert block.block_hash is not None, f"{block} has {num_owners} owners"
                self.seen["shared block"] += 1
        free = [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]
        assert len(free) == len(set(free)) == self.num_free
        assert not set(free) & set(owners)
        assert self.num_free + len(owners) == self.num_usable_blocks

    def check_row(self, sequence: Sequence) -> None:
        request, row = sequence.request, self.blocks(sequence)
        assert len(row) == len(sequence.row) == self.row_len(sequence, sequence.num_slots)
        num_null = self.first_dense_block(sequence)
        state = self.manager.rows[sequence.id]
        assert state.prompt_len == sequence.prompt_len
        assert state.is_compacted == sequence.is_compacted
        assert state.is_one_shot == (sequence.is_one_shot and not sequence.is_compacted)
        assert (state.state is RowState.WHOLE) == (not self.is_compressed(sequence))
        assert [block.is_null for block in row] == [i < num_null for i in range(len(row))]
        assert [b.block_id for b in row[num_null:]] == sequence.row[num_null:]
        # Blocks that may be offered to other requests, and those that must be.
        num_cacheable = len(request.block_hashes)
        compact_len = self.compact_len(sequence)
        if self.is_compressed(sequence):
            num_cacheable = min(num_cacheable, compact_len // self.bs)
        num_cached = min(compact_len, sequence.num_slots) // self.bs
        if sequence.is_one_shot:
            num_cacheable = num_cached = 0
        for i, block in enumerate(row[num_null:], start=num_null):
            if block.block_hash is not None:
                assert i < num_cacheable, f"block {i} of {sequence.id} is in the prefix cache"
                assert get_block_hash(block.block_hash) == request.block_hashes[i]
            else:
                assert i >= num_cached or not self.setup.caching, f"block {i} is not cached"

    def check_prompt_blocks(self, sequence: Sequence) -> None:
        """Every slot that the sequence still has holds what it must read there."""
        for start in range(self.first_dense_block(sequence) * self.bs, sequence.num_slots, self.bs):
            expected = sequence.labels[start : min(start + self.bs, sequence.num_slots)]
            block_id = self.block_at(sequence, start)
            assert self.slots[block_id][: len(expected)] == expected, (
                f"block {block_id}, position {start} of {sequence.id}, was overwritten"
            )

    def check_hit(self, sequence: Sequence, hit: int, blocks: list[Any]) -> None:
        """A hit is the longest cached run that may be used, found here by looking at blocks."""
        request = sequence.request
        assert hit == len(blocks) * self.bs
        cached = {
            get_block_hash(block.block_hash)
            for block in self.pool.blocks
            if block.block_hash is not None
        }
        run = 0
        while run < len(request.block_hashes) and request.block_hashes[run] in cached:
            run += 1
        most = request.num_tokens - 1
        if self.is_compressed(sequence):
            # The queries that score the rest have to be computed.
            most = self.compact_len(sequence) - self.setup.window
            if self.setup.needs_all_queries:
                most = 0
                self.seen["hit that may not be used"] += run > 0
            assert hit <= most
        if not request.num_output_tokens and not request.skip_reading_prefix_cache:
            assert hit == min(run, most // self.bs) * self.bs
        assert hit <= min(run * self.bs, request.num_tokens - 1)

    def check_empty(self) -> None:
        """Nothing is left of any request."""
        assert not self.running and not self.waiting and not self.in_flight
        assert self.num_free == self.num_usable_blocks
        manager = self.manager
        assert not manager.req_to_blocks
        assert not manager.num_cached_block
        assert not manager.rows
