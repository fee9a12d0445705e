"""Which compressed requests are let in, by the numbers and in vLLM's scheduler."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from scheduler_rig import BLOCK_SIZE, make_requests, make_scheduler, run
from vllm.sampling_params import SamplingParams

from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.vllm_integration.scheduler.headroom import (
    OutputLengths,
    blocks_short,
    has_headroom,
)

PROMPT_LEN, ANSWER_LEN = 800, 160


def lengths_of(*ended):
    lengths = OutputLengths()
    for num_tokens in ended:
        lengths.add(num_tokens)
    return lengths


def setting(**options):
    return {"method": "snapkv", "ratio": 0.875, **options}


@pytest.mark.parametrize(
    ("ended", "generated", "rest"),
    [
        ([], 5, 0),
        ([10], 0, 10),
        ([10], 4, 6),
        ([10, 20, 60], 0, 30),
        ([60, 20, 10], 10, 30),
        ([10, 20, 60], 20, 40),
        ([10, 20, 60], 60, 60),
        ([10, 20, 60], 75, 75),
        ([0, 0, 10], 0, 10),
    ],
)
def test_expected_rest(ended, generated, rest):
    assert lengths_of(*ended).expected_rest(np.array([generated])).tolist() == [rest]


def test_answers_of_long_ago_are_forgotten():
    lengths = lengths_of(*[5] * 1000)
    assert lengths.expected_rest(np.array([0])).tolist() == [5]
    for _ in range(1000):
        lengths.add(50)
    assert lengths.expected_rest(np.array([0, 49])).tolist() == [50, 1]


def most_wanted(held, rest, horizon, block_size):
    """As `blocks_short`, step by step."""
    most = 0
    for step in range(1, horizon + 1):
        growth = sum(math.ceil(step / block_size) for tokens in rest if tokens >= step)
        freed = sum(n for n, tokens in zip(held, rest, strict=True) if 0 < tokens < step)
        most = max(most, growth - freed)
    return most


@pytest.mark.parametrize("seed", range(20))
def test_blocks_short_is_the_most_of_all_steps(seed):
    rng = random.Random(seed)
    for _ in range(50):
        n = rng.randint(1, 12)
        held = [rng.randint(0, 9) for _ in range(n)]
        rest = [rng.choice((0, rng.randint(1, 90))) for _ in range(n)]
        horizon, block_size = rng.randint(1, 100), rng.choice((1, 4, 16))
        found = blocks_short(np.array(held), np.array(rest), horizon, block_size)
        assert found == most_wanted(held, rest, horizon, block_size), (held, rest, horizon)


def test_blocks_short_counts_only_what_is_in_sight():
    held, rest = np.array([3, 3]), np.array([100, 40])
    assert blocks_short(held, rest, 0, 16) == 0
    assert blocks_short(held, rest, 16, 16) == 2
    assert blocks_short(held, rest, 40, 16) == 2 * 3
    # The second ends at 40 with its 3 blocks, which the first one's 7 need.
    assert blocks_short(held, rest, 100, 16) == max(2 * 3, 7 - 3)


def request_of(num_generated=0, prompt_len=PROMPT_LEN, **params):
    params = SamplingParams(**{"max_tokens": ANSWER_LEN, **params})
    return SimpleNamespace(
        num_prompt_tokens=prompt_len,
        num_output_tokens=num_generated,
        num_tokens=prompt_len + num_generated,
        max_tokens=params.max_tokens,
        sampling_params=params,
        streaming_queue=None,
    )


@pytest.mark.parametrize(
    ("params", "ended", "missing"),
    [
        # Nothing is known of its length: what it takes at once is enough.
        ({}, [], 0),
        ({"ignore_eos": True}, [], 100 / 16),
        ({"ignore_eos": True, "max_tokens": 40}, [], 40 / 16),
        # It may stop earlier all the same.
        ({"ignore_eos": True, "stop_token_ids": [3]}, [], 0),
        ({"ignore_eos": True, "stop": ["end"]}, [], 0),
        ({"min_tokens": 64}, [], 64 / 16),
        ({}, [64], 64 / 16),
        ({"max_tokens": 20}, [64], 20 / 16),
        ({"min_tokens": 80}, [64], 80 / 16),
    ],
)
def test_room_that_a_newcomer_needs(params, ended, missing):
    config = KVCompressConfig.from_dict(setting())
    geometry, headroom = config.geometry(BLOCK_SIZE), config.option("headroom")
    own = geometry.of(PROMPT_LEN)
    held = own.num_row_blocks(PROMPT_LEN) - own.first_kept_block
    enough = held + math.ceil(missing)

    def may_enter(num_free):
        return has_headroom(
            request_of(**params), [], lengths_of(*ended), geometry, headroom, num_free, 10_000
        )

    assert may_enter(enough) and not may_enter(enough - 1)


def test_what_comes_after_a_newcomer_has_ended_is_not_its_concern():
    config = KVCompressConfig.from_dict(setting())
    geometry, headroom = config.geometry(BLOCK_SIZE), config.option("headroom")
    own = geometry.of(PROMPT_LEN)
    held = own.num_row_blocks(PROMPT_LEN) - own.first_kept_block
    running = [request_of(ignore_eos=True)] * 5
    newcomer = request_of(ignore_eos=True, max_tokens=16)
    assert has_headroom(newcomer, running, lengths_of(), geometry, headroom, held + 6, 10_000)
    assert not has_headroom(newcomer, running, lengths_of(), geometry, headroom, held + 5, 10_000)


def test_a_long_request_ends_with_the_model():
    config = KVCompressConfig.from_dict(setting())
    geometry, headroom = config.geometry(BLOCK_SIZE), config.option("headroom")
    own = geometry.of(PROMPT_LEN)
    held = own.num_row_blocks(PROMPT_LEN) - own.first_kept_block
    newcomer, longest = request_of(ignore_eos=True), PROMPT_LEN + 32
    assert has_headroom(newcomer, [], lengths_of(), geometry, headroom, held + 2, longest)
    assert not has_headroom(newcomer, [], lengths_of(), geometry, headroom, held + 1, longest)


def pool_of(num_requests):
    """Blocks for so many dense requests."""
    return math.ceil(num_requests * (PROMPT_LEN + ANSWER_LEN) / BLOCK_SIZE)


def run_prompts(kv_compress, pool, num=12, answer_lens=None, prompt_len=PROMPT_LEN):
    scheduler = make_scheduler(kv_compress, pool, max_model_len=2000)
    is_certain = answer_lens is None
    max_tokens = ANSWER_LEN if is_certain else 1000
    requests = make_requests(num, prompt_len, max_tokens, is_certain)
    trace = run(scheduler, requests, answer_lens)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == pool
    return trace


def test_without_headroom_prompts_are_computed_again_and_again():
    as_vllm = run_prompts(setting(headroom=0), pool_of(1.2))
    default = run_prompts(setting(), pool_of(1.2))
    whole = run_prompts(setting(headroom=10), pool_of(1.2))
    assert as_vllm.num_preempted > default.num_preempted > whole.num_preempted == 0
    assert as_vllm.num_tokens > default.num_tokens > whole.num_tokens
    # None is computed twice, and still more than one dense request's room is used.
    assert whole.num_tokens == 12 * (PROMPT_LEN + ANSWER_LEN - 1)
    assert as_vllm.most_running > whole.most_running > 2


def test_lengths_are_learned():
    rng = random.Random(0)
    lens = [1 + int(rng.expovariate(1 / ANSWER_LEN)) % 900 for _ in range(60)]
    as_vllm, default = (
        run_prompts(setting(headroom=h), pool_of(2), num=60, answer_lens=lens) for h in (0, 0.125)
    )
    assert default.num_preempted < as_vllm.num_preempted / 2
    assert default.num_tokens < as_vllm.num_tokens


def test_a_prompt_alone_always_comes_in():
    pool = pool_of(1.1)
    scheduler = make_scheduler(setting(headroom=1000), pool, max_model_len=5000)
    # More is expected of each than the pool can hold.
    scheduler._output_lengths.add(2000)
    requests = make_requests(3, PROMPT_LEN, 3000, is_certain=False)
    trace = run(scheduler, requests, [10] * 3)
    assert trace.most_running == 1
    assert trace.num_tokens == 3 * (PROMPT_LEN + 10 - 1)


def test_dense_prompts_come_in_as_in_stock_vllm():
    stock = run_prompts(None, pool_of(1), prompt_len=100)
    ours = run_prompts({"method": "snapkv", "budget": 256}, pool_of(1), prompt_len=100)
    assert stock.num_preempted > 0
    assert ours.steps == stock.steps
