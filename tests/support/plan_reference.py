"""A step's plan row by row, in plain Python: the judge of `plan_step`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_kvcompress.memory import Geometry, RequestGeometry, cdiv


@dataclass(frozen=True)
class Row:
    """A request's part of a step.

    Attributes:
        request_id: any name.
        prompt_len: tokens in its prompt.
        num_computed: tokens before this step.
        count: tokens of this step.
        is_one_shot: whether its prompt has no blocks for what it evicts.
    """

    request_id: str
    prompt_len: int
    num_computed: int
    count: int
    is_one_shot: bool = False


@dataclass
class PlainPlan:
    """As `StepPlan`, in lists; a chunk is a tuple of its attributes, its request being an id."""

    numbers: list[tuple[int, ...]] = field(default_factory=list)
    is_compacted: list[bool] = field(default_factory=list)
    num_single: int = 0
    has_regions: bool = False
    extended: list[tuple[int, int, int, int]] = field(default_factory=list)
    cut: list[tuple[int, int, RequestGeometry]] = field(default_factory=list)
    one_shot: dict[int, slice] = field(default_factory=dict)
    chunks: list[tuple] = field(default_factory=list)
    finished_whole: list[tuple[str, int]] = field(default_factory=list)
    runs: list[tuple[int, int, bool]] = field(default_factory=list)


class PlainRequests:
    """Requests that have been seen: prompt length, and slot (0 before compaction)."""

    def __init__(self, geometry: Geometry, num_slots: int) -> None:
        self.geometry = geometry
        self.known: dict[str, tuple[int, int]] = {}
        self.free_slots = list(range(num_slots, 0, -1))

    def see(self, request_id: str, prompt_len: int) -> int:
        """The slot of a request; another prompt length makes it another request."""
        if self.known.get(request_id, (prompt_len, 0))[0] != prompt_len:
            self.forget(request_id)
        return self.known.setdefault(request_id, (prompt_len, 0))[1]

    def compact(self, request_id: str) -> None:
        """Give a request a slot, if it has none."""
        prompt_len, slot = self.known[request_id]
        self.known[request_id] = prompt_len, slot or self.free_slots.pop()

    def forget(self, request_id: str) -> None:
        """Drop a request."""
        _, slot = self.known.pop(request_id, (0, 0))
        if slot:
            self.free_slots.append(slot)

    def plan(
        self,
        rows: list[Row],
        window: int,
        num_padded: int = 0,
        collect_all: bool = False,
        shows_single: bool = False,
    ) -> PlainPlan:
        """What `plan_step` should say of a step; raises what it should raise."""
        plan = PlainPlan()
        counts = [row.count for row in rows] + [0] * num_padded
        while plan.num_single < len(counts) and counts[plan.num_single] <= 1:
            plan.num_single += 1
        start = 0
        for number, row in enumerate(rows):
            plan.numbers.append((0,) * 5)
            plan.is_compacted.append(False)
            self._plan_row(plan, number, row, start, window, collect_all, shows_single)
            start += row.count
        plan.numbers += [(0,) * 5] * num_padded
        plan.is_compacted += [False] * num_padded
        plan.runs = self._runs(plan, counts)
        return plan

    def _plan_row(
        self,
        plan: PlainPlan,
        number: int,
        row: Row,
        start: int,
        window: int,
        collect_all: bool,
        shows_single: bool,
    ) -> None:
        geometry = self.geometry.of(row.prompt_len)
        slot = self.see(row.request_id, row.prompt_len)
        before, after = row.num_computed, row.num_computed + row.count
        compact_len = geometry.compact_len
        if not geometry.is_compressed:
            if before < compact_len <= after:
                plan.finished_whole.append((row.request_id, row.prompt_len))
            return
        is_single = number < plan.num_single
        if before >= compact_len and slot == 0:
            raise RuntimeError(
                f"request {row.request_id} goes on at {before} of {compact_len} tokens "
                "but was never compacted here"
            )
        if geometry.num_row_blocks(after) > cdiv(after, geometry.block_size):
            plan.has_regions = True
            first_kept = geometry.first_kept_block if before >= compact_len else 0
            plan.numbers[number] = (
                geometry.num_region_blocks,
                geometry.boundary_block,
                geometry.boundary_block,
                first_kept,
                slot,
            )
            if before < compact_len and not row.is_one_shot:
                plan.cut.append((number, after, geometry))
        if before >= compact_len:
            plan.is_compacted[number] = True
            if not is_single:
                plan.extended.append((number, start, row.count, after))
            return
        if row.is_one_shot:
            if before != 0 or after != compact_len:
                raise RuntimeError(
                    f"request {row.request_id} has no blocks for what it evicts, but computes "
                    f"tokens {before} to {after} of {compact_len}"
                )
            plan.one_shot[number] = slice(start, start + geometry.num_candidate_tokens)
        wanted = range(0 if collect_all else compact_len - window, compact_len)
        collected = [position for position in range(before, after) if position in wanted]
        if not collected:
            return
        if is_single and not shows_single:
            raise RuntimeError(
                f"request {row.request_id} computes a single token of its scoring window, token "
                f"{before} of {compact_len}; the scheduler should not have cut it so"
            )
        first, last = collected[0], collected[-1]
        plan.chunks.append(
            (
                row.request_id,
                number,
                start + first - before,
                start + last + 1 - before,
                first,
                after >= compact_len,
                row.is_one_shot,
            )
        )

    @staticmethod
    def _runs(plan: PlainPlan, counts: list[int]) -> list[tuple[int, int, bool]]:
        """Rows behind the single ones in groups, without compressed ones."""
        kinds = []
        for number in range(len(counts)):
            is_extended = any(row[0] == number for row in plan.extended)
            is_ours = number < plan.num_single or is_extended
            kinds.append(None if is_ours else number in plan.one_shot)
        runs, number = [], 0
        while number < len(kinds):
            end = number + 1
            while end < len(kinds) and kinds[end] == kinds[number]:
                end += 1
            if kinds[number] is not None and sum(counts[number:end]) > 0:
                runs.append((number, end, bool(kinds[number])))
            number = end
        return runs
