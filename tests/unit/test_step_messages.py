"""What workers are told of a step, against the blocks that vLLM tells them of."""

from __future__ import annotations

import pickle

import pytest
from scheduler_rig import make_requests, make_scheduler, run

from vllm_kvcompress.vllm_integration.step_messages import StepMessage, told

SETTING = {"method": "snapkv", "ratio": 0.75}
NULL_BLOCK = 0


def begun(output):
    """(request id, first block) of the requests that begin in a step."""
    new = [(request.req_id, request.block_ids) for request in output.scheduled_new_reqs]
    cached = output.scheduled_cached_reqs
    resumed = [
        (name, blocks)
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True)
        if name in cached.resumed_req_ids
    ]
    return {name: blocks[0][0] for name, blocks in new + resumed}


@pytest.mark.parametrize("when", ["auto", "always", "never"])
@pytest.mark.parametrize("reset_at", [None, 3, 7])
def test_one_shot_requests_are_told_where_their_blocks_say_so(reset_at, when):
    # Room for one and a half prompts with all their blocks: the others come in one shot.
    scheduler = make_scheduler({**SETTING, "one_shot": when}, 90, 4096)
    schedule, seen, num_resumed = scheduler.schedule, [], 0

    def record():
        if len(seen) == reset_at:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        output = pickle.loads(pickle.dumps(schedule()))
        seen.append((begun(output), told(output)))
        nonlocal num_resumed
        num_resumed += len(output.scheduled_cached_reqs.resumed_req_ids)
        return output

    scheduler.schedule = record
    # The last prompt stays whole.
    run(scheduler, [*make_requests(5, 640, 20), *_short()])
    for first_blocks, message in seen:
        is_null = {name for name, block in first_blocks.items() if block == NULL_BLOCK}
        assert message == StepMessage(one_shot_ids=frozenset(is_null))
    num_told = sum(len(message.one_shot_ids) for _, message in seen)
    num_begun = sum(len(first_blocks) for first_blocks, _ in seen)
    assert num_begun == 6 + num_resumed and bool(num_resumed) == (reset_at is not None)
    assert (num_told > 0) == (when != "never")
    # Dense prompts begin too.
    assert num_told < num_begun


def _short():
    (request,) = make_requests(1, 40, 20)
    request.request_id = "short"
    return [request]
