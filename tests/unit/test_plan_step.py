"""The plan of a step for all rows at once, against a plain one row by row."""

from __future__ import annotations

import numpy as np
import pytest
from plan_reference import PlainPlan, PlainRequests, Row

from vllm_kvcompress.compaction.requests import NO_OFFSETS, OFFSETS_ROW, Requests
from vllm_kvcompress.compaction.step_plan import StepPlan, plan_step, prompt_runs
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import Geometry

WINDOW = 8
NUM_LAYERS = 2


def config_of(suffix=0):
    options = (("suffix_tokens", suffix),)
    return KVCompressConfig("snapkv", budget=48, window=WINDOW, options=options)


def plan_rows(requests, rows, num_padded=0, collect_all=False, shows_single=False) -> StepPlan:
    requests.expect(one_shot_ids={row.request_id for row in rows if row.is_one_shot})
    counts = np.array([row.count for row in rows] + [0] * num_padded, np.int32)
    after = [row.num_computed + row.count for row in rows] + [0] * num_padded
    return plan_step(
        requests,
        WINDOW,
        [row.request_id for row in rows],
        np.array([row.prompt_len for row in rows], np.int32),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        np.array(after, np.int32),
        collect_all=collect_all,
        shows_single=shows_single,
    )


def plain(requests: Requests, plan: StepPlan) -> PlainPlan:
    """The same in plain lists; every chunk has its own request."""
    for chunk in plan.chunks:
        length = chunk.request.geometry.prompt_len
        assert chunk.request is requests.get_or_create(chunk.request_id, length)
    return PlainPlan(
        numbers=[tuple(column) for column in plan.numbers.T.tolist()],
        is_compacted=plan.is_compacted.tolist(),
        num_single=plan.num_single,
        has_regions=plan.has_regions,
        extended=[(r.row, r.token_start, r.query_len, r.seq_len) for r in plan.extended],
        cut=plan.cut,
        one_shot=plan.one_shot,
        chunks=[
            (c.request_id, c.row, c.token_start, c.token_end, c.first, c.finishes, c.is_one_shot)
            for c in plan.chunks
        ],
        finished_whole=plan.finished_whole,
        runs=prompt_runs(plan),
    )


class Server:
    """Makes steps at random: prompts in chunks or whole, decoding, preemption, names used again."""

    def __init__(self, seed: int, max_num_reqs: int, geometry: Geometry) -> None:
        self.geometry = geometry
        self.random = np.random.default_rng(seed)
        self.max_num_reqs = max_num_reqs
        # How often a row is what the scheduler should not have made of it.
        self.bad = 0.2 / max_num_reqs
        # By id, (prompt length, tokens computed, tokens at its end).
        self.running: dict[str, list[int]] = {}

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def arrive(self) -> None:
        if len(self.running) == self.max_num_reqs:
            return
        # Some names come back, with a prompt of the same length or another.
        name = f"r{self.random.integers(2 * self.max_num_reqs)}"
        if name in self.running:
            return
        prompt_len = int(self.random.choice([20, 49, 64, 90, 97, 111, 160, 161]))
        self.running[name] = [prompt_len, 0, prompt_len + int(self.random.integers(1, 40))]

    def leave(self) -> list[str]:
        """Ids of requests that have finished or are preempted; most of them are told."""
        gone = [n for n, (_, done, end) in self.running.items() if done >= end]
        gone += [n for n in self.running if n not in gone and self.chance(0.01)]
        for name in gone:
            prompt_len, done, end = self.running.pop(name)
            if done < end:
                # It comes back at once, with what it had generated; or as if it had not left.
                self.running[name] = [prompt_len, done * self.chance(0.05), end]
        return gone

    def rows(self) -> list[Row]:
        rows = [self.row(name) for name in self.running if self.chance(0.9)]
        order = self.random.permutation(len(rows))
        rows = [rows[i] for i in order]
        # As vLLM has them, unless it does not.
        return rows if self.chance(0.1) else sorted(rows, key=lambda row: row.count)

    def row(self, name: str) -> Row:
        prompt_len, done, end = self.running[name]
        geometry = self.geometry.of(prompt_len)
        missing = max(prompt_len, end - 5) - done
        if done >= prompt_len and self.chance(0.95):
            return Row(name, prompt_len, done, 1)
        if geometry.is_compressed and not done and self.chance(0.3):
            count = geometry.compact_len - self.chance(self.bad)
            return Row(name, prompt_len, 0, count, is_one_shot=True)
        # Up to the compaction point, where the scheduler ends a chunk, or past it.
        limit = geometry.compact_len - done if done < geometry.compact_len else max(missing, 1)
        count = int(self.random.integers(1 if self.chance(self.bad) else min(2, limit), limit + 1))
        if self.chance(self.bad):
            count += 3
        return Row(name, prompt_len, done, count)


@pytest.mark.parametrize("suffix", [0, 5])
@pytest.mark.parametrize("collect_all", [False, True])
@pytest.mark.parametrize("max_num_reqs", [3, 24])
@pytest.mark.parametrize("shows_single", [False, True])
def test_random_steps_are_planned_as_row_by_row(shows_single, max_num_reqs, collect_all, suffix):
    geometry = config_of(suffix).geometry(16)
    server = Server(max_num_reqs + suffix, max_num_reqs, geometry)
    ours = Requests(geometry, NUM_LAYERS, max_num_reqs)
    theirs = PlainRequests(geometry, max_num_reqs)
    kinds, errors, num_planned = set(), set(), 0
    num_steps = 24_000 // max_num_reqs
    for _ in range(num_steps):
        for name in server.leave():
            ours.forget(name)
            theirs.forget(name)
        for _ in range(int(server.random.integers(4))):
            server.arrive()
        rows, num_padded = server.rows(), int(server.random.integers(3))
        try:
            want = theirs.plan(rows, WINDOW, num_padded, collect_all, shows_single)
        except RuntimeError as error:
            errors.add(" ".join(str(error).split()[2:5]))
            with pytest.raises(RuntimeError) as raised:
                plan_rows(ours, rows, num_padded, collect_all, shows_single)
            assert str(raised.value) == str(error)
            # Which of the rows behind have been seen is not said.
            for row in rows:
                ours.forget(row.request_id)
                theirs.forget(row.request_id)
                server.running[row.request_id][1] = 0
            continue
        found = plan_rows(ours, rows, num_padded, collect_all, shows_single)
        assert plain(ours, found) == want
        num_planned += 1
        kinds |= {name for name, value in vars(want).items() if value}
        for chunk in found.chunks:
            if chunk.finishes:
                ours.mark_compacted(chunk.request)
                theirs.compact(chunk.request_id)
        for row in rows:
            server.running[row.request_id][1] += row.count
        assert len(ours) == len(theirs.known)
    # Places are used again.
    assert ours._fields.shape[1] == max_num_reqs
    # Everything that there is has been met, errors included, and most steps have none.
    assert kinds == set(vars(PlainPlan()))
    singles = set() if shows_single else {"computes a single"}
    assert errors == {"has no blocks", "goes on at"} | singles
    assert num_planned > num_steps / 2


def test_requests_that_only_decode_are_looked_at_together(monkeypatch):
    requests = Requests(config_of().geometry(16), NUM_LAYERS, 6)
    rows = [Row(f"r{i}", 160 if i % 3 else 20, 170 + i, 1) for i in range(6)]
    for row in rows:
        if requests.geometry.of(row.prompt_len).is_compressed:
            requests.mark_compacted(requests.get_or_create(row.request_id, row.prompt_len))
    prompts = [Row("new", 160, 0, 30), Row("whole", 20, 0, 20)]
    plan_rows(requests, rows)
    seen = []
    monkeypatch.setattr(requests, "get_or_create", lambda name, length: seen.append(name))
    monkeypatch.setattr(requests.geometry, "of", lambda length: seen.append(length))
    assert plan_rows(requests, rows).has_regions
    assert seen == []
    monkeypatch.undo()
    monkeypatch.setattr(
        type(requests),
        "get_or_create",
        lambda self, name, length: seen.append(name) or self._requests[self._places[name]],
    )
    plan_rows(requests, [*rows, *prompts])
    assert seen == ["new"]


def test_a_name_with_another_prompt_is_another_request():
    requests = Requests(config_of().geometry(16), NUM_LAYERS, 2)
    (chunk,) = plan_rows(requests, [Row("a", 160, 0, 160)]).chunks
    row = requests.mark_compacted(chunk.request)
    assert plan_rows(requests, [Row("a", 160, 160, 1)]).numbers[OFFSETS_ROW, 0] == row
    # The same length, though nobody has told that the first has left: it is taken for it.
    with pytest.raises(RuntimeError, match="at 161 of 161 tokens but was never compacted here"):
        plan_rows(requests, [Row("a", 161, 161, 1)])
    # Its row has been given back.
    assert requests.mark_compacted(requests.get_or_create("b", 160)) == row
    plan = plan_rows(requests, [Row("a", 20, 20, 1)])
    assert plan.numbers[:, 0].tolist() == [0, 0, 0, 0, NO_OFFSETS]
    assert not plan.has_regions
    requests.forget("a")
    requests.forget("b")
    assert len(requests) == 0


def test_more_requests_may_be_known_than_run_at_once():
    requests = Requests(config_of().geometry(16), NUM_LAYERS, 1)
    plan_rows(requests, [Row("a", 160, 0, 160)])
    requests.mark_compacted(requests.get_or_create("a", 160))
    for i in range(9):
        plan_rows(requests, [Row(f"waits {i}", 97, 0, 20)])
    assert plan_rows(requests, [Row("a", 160, 160, 1)]).numbers[:, 0].tolist() == [2, 10, 10, 9, 1]
    assert len(requests) == 10


def test_rows_for_the_stock_backend_leave_compressed_ones_out():
    requests = Requests(config_of().geometry(16), NUM_LAYERS, 8)
    for name in ("a", "b"):
        requests.mark_compacted(requests.get_or_create(name, 160))
    rows = [
        Row("decodes", 20, 30, 1),
        Row("a", 160, 160, 4),
        Row("new", 160, 0, 20),
        Row("short", 20, 0, 20),
        Row("b", 160, 160, 5),
        Row("staged", 97, 0, 97, is_one_shot=True),
        Row("last", 97, 0, 30),
    ]
    plan = plan_rows(requests, rows)
    assert prompt_runs(plan) == [(2, 4, False), (5, 6, True), (6, 7, False)]
    # Padding alone is no run, whatever is before it.
    assert prompt_runs(plan_rows(requests, rows[:2], num_padded=2)) == []
    assert prompt_runs(plan_rows(requests, rows[:3], num_padded=2)) == [(2, 5, False)]
