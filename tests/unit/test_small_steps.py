"""A prompt beside decoding requests that leave its steps a single token, in vLLM's scheduler."""

from __future__ import annotations

import itertools

import pytest
from scheduler_rig import make_requests, make_scheduler, run

NUM_DECODING, PROMPT_LEN = 7, 600


def first_token_step(kv_compress, num_decoding=NUM_DECODING, budget=8):
    """The trace of a run, and the step that computes the end of the late prompt."""
    scheduler = make_scheduler(
        kv_compress,
        num_blocks=600,
        max_model_len=4096,
        max_num_seqs=num_decoding + 1,
        max_num_batched_tokens=budget,
    )
    # They are there first, decode through all of the prompt, and share no token with it.
    *decoding, late = make_requests(num_decoding + 1, PROMPT_LEN, 1500)
    for request in decoding:
        del request._all_token_ids[4:], request.prompt_token_ids[4:]
        request.num_prompt_tokens, request.block_hashes[:] = 4, []
    trace = run(scheduler, [*decoding, late])
    steps = [step.get(f"r{num_decoding}", 0) for step in trace.steps]
    begin = next(i for i, tokens in enumerate(steps) if tokens)
    done, end = 0, begin
    while done < PROMPT_LEN:
        done += steps[end]
        end += 1
    return trace, steps[begin:end], begin


@pytest.mark.parametrize(
    ("kv_compress", "num_collected"),
    [
        ({"method": "snapkv", "ratio": 0.75}, 16),
        ({"method": "snapkv", "ratio": 0.75, "window": 32}, 32),
        ({"method": "snapkv", "ratio": 0.75, "window": 17}, 17),
        # Every query has a say.
        ({"method": "h2o", "ratio": 0.75}, PROMPT_LEN),
    ],
)
def test_the_first_token_comes_as_soon_as_in_stock_vllm(kv_compress, num_collected):
    _, stock, _ = first_token_step(None)
    trace, chunks, begin = first_token_step(kv_compress)
    assert len(stock) == PROMPT_LEN - 1 or len(stock) == PROMPT_LEN
    assert len(chunks) <= len(stock) + 2
    # No token to collect is alone.
    done = 0
    for tokens in chunks:
        done += tokens
        assert tokens != 1 or done <= PROMPT_LEN - num_collected
    # Those who make room wait for one step at a time, and take turns.
    for i in range(NUM_DECODING):
        waits = [step.get(f"r{i}", 0) == 0 for step in trace.steps[begin : begin + len(chunks)]]
        assert sum(waits) <= num_collected / NUM_DECODING + 3
        assert not any(map(all, itertools.pairwise(waits)))


def test_room_for_three_is_made_where_two_would_leave_one():
    """Of an odd window the last three tokens go together, though two decoding requests wait."""
    _, chunks, _ = first_token_step({"method": "h2o", "ratio": 0.75}, num_decoding=2, budget=3)
    _, stock, _ = first_token_step(None, num_decoding=2, budget=3)
    assert len(chunks) <= len(stock) + 2
    assert 1 not in chunks


def test_nobody_is_left_out_where_room_is_not_what_is_lacking():
    """Nothing is offered to a prompt whose image waits for the encoder."""
    scheduler = make_scheduler({"method": "snapkv", "ratio": 0.75}, 600, 4096)
    (request,) = make_requests(1, PROMPT_LEN, 10)
    assert scheduler._reserve_prefill_lookahead(request, 0, 0) == 0
    assert scheduler._num_lacking == 0
    # One token of room, of two that it takes.
    assert scheduler._reserve_prefill_lookahead(request, PROMPT_LEN - 16, 1) == 0
    assert scheduler._num_lacking == 1
