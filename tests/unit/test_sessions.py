"""Streaming-input sessions, whose prompt grows, in vLLM's scheduler with our block manager."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from scheduler_rig import BLOCK_SIZE, make_requests, make_scheduler, run
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.compaction.requests import Requests
from vllm_kvcompress.compaction.step_plan import plan_step
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.vllm_integration.scheduler.manager import compressing_manager
from vllm_kvcompress.vllm_integration.step_messages import told
from vllm_kvcompress.vllm_integration.worker.metrics import CompressionStats

SETTING = {"method": "snapkv", "ratio": 0.75}
NUM_BLOCKS = 400


def chunk(num_tokens, is_last=False):
    """One part of a session's input, or what says that there is none any more."""
    init_none_hash(sha256)
    return Request(
        "session",
        list(range(100_000, 100_000 + num_tokens)),
        SamplingParams(max_tokens=5, ignore_eos=True),
        None,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
        resumable=not is_last,
    )


def session(*lengths):
    """All of its input, there at once."""
    return [*map(chunk, lengths), chunk(1, is_last=True)]


def schedule_recorded(scheduler):
    """What the scheduler puts out from now on, as a worker of another process gets it."""
    outputs, schedule = [], scheduler.schedule

    def record():
        output = schedule()
        outputs.append(pickle.loads(pickle.dumps(output)))
        return output

    scheduler.schedule = record
    return outputs


def most_used(scheduler):
    """Most blocks that are in use at once, in a list, from now on."""
    pool, schedule, used = scheduler.kv_cache_manager.block_pool, scheduler.schedule, [0]

    def record():
        output = schedule()
        used[0] = max(used[0], NUM_BLOCKS - pool.get_num_free_blocks())
        return output

    scheduler.schedule = record
    return used


def is_empty(scheduler):
    pool = scheduler.kv_cache_manager.block_pool
    return not scheduler.requests and pool.get_num_free_blocks() == NUM_BLOCKS


@pytest.mark.parametrize("lengths", [(600, 50), (20, 50), (600,), (20, 600, 33, 1, 400)])
def test_a_session_takes_the_steps_and_blocks_of_stock_vllm(lengths):
    results = []
    for setting in (None, SETTING):
        scheduler = make_scheduler(setting, NUM_BLOCKS, 4096)
        used = most_used(scheduler)
        results.append((run(scheduler, session(*lengths)).steps, used))
        assert is_empty(scheduler)
    assert results[0] == results[1]
    assert not compressing_manager(scheduler.kv_cache_manager.coordinator).whole_ids


def test_beside_sessions_prompts_are_compressed():
    scheduler = make_scheduler(SETTING, NUM_BLOCKS, 4096)
    coordinator, outputs = scheduler.kv_cache_manager.coordinator, schedule_recorded(scheduler)
    others = make_requests(2, 640, 30)
    rows, schedule = [], scheduler.schedule

    def look():
        output = schedule()
        rows.append([len(coordinator.get_blocks(r.request_id)[0]) for r in others])
        return output

    scheduler.schedule = look
    run(scheduler, [*others, *session(20, 600, 50)])
    # A row has its region, and a session's has not; workers are told of every step's.
    geometry = compressing_manager(coordinator).geometry.of(640)
    assert rows[2] == [geometry.num_row_blocks(643)] * 2 and geometry.is_compressed
    for output in outputs:
        scheduled = set(output.num_scheduled_tokens)
        assert ("session" in told(output).whole_ids) == ("session" in scheduled)
    assert any("session" in output.num_scheduled_tokens for output in outputs)
    assert is_empty(scheduler)


@pytest.mark.parametrize("num_steps", [0, 1, 3, 7, 9])
def test_an_aborted_session_leaves_nothing(num_steps):
    from vllm.v1.outputs import ModelRunnerOutput

    scheduler = make_scheduler(SETTING, NUM_BLOCKS, 4096)
    for request in session(600, 50)[:-1]:
        scheduler.add_request(request)
    for _ in range(num_steps):
        output = scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        places = {name: i for i, name in enumerate(names)}
        scheduler.update_from_output(output, ModelRunnerOutput(names, places, [[7]] * len(names)))
    scheduler.finish_requests("session", RequestStatus.FINISHED_ABORTED)
    assert is_empty(scheduler)
    manager = compressing_manager(scheduler.kv_cache_manager.coordinator)
    assert not manager.whole_ids and not manager.req_to_blocks


@pytest.mark.parametrize("at_step", [2, 4, 10])
def test_a_preempted_session_is_computed_again_as_in_stock_vllm(at_step):
    results = []
    for setting in (None, SETTING):
        scheduler = make_scheduler(setting, NUM_BLOCKS, 4096, max_num_batched_tokens=256)
        schedule, steps = scheduler.schedule, []

        def preempt(schedule=schedule, scheduler=scheduler, steps=steps):
            steps.append(len(steps))
            if len(steps) == at_step:
                assert "session" in {request.request_id for request in scheduler.running}
                scheduler.reset_prefix_cache(reset_running_requests=True)
            return schedule()

        scheduler.schedule = preempt
        results.append(run(scheduler, session(600, 50, 300)))
        assert is_empty(scheduler)
    assert results[0] == results[1]


def test_a_setting_cannot_change_while_a_session_waits():
    scheduler = make_scheduler(SETTING, NUM_BLOCKS, 4096)
    scheduler.add_request(chunk(600))
    manager = compressing_manager(scheduler.kv_cache_manager.coordinator)
    with pytest.raises(RuntimeError, match="1 requests still run"):
        manager.reconfigure(manager.kv_cache_spec.kv_compress)


def test_workers_take_a_sessions_rows_for_whole():
    """On a CPU and on a GPU, from the first part to those that the prompt grows by."""
    geometry = KVCompressConfig.from_dict(SETTING).geometry(BLOCK_SIZE)
    requests = Requests(geometry, 2, 4)
    requests.expect(whole_ids={"session"})
    for prompt_len in (20, 600, 657):
        names, lens = ["session", "other"], np.array([prompt_len, 600], np.int32)
        starts = np.array([0, 7, 14])
        plan = plan_step(requests, 32, names, lens, starts, lens)
        # Of the session no query is collected, and it has no region.
        assert [chunk.request_id for chunk in plan.chunks] == ["other"]
        assert plan.finished_whole == [("session", prompt_len)]
        assert not plan.numbers[:, 0].any()


def test_a_session_counts_once_and_its_prompt_grows():
    stats = CompressionStats(log=False)
    stats.record_whole("session-a74c0dd9", 600)
    stats.record_whole("session-a74c0dd9", 657)
    stats.record_whole("session-a74c0dd9", 657)
    snapshot = stats.snapshot()
    (record,), totals = snapshot["requests"], snapshot["totals"]
    assert (record["prompt_len"], record["kept_tokens"], record["num_prefills"]) == (657, 657, 2)
    assert (totals["prompts"], totals["prompt_tokens"], totals["kept_tokens"]) == (1, 657, 657)
    assert totals["recomputed_prompts"] == 1
