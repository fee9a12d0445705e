"""Kinds of requests over a compaction or a preemption, each against what it is alone.

A tiny model in float32, in which texts do not depend on the batch. A preemption of all that runs
is made between two steps by resetting the prefix cache.
"""

from __future__ import annotations

import json

import pytest
from in_process_engines import start, stop
from stepped_runs import (
    alone,
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
MAX_LEN = 1024
# Tokens per head; prompts of up to that many stay dense.
BUDGET = 128
# Two long dense prompts and a little more.
NUM_BLOCKS = 48
# Longer prompts come in chunks of so many tokens.
CHUNK = 320
LONG, WHOLE, SHORT = prompt_of(700), prompt_of(300), prompt_of(60)


def _start(llama, dtype, **settings):
    return start(
        llama,
        dtype=dtype,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=2048,
        long_prefill_token_threshold=CHUNK,
        num_gpu_blocks_override=NUM_BLOCKS,
        scheduling_policy="priority",
        enable_prefix_caching=True,
        # Else a model of random weights fills its answers with blanks.
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        **settings,
    )


@pytest.fixture(scope="module")
def stock(llama, dtype, engines_in_process):
    """What stock vLLM makes of the short prompt, by the name of the test that asks."""
    engine = _start(llama, dtype)
    text = tokens_of(alone(engine, SHORT))
    found = {
        "text": text,
        "beams": _beams(engine, SHORT, 12),
        "min_tokens": tokens_of(alone(engine, SHORT, **_min_tokens(text))),
        "salts": _cached_of_salts(engine, SHORT),
    }
    stop(engine)
    return found


@pytest.fixture(scope="module")
def engine(llama, dtype, stock):
    # After the stock engine: one at a time in a process.
    engine = _start(llama, dtype, kv_compress="span", kv_compress_budget=BUDGET)
    yield engine
    stop(engine)


@pytest.fixture(autouse=True)
def pool_is_whole_again(engine):
    yield
    assert_pool_is_whole(engine)


@pytest.fixture(scope="module")
def texts(engine):
    """Tokens of each prompt alone."""
    return {name: tokens_of(alone(engine, PROMPTS[name])) for name in PROMPTS}


PROMPTS = {"long": LONG, "whole": WHOLE, "short": SHORT}


def test_these_prompts_are_compressed_and_this_one_is_stock(engine, stock, texts) -> None:
    assert step_through(engine, [(name, PROMPTS[name], params_of()) for name in PROMPTS])
    records = records_of(engine)
    assert [records[name]["compressed"] for name in PROMPTS] == [True, True, False]
    assert texts["short"] == stock["text"]


# Priorities: of waiting requests those of a low number go first, of running ones those of a high
# number are preempted.


@pytest.mark.parametrize("seed", [3, None])
def test_three_samples_of_an_urgent_request_go_first(engine, read_metric, seed) -> None:
    low = [prompt_of(300, i) for i in range(1, 13)]
    expected = [tokens_of(alone(engine, prompt, max_tokens=120)) for prompt in low]
    settings = {"temperature": 1.0, "max_tokens": 40, **({} if seed else {"top_k": 1})}
    seeds = [{"seed": seed + i} if seed else {} for i in range(3)]
    wanted = [tokens_of(alone(engine, WHOLE, **settings, **own)) for own in seeds]
    assert engine.reset_prefix_cache()
    llm_engine, waiting, next_token = engine.llm_engine, {}, {}
    before = read_metric(engine, "vllm:num_preemptions")
    num_records = len(engine.kv_compress_stats()["requests"])
    for i, prompt in enumerate(low):
        llm_engine.add_request(f"low{i}", prompt, params_of(max_tokens=120), priority=5)

    def add_urgent(step, outputs):
        lengths = {
            name: sum(len(sample.token_ids) for sample in output.outputs)
            for name, output in outputs.items()
        }
        if step == 50:
            running = [request.request_id for request in scheduler_of(engine).running]
            for i in range(len(low)):
                if not any(request_id.startswith(f"low{i}") for request_id in running):
                    waiting[f"low{i}"] = lengths.get(f"low{i}", 0)
            params = params_of(n=3, seed=seed, **settings)
            llm_engine.add_request("urgent", WHOLE, params, priority=0)
        for name, length in lengths.items():
            if name == "urgent" or length > waiting.get(name, length):
                next_token.setdefault(name, step)

    outputs = step_through(engine, on_step=add_urgent)
    assert waiting and all(next_token["urgent"] < next_token[name] for name in waiting)
    assert read_metric(engine, "vllm:num_preemptions") > before
    records = engine.kv_compress_stats()["requests"][num_records:]
    again = [r["request_id"] for r in records if r["num_prefills"] > 1]
    assert again and all(name.startswith("low") for name in again)
    assert [list(sample.token_ids) for sample in outputs["urgent"].outputs] == wanted
    assert len({tuple(tokens) for tokens in wanted}) == (3 if seed else 1)
    assert [tokens_of(outputs[f"low{i}"]) for i in range(len(low))] == expected


def test_seeded_samples_are_those_of_four_requests(engine) -> None:
    settings = {"temperature": 1.0, "max_tokens": 16}
    expected = [tokens_of(alone(engine, WHOLE, seed=7 + i, **settings)) for i in range(4)]
    assert len({tuple(tokens) for tokens in expected}) == 4
    output = alone(engine, WHOLE, n=4, seed=7, **settings)
    assert [list(sample.token_ids) for sample in output.outputs] == expected


# Structured output.

SCHEMA = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "pattern": "^[0-9]{6}$"},
        "kind": {"enum": ["harbour", "bridge", "market"]},
        "open": {"type": "boolean"},
    },
    "required": ["code", "kind", "open"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("steps", [(0,), (2,), (5, 9)])
@pytest.mark.parametrize("name", ["long", "short"])
def test_a_json_schema_holds_over_preemptions(engine, read_metric, name, steps) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    schema = StructuredOutputsParams(json=SCHEMA)
    settings = {"structured_outputs": schema, "max_tokens": 80, "ignore_eos": False}
    expected = alone(engine, PROMPTS[name], **settings)
    before = read_metric(engine, "vllm:num_preemptions")

    running = []

    def interrupt(step, _):
        # Steps pass idly while the grammar is made.
        if scheduler_of(engine).running:
            running.append(step)
            if len(running) - 1 in steps:
                preempt_all(engine)

    outputs = step_through(engine, [("json", PROMPTS[name], params_of(**settings))], interrupt)
    assert read_metric(engine, "vllm:num_preemptions") - before == len(steps)
    assert tokens_of(outputs["json"]) == tokens_of(expected)
    answer = json.loads(outputs["json"].outputs[0].text)
    assert answer.keys() == SCHEMA["properties"].keys()
    assert len(answer["code"]) == 6 and answer["code"].isdigit()
    assert answer["kind"] in SCHEMA["properties"]["kind"]["enum"]


# Where a text ends.


def _min_tokens(text: list[int]) -> dict:
    """Settings that forbid a token which the text has, until some tokens after it."""
    return {"stop_token_ids": [text[3]], "min_tokens": 12, "max_tokens": 24}


@pytest.mark.parametrize("name", list(PROMPTS))
def test_min_tokens_over_a_preemption(engine, stock, texts, name) -> None:
    settings = _min_tokens(texts[name])
    expected = tokens_of(alone(engine, PROMPTS[name], **settings))
    if name == "short":
        assert expected == stock["min_tokens"]
    assert expected[:3] == texts[name][:3] and texts[name][3] not in expected[:12]

    def interrupt(step, _):
        if step == 7:
            preempt_all(engine)

    outputs = step_through(engine, [(name, PROMPTS[name], params_of(**settings))], interrupt)
    assert tokens_of(outputs[name]) == expected


@pytest.mark.parametrize("place", [0, 1, 5])
@pytest.mark.parametrize("name", list(PROMPTS))
def test_a_stop_token_ends_the_text(engine, texts, name, place) -> None:
    """At place 0 it is sampled in the step of the compaction, whose request is then gone."""
    stop_token = texts[name][place]
    assert stop_token not in texts[name][:place]
    params = params_of(stop_token_ids=[stop_token])
    others = [(f"{name}{i}", PROMPTS[name], params_of()) for i in range(2)]
    outputs = step_through(engine, [others[0], ("stops", PROMPTS[name], params), others[1]])
    (sample,) = outputs["stops"].outputs
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop_token)
    assert list(sample.token_ids) == texts[name][: place + 1]
    assert all(tokens_of(outputs[other]) == texts[name] for other, *_ in others)


# Beam search: each step is a new prompt, one token longer.


def _beams(engine, prompt, num_tokens):
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=2, max_tokens=num_tokens, ignore_eos=True)
    (output,) = engine.beam_search([prompt], params)
    num_prompt = len(prompt["prompt_token_ids"])
    return [(beam.tokens[num_prompt:], beam.cum_logprob) for beam in output.sequences]


def _beams_by_hand(engine, prompt, num_tokens):
    """The same search, each of its prompts alone on an empty prefix cache."""
    beams = [([], 0.0)]
    for _ in range(num_tokens):
        longer = []
        for tokens, total in beams:
            history = {"prompt_token_ids": prompt["prompt_token_ids"] + tokens}
            (place,) = alone(engine, history, max_tokens=1, logprobs=4).outputs[0].logprobs
            longer += [([*tokens, token], total + place[token].logprob) for token in place]
        beams = sorted(longer, key=lambda beam: -beam[1])[:2]
    return beams


@pytest.mark.parametrize(
    ("length", "compressed"), [(60, {False}), (BUDGET - 5, {False, True}), (300, {True})]
)
def test_beam_search_across_the_budget(engine, stock, length, compressed) -> None:
    prompt, num_tokens = prompt_of(length), 12
    expected = _beams_by_hand(engine, prompt, num_tokens)
    num_records = len(engine.kv_compress_stats()["requests"])
    assert engine.reset_prefix_cache()
    beams = _beams(engine, prompt, num_tokens)
    records = engine.kv_compress_stats()["requests"][num_records:]
    assert len(records) == 1 + 2 * (num_tokens - 1)
    assert {record["compressed"] for record in records} == compressed
    assert all(record["compressed"] == (record["prompt_len"] > BUDGET) for record in records)
    for found in (beams, *([stock["beams"]] if length == 60 else [])):
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
        totals = [total for _, total in expected]
        assert [total for _, total in found] == pytest.approx(totals, abs=1e-3)


# The prefix cache.


def _cached_of_salts(engine, prompt):
    """Cached tokens of a prompt under salts one after another."""
    assert engine.reset_prefix_cache()
    cached = []
    for salt in ("a", "a", "b", None, "b", None):
        salted = {**prompt, "cache_salt": salt} if salt else prompt
        (output,) = engine.generate(salted, params_of(max_tokens=4), use_tqdm=False)
        cached.append(output.num_cached_tokens)
    return cached


@pytest.mark.parametrize("name", list(PROMPTS))
def test_a_cache_salt_shares_with_its_own_only(engine, stock, name) -> None:
    cached = _cached_of_salts(engine, PROMPTS[name])
    hit = cached[1]
    assert hit > 0
    assert cached == [0, hit, 0, 0, hit, hit]
    if name == "short":
        assert cached == stock["salts"]


def test_texts_of_two_salts_side_by_side(engine, texts) -> None:
    assert engine.reset_prefix_cache()
    requests = [
        (salt + name, {**PROMPTS[name], "cache_salt": salt}, params_of())
        for salt in "abab"
        for name in PROMPTS
    ]
    requests = [(f"{i}{name}", *rest) for i, (name, *rest) in enumerate(requests)]
    outputs = step_through(engine, requests)
    for name, output in outputs.items():
        assert tokens_of(output) == texts[name.lstrip("0123456789")[1:]]


def test_a_reset_waits_for_running_requests(engine, texts) -> None:
    """Without being told to preempt them it does nothing, and says so."""
    assert engine.reset_prefix_cache()
    answers = []

    def reset(step, _):
        if step in (0, 4):
            answers.append(engine.reset_prefix_cache())

    outputs = step_through(engine, [(name, PROMPTS[name], params_of()) for name in PROMPTS], reset)
    assert answers == [False, False]
    assert {name: tokens_of(output) for name, output in outputs.items()} == texts
    (again,) = engine.generate(LONG, params_of(), use_tqdm=False)
    assert again.num_cached_tokens > 0 and tokens_of(again) == texts["long"]


@pytest.mark.parametrize("steps", [(0,), (1, 2, 3), (4,), (12, 13)])
def test_a_reset_that_preempts_running_requests(engine, texts, read_metric, steps) -> None:
    """In the first steps the long prompt is computed in chunks; later all are decoding."""
    assert engine.reset_prefix_cache()
    before = read_metric(engine, "vllm:num_preemptions")

    def reset(step, _):
        if step in steps:
            assert scheduler_of(engine).running
            preempt_all(engine)

    outputs = step_through(engine, [(name, PROMPTS[name], params_of()) for name in PROMPTS], reset)
    assert read_metric(engine, "vllm:num_preemptions") - before >= len(steps)
    assert {name: tokens_of(output) for name, output in outputs.items()} == texts
    preempt_all(engine)
    (again,) = engine.generate(LONG, params_of(max_tokens=1), use_tqdm=False)
    assert again.num_cached_tokens == 0
