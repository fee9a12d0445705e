"""A scheduler and a worker around vLLM's KVCacheManager with our block manager in it.

`Machine` plays vLLM's scheduler (v1/core/sched/scheduler.py, FCFS) and a worker that records
what is in every slot; where a chunk ends is asked of our own scheduler.
`State.check` holds the invariants and runs after every operation.
A failing random run prints its setup, seed and the log of operations.
"""

from typing import Any

from block_manager_setup import Chunk, Sequence, family_token
from block_manager_state import State
from vllm.v1.core.kv_cache_utils import get_block_hash
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.request import RequestStatus


class Machine(State):
    """Scheduler and worker, as operations on their state."""

    def add(self, prompt: list[int], max_tokens: int = 1000, family: int | None = None) -> Sequence:
        request = self.new_request(f"r{self.num_added}", prompt, max_tokens)
        self.num_added += 1
        sequence = Sequence(request, family, list(prompt))
        self.relabel(sequence)
        self.waiting.append(sequence)
        self.done(f"add {sequence.id} prompt {len(prompt)} max_tokens {max_tokens}")
        return sequence

    def relabel(self, sequence: Sequence) -> None:
        """Label slots: K and V of exact attention are named by all tokens up to theirs.

        Tokens after a compaction depend on what was evicted, so nobody else may read theirs;
        the label names the request and how often it had been preempted.
        """
        exact, tokens = sequence.exact_labels, sequence.tokens
        del exact[len(tokens) :]
        while len(exact) < len(tokens):
            exact.append(hash((exact[-1] if exact else 0, tokens[len(exact)])))
        sequence.labels = list(exact)
        if self.is_compressed(sequence):
            attempt = sequence.request.num_preemptions
            for position in range(self.compact_len(sequence), len(tokens)):
                sequence.labels[position] = ("lossy", sequence.id, attempt, position)
        for i, block_hash in enumerate(sequence.request.block_hashes):
            self.content_of_hash[block_hash] = exact[i * self.bs : (i + 1) * self.bs]

    def end_of_chunk(self, sequence: Sequence, start: int, num_new: int) -> int:
        """`num_new`, fewer if our scheduler ends the chunk elsewhere, or 0 to wait."""
        allowed = self.scheduler._reserve_prefill_lookahead(sequence.request, start, num_new)
        missing = self.compact_len(sequence) - start
        self.seen["chunk cut at the compaction point"] += allowed == missing < num_new
        self.seen["chunk too short to begin"] += allowed == 0
        if self.is_compressed(sequence) and missing > 0:
            # Queries of the window are collected, and none of them from a chunk of one token.
            assert missing - allowed != 1
            assert allowed != 1 or missing > self.geometry.retention.window
            self.seen["chunk of one token before the window"] += allowed == 1
        return allowed

    def admit(self, sequence: Sequence, pick: Any) -> bool:
        """Schedule a waiting request; `pick(hit)` is the size of its first chunk."""
        request, setup = sequence.request, self.setup
        assert list(request.all_token_ids) == sequence.tokens
        blocks, hit, request.shared_prefix_boundary = self.kv.get_computed_blocks(request)
        self.check_hit(sequence, hit, blocks.blocks[0])
        num_new = self.end_of_chunk(sequence, hit, pick(hit))
        if num_new == 0:
            self.done(f"admit {sequence.id}: waits for a longer chunk")
            return False
        free = self.num_free
        others = any(self.manager.req_to_blocks.values())
        num_evictable = sum(block.ref_cnt == 0 for block in blocks.blocks[0])
        headroom = self.kv.watermark_blocks if self.running else 0
        base = headroom + num_evictable - hit // self.bs
        chunk_need = base + self.row_len(sequence, hit + num_new)
        full_need = base + self.row_len(sequence, request.num_tokens)
        way = self._way_in(sequence, hit, num_new, others)
        if self._may_be_one_shot(sequence, hit):
            full_need -= self.geometry_of(sequence).first_kept_block
        if way == "one shot":
            chunk_need -= self.geometry_of(sequence).first_kept_block
        new = self.kv.allocate_slots(
            request,
            num_new,
            num_new_computed_tokens=hit,
            new_computed_blocks=blocks,
            full_sequence_must_fit=setup.full_sequence_must_fit,
            has_scheduled_reqs=bool(self.running),
        )
        # Otherwise vLLM does not tell the manager where the prompt ends.
        gate_is_known = setup.retention == 0
        what = f"admit {sequence.id} hit {hit} new {num_new} of {request.num_tokens}"
        self.seen[f"one-shot request: {way}"] += self._may_be_one_shot(sequence, hit)
        if new is None:
            assert others, f"{sequence.id} refused although the pool is empty otherwise"
            if gate_is_known and not request.num_output_tokens and way != "later":
                need = full_need if setup.full_sequence_must_fit else chunk_need
                assert need > free, f"refused {need} blocks with {free} free"
            assert sequence.id not in self.manager.req_to_blocks
            self.seen["refused"] += 1
            self.done(what + ": refused")
            return False
        if gate_is_known and setup.full_sequence_must_fit and not request.num_output_tokens:
            assert full_need <= free, f"admitted {full_need} blocks with {free} free"
        assert way != "later", f"admitted to a step without room for {sequence.id}"
        assert chunk_need <= free
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.row = self.kv.get_block_ids(sequence.id)[0]
        sequence.is_one_shot = way == "one shot"
        self.seen["resumed in one shot"] += sequence.is_one_shot and request.num_preemptions > 0
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = hit
        self.seen["hit"] += hit > 0
        self._write(sequence, hit, hit + num_new)
        self.done(what)
        return True

    def _may_be_one_shot(self, sequence: Sequence, hit: int) -> bool:
        is_short = self.compact_len(sequence) <= self.setup.one_shot_tokens
        is_allowed = self.setup.one_shot != "never" and is_short and hit == 0
        return self.is_compressed(sequence) and is_allowed

    def _way_in(self, sequence: Sequence, hit: int, num_new: int, others: bool) -> str:
        """How a request gets its first blocks: "dense", "one shot", or "later"."""
        if not self._may_be_one_shot(sequence, hit):
            return "dense"
        request = sequence.request
        whole = max(num_new, request.num_prompt_tokens, request.num_tokens - 1)
        has_room = self.row_len(sequence, whole) <= self.num_free
        if self.setup.caching and self.setup.one_shot == "auto" and has_room:
            return "dense"
        if num_new >= self.compact_len(sequence):
            return "one shot"
        return "later" if others else "dense"

    def advance(self, sequence: Sequence, num_new: int) -> bool:
        """Schedule the next chunk or decode step of a running request."""
        request = sequence.request
        start = request.num_computed_tokens
        num_new = self.end_of_chunk(sequence, start, num_new)
        if num_new == 0:
            self.done(f"advance {sequence.id}: waits for a longer chunk")
            return False
        settled = sequence.finish_step is not None and sequence.finish_step <= self.settled_step
        compacts = settled and not sequence.is_compacted and self.is_compressed(sequence)
        returned = self.blocks(sequence)[: self.geometry_of(sequence).first_kept_block]
        hashes = [block.block_hash for block in returned]
        is_early = self.is_compressed(sequence) and sequence.finish_step is not None
        is_early = is_early and not settled
        self.seen["scheduled before the compaction settled"] += is_early
        self.seen["suffix before the compaction settled"] += (
            is_early and start < sequence.prompt_len
        )
        new = self.kv.allocate_slots(request, num_new)
        if compacts and (request.num_stale_output_tokens == 0 or self.blocks(sequence)[0].is_null):
            sequence.is_compacted = True
            self.seen["compacted"] += 1
            taken = set() if new is None else set(new.get_block_ids()[0])
            for block, block_hash in zip(returned, hashes, strict=True):
                if block.block_id not in taken:
                    assert block.block_hash == block_hash, f"block {block.block_id} lost its hash"
        what = f"advance {sequence.id} from {start} by {num_new}"
        if new is None:
            rows = self.manager.req_to_blocks
            assert any(rows[rid] for rid in rows if rid != sequence.id), (
                f"{sequence.id} refused although it owns every block in use"
            )
            self.seen["refused"] += 1
            self.done(what + ": refused")
            return False
        sequence.row.extend(new.get_block_ids()[0])
        self._write(sequence, start, start + num_new)
        self.done(what)
        return True

    def _write(self, sequence: Sequence, start: int, end: int) -> None:
        """What the worker writes for tokens [start, end), in the step now being scheduled."""
        compact_len = self.compact_len(sequence)
        boundary = compact_len // self.bs * self.bs
        sequence.num_slots = end
        self.step.append(Chunk(sequence, start, end))
        # What a one-shot prompt evicts is never written anywhere.
        for position in range(max(start, self.first_dense_block(sequence) * self.bs), end):
            block = self.pool.blocks[self.block_at(sequence, position)]
            label = sequence.labels[position]
            assert not block.is_null, f"position {position} of {sequence.id} is in the null block"
            assert block.ref_cnt == 1, f"write to shared block {block.block_id}"
            if block.block_hash is not None:
                cached = self.content_of_hash[get_block_hash(block.block_hash)]
                assert cached[position % self.bs] == label, f"block {block.block_id} is cached"
            self.slots[block.block_id][position % self.bs] = label
        if not self.is_compressed(sequence):
            return
        assert not start < compact_len < end, f"[{start}, {end}) crosses {compact_len}"
        if start < compact_len:
            self.seen["chunk ends in the last partial block"] += boundary < end < compact_len
            self.seen["last chunk below the window"] += (
                end >= compact_len and compact_len - start < self.setup.window
            )
            self.seen["prompt of whole blocks"] += end >= compact_len == boundary
        elif start < sequence.prompt_len:
            self.seen["suffix in several chunks"] += end < sequence.prompt_len

    def launch(self) -> None:
        """Close the step: compact, sample, count the step's tokens as in flight."""
        self.launched_step += 1
        for chunk in self.step:
            sequence, request = chunk.sequence, chunk.sequence.request
            if chunk.start < self.compact_len(sequence) <= chunk.end:
                sequence.finish_step = self.launched_step
                if self.is_compressed(sequence):
                    self._compact(sequence)
            request.num_computed_tokens += chunk.end - chunk.start
            request.num_in_flight_tokens += chunk.end - chunk.start
            if chunk.end == len(sequence.tokens):
                chunk.sampled = self._sample(sequence)
                sequence.tokens.append(chunk.sampled)
                self.relabel(sequence)
                if self.setup.depth:
                    request.num_output_placeholders += 1
        self.in_flight.append((self.launched_step, self.step))
        ids = [chunk.sequence.id for chunk in self.step]
        self.step = []
        self.done(f"launch step {self.launched_step} with {ids}")

    def _compact(self, sequence: Sequence) -> None:
        self.check_prompt_blocks(sequence)
        for index, block_id in enumerate(self.region(sequence)):
            block = self.pool.blocks[block_id]
            assert block.ref_cnt == 1 and block.block_hash is None and not block.is_null
            self.slots[block_id] = self.region_content(sequence, index)
        sequence.has_region = True

    def _sample(self, sequence: Sequence) -> int:
        # Mostly what a longer prompt of the family says, so that outputs occur in prompts.
        if sequence.family is not None and self.rng.random() < 0.9:
            return family_token(sequence.family, len(sequence.tokens))
        sequence.family = None
        return self.unique_token()

    def settle(self) -> None:
        """Process the output of the oldest step in flight, as `update_from_output` does."""
        self.settled_step, chunks = self.in_flight.popleft()
        for chunk in chunks:
            sequence, request = chunk.sequence, chunk.sequence.request
            num_tokens = chunk.end - chunk.start
            request.num_in_flight_tokens -= num_tokens
            is_stale = request.num_stale_output_tokens > 0
            if is_stale:
                request.num_stale_output_tokens -= num_tokens
                assert request.num_stale_output_tokens >= 0
            is_dropped = is_stale and request.drop_stale_output
            if request.is_finished() or is_dropped or chunk.sampled is None:
                continue
            was_running = request.status == RequestStatus.RUNNING
            request.append_output_token_ids(chunk.sampled)
            self.relabel(sequence)
            is_stopped = check_stop(request, self.setup.max_model_len)
            if self.setup.depth:
                if not is_stale:
                    request.num_output_placeholders -= 1
                if was_running:
                    known = request.num_computed_tokens - request.num_output_placeholders
                    self.kv.cache_blocks(request, known)
            if is_stopped:
                self._drop(sequence)
                self.seen["finished"] += 1
        self.done(f"settle step {self.settled_step}")

    def _drop(self, sequence: Sequence) -> None:
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.kv.free(sequence.request)

    def _phase(self, sequence: Sequence) -> str:
        computed = sequence.request.num_computed_tokens
        if computed < self.compact_len(sequence):
            return "prefill"
        return "suffix" if computed < sequence.prompt_len else "decode"

    def abort(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.seen[f"aborted mid {self._phase(sequence)}"] += 1
        sequence.request.status = RequestStatus.FINISHED_ABORTED
        self._drop(sequence)
        self.done(f"abort {sequence.id}")

    def preempt(self, sequence: Sequence, drop_stale: bool = False) -> None:
        """Free and start over, as `_preempt_request` does."""
        request = sequence.request
        if self.is_compressed(sequence):
            self.seen[f"preempted mid {self._phase(sequence)}"] += 1
        self.running.remove(sequence)
        self.scheduler._forgo_prefix_cache(request)
        self.kv.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.drop_stale_output = drop_stale or (
            request.drop_stale_output and request.num_stale_output_tokens > 0
        )
        request.num_stale_output_tokens = request.num_in_flight_tokens
        request.num_output_placeholders = 0
        request.num_preemptions += 1
        if request.drop_stale_output:
            sequence.tokens = list(request.all_token_ids)
        sequence.row, sequence.num_slots = [], 0
        sequence.finish_step, sequence.is_compacted, sequence.has_region = None, False, False
        sequence.is_one_shot = False
        self.relabel(sequence)
        self.waiting.insert(0, sequence)
        self.done(f"preempt {sequence.id}{' and drop its output' if drop_stale else ''}")

    def reset_prefix_cache(self) -> None:
        while self.running:
            self.preempt(self.running[-1], drop_stale=True)
        assert self.kv.reset_prefix_cache()
        assert not any(block.block_hash for block in self.pool.blocks)
        self.seen["reset"] += 1
        self.done("reset the prefix cache")

    def run(self, *chunks: tuple[Sequence, int]) -> None:
        """One step of the given (sequence, tokens) chunks, launched and not yet settled."""
        for sequence, num_new in chunks:
            if sequence in self.running:
                assert self.advance(sequence, num_new)
            else:
                assert self.admit(sequence, lambda _, num_new=num_new: num_new)
        self.launch()

    def run_and_settle(self, *chunks: tuple[Sequence, int]) -> None:
        self.run(*chunks)
        while self.in_flight:
            self.settle()
