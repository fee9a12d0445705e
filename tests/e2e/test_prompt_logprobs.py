"""Log-probabilities of prompts: they are computed before compaction, so stock vLLM's hold.

A tiny model in float32; stock vLLM computes each prompt in one step, alone.
"""

from __future__ import annotations

import pytest
from devices import TOLERANCES
from in_process_engines import start, stop
from stepped_runs import (
    assert_pool_is_whole,
    params_of,
    preempt_all,
    prompt_of,
    records_of,
    scheduler_of,
    step_through,
    tokens_of,
)

pytestmark = pytest.mark.parametrize("device", ["cpu"], indirect=True, scope="module")
RATIO = 0.75
# Tokens of a step.
CHUNK = 256
PROMPTS = [prompt_of(length) for length in (700, 450, 40, 222)]
IS_COMPRESSED = [True, True, False, True]
NUM_LOGPROBS = 3


@pytest.fixture(scope="module")
def stock(llama, dtype, engines_in_process):
    """Stock vLLM's outputs, each prompt in one step."""
    engine = start(llama, dtype=dtype, max_num_batched_tokens=2048)
    params = params_of(prompt_logprobs=NUM_LOGPROBS)
    outputs = [engine.generate(prompt, params, use_tqdm=False)[0] for prompt in PROMPTS]
    stop(engine)
    return outputs


@pytest.fixture(scope="module")
def engine(llama, dtype, stock):
    # After the stock engine: one at a time in a process.
    engine = start(
        llama,
        dtype=dtype,
        kv_compress="span",
        kv_compress_ratio=RATIO,
        max_num_batched_tokens=CHUNK,
    )
    yield engine
    stop(engine)


@pytest.fixture(autouse=True)
def pool_is_whole_again(engine):
    yield
    assert_pool_is_whole(engine)


@pytest.fixture(scope="module")
def texts(engine):
    """Tokens of each prompt alone, compressed, with no prompt log-probabilities asked for."""
    return [
        tokens_of(engine.generate(prompt, params_of(), use_tqdm=False)[0]) for prompt in PROMPTS
    ]


def _requests(**settings):
    params = params_of(prompt_logprobs=NUM_LOGPROBS, **settings)
    return [(str(i), prompt, params) for i, prompt in enumerate(PROMPTS)]


def _assert_prompt_logprobs(output, expected) -> None:
    ours, theirs = output.prompt_logprobs, expected.prompt_logprobs
    assert len(ours) == len(theirs) == len(expected.prompt_token_ids)
    assert ours[0] is None and theirs[0] is None
    for place, other in zip(ours[1:], theirs[1:], strict=True):
        assert place.keys() == other.keys()
        for token, entry in place.items():
            assert entry.logprob == pytest.approx(other[token].logprob, abs=TOLERANCES["cpu"])


def _assert_as_expected(engine, outputs, stock, texts) -> None:
    records = records_of(engine)
    for i, expected in enumerate(stock):
        _assert_prompt_logprobs(outputs[str(i)], expected)
        assert tokens_of(outputs[str(i)]) == texts[i]
        assert records[str(i)]["compressed"] == IS_COMPRESSED[i]


def test_what_is_compressed_goes_on_otherwise_than_stock(stock, texts) -> None:
    """Else the tests below could not tell the log-probabilities of one from the other's."""
    same = [tokens_of(expected) == text for expected, text in zip(stock, texts, strict=True)]
    assert same == [not compressed for compressed in IS_COMPRESSED]


def test_in_chunks_they_are_those_of_the_dense_prompt(engine, stock, texts) -> None:
    first_tokens = {}

    def note(step, outputs):
        for name, output in outputs.items():
            if output.outputs[0].token_ids:
                first_tokens.setdefault(name, step)

    outputs = step_through(engine, _requests(), note)
    # In three chunks or more.
    assert first_tokens["0"] >= 700 // CHUNK
    _assert_as_expected(engine, outputs, stock, texts)


@pytest.mark.parametrize("steps", [(0,), (1, 3), (4,), (6, 11)])
def test_over_a_preemption(engine, stock, texts, steps, read_metric) -> None:
    before = read_metric(engine, "vllm:num_preemptions")
    preempted = set()

    def interrupt(step, _):
        if step in steps:
            preempted.update(request.request_id for request in scheduler_of(engine).running)
            preempt_all(engine)

    outputs = step_through(engine, _requests(), interrupt)
    assert read_metric(engine, "vllm:num_preemptions") - before >= len(preempted) > 0
    _assert_as_expected(engine, outputs, stock, texts)


def test_in_one_shot(engine, stock, texts) -> None:
    options = {"one_shot": "always"}
    engine.kv_compress_reconfigure(method="span", ratio=RATIO, options=options)
    index = 3
    outputs = step_through(engine, [_requests()[index]])
    output = outputs[str(index)]
    assert records_of(engine)[str(index)]["one_shot"]
    _assert_prompt_logprobs(output, stock[index])
    assert tokens_of(output) == texts[index]
    engine.kv_compress_reconfigure(method="span", ratio=RATIO)
