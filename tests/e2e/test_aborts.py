"""A request is aborted in each phase of its life, in pools that just hold one of the largest.

A tiny model in float32, in which texts do not depend on the batch.
"""

from __future__ import annotations

import random

import pytest
from in_process_engines import start, stop
from stepped_runs import (
    alone,
    assert_pool_is_whole,
    params_of,
    prompt_of,
    records_of,
    scheduler_of,
    step_through,
    tokens_of,
)

pytestmark = pytest.mark.parametrize("device", ["cpu"], indirect=True, scope="module")
MAX_LEN = 768
BLOCK_SIZE = 32
RATIO = 0.75
# Tokens of a step.
CHUNK = 256


def _start(llama, dtype, num_blocks):
    return start(
        llama,
        dtype=dtype,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=CHUNK,
        num_gpu_blocks_override=num_blocks,
        enable_prefix_caching=True,
        kv_compress="span",
        kv_compress_ratio=RATIO,
    )


def _fewest_blocks() -> int:
    """Of the largest request: dense and compressed at once, for a moment; and the null block."""
    from vllm_kvcompress import KVCompressConfig

    geometry = KVCompressConfig("span", ratio=RATIO).geometry(BLOCK_SIZE)
    return geometry.max_request_blocks(MAX_LEN) + 1


@pytest.fixture(scope="module")
def expected(llama, dtype, engines_in_process):
    """Tokens of each prompt alone in a pool with room for all; by length of the prompt."""
    engine = _start(llama, dtype, 200)
    texts = {
        length: tokens_of(alone(engine, prompt_of(length), max_tokens=24))
        for length in (MAX_LEN - 24, 600, 300, 40)
    }
    stop(engine)
    return texts


@pytest.fixture(scope="module")
def engine(llama, dtype, expected):
    # After the other engine: one at a time in a process.
    engine = _start(llama, dtype, _fewest_blocks())
    yield engine
    stop(engine)


@pytest.fixture(autouse=True)
def pool_is_whole_again(engine):
    yield
    assert_pool_is_whole(engine)


def test_one_block_less_is_refused(engine, llama, dtype) -> None:
    """By vLLM, with the length that would fit; asked of its own check, not of another engine."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    core = engine.llm_engine.engine_core.engine_core
    config, specs = core.vllm_config, core.model_executor.get_kv_cache_specs()
    block_bytes = sum(spec.page_size_bytes for spec in specs[0].values())
    fewest = _fewest_blocks()
    (fits,) = get_kv_cache_configs(config, specs, [fewest * block_bytes])
    assert fits.num_blocks == fewest
    config.cache_config.num_gpu_blocks_override = fewest - 1
    try:
        with pytest.raises(ValueError, match=rf"max seq len \({MAX_LEN}\).* maximum model length"):
            get_kv_cache_configs(config, specs, [fewest * block_bytes])
    finally:
        config.cache_config.num_gpu_blocks_override = fewest


def test_in_the_smallest_pool_all_get_their_turn(engine, expected) -> None:
    requests = [
        (f"{length}-{i}", prompt_of(length), params_of()) for i in range(3) for length in expected
    ]
    outputs = step_through(engine, requests)
    records = records_of(engine)
    for name, output in outputs.items():
        length = int(name.partition("-")[0])
        assert tokens_of(output) == expected[length]
        assert records[name]["compressed"] == (length > 40)


def test_what_cannot_fit_hurts_no_other(engine, expected) -> None:
    from vllm.exceptions import VLLMValidationError

    refused = []

    def add(step, _):
        if step in (0, 3):
            with pytest.raises((ValueError, VLLMValidationError), match=str(MAX_LEN)):
                engine.llm_engine.add_request("long", prompt_of(MAX_LEN + 1), params_of())
            refused.append(step)

    outputs = step_through(engine, [("fits", prompt_of(600), params_of())], add)
    assert refused == [0, 3] and list(outputs) == ["fits"]
    assert tokens_of(outputs["fits"]) == expected[600]


PHASES = ("waiting", "first chunk", "before compaction", "compaction", "decoding", "last token")


def _phase(engine, name, outputs) -> str:
    """Of a request of 600 tokens, between two steps."""
    (request,) = (r for i, r in scheduler_of(engine).requests.items() if i.startswith(name))
    if name in outputs and outputs[name].outputs[0].token_ids:
        length = len(outputs[name].outputs[0].token_ids)
        return {1: "compaction", 23: "last token"}.get(length, "decoding" if length == 7 else "")
    computed = request.num_computed_tokens
    if computed == 0:
        return "waiting"
    return "first chunk" if computed <= CHUNK else "before compaction"


@pytest.mark.parametrize("phase", PHASES)
def test_an_abort_hurts_no_other(engine, expected, phase) -> None:
    assert engine.reset_prefix_cache()
    aborted = []

    def abort(_, outputs):
        if not aborted and _phase(engine, "gone", outputs) == phase:
            engine.llm_engine.abort_request(["gone"])
            aborted.append(phase)

    requests = [("before", prompt_of(300), params_of()), ("gone", prompt_of(600), params_of())]
    requests += [("after", prompt_of(600), params_of()), ("short", prompt_of(40), params_of())]
    outputs = step_through(engine, requests, abort)
    assert aborted == [phase]
    assert "gone" not in outputs or not outputs["gone"].finished
    for name, length in (("before", 300), ("after", 600), ("short", 40)):
        assert tokens_of(outputs[name]) == expected[length]


def test_all_three_samples_of_a_request_are_aborted(engine, expected) -> None:
    params = params_of(n=3, temperature=1.0, top_k=1)
    engine.llm_engine.add_request("three", prompt_of(300), params)

    def abort(step, outputs):
        if step == 5:
            assert len(scheduler_of(engine).requests) == 4
            engine.llm_engine.abort_request(["three"])

    outputs = step_through(engine, [("other", prompt_of(300), params_of())], abort)
    assert tokens_of(outputs["other"]) == expected[300]
    assert "three" not in outputs or not outputs["three"].finished


def test_a_hundred_requests_with_aborts_leave_nothing(engine, expected) -> None:
    draw = random.Random(5)
    names = [f"{draw.choice(list(expected))}-{i}" for i in range(100)]
    waiting, aborted = list(names), set()

    def go_on(_, outputs):
        for _ in range(draw.choice((0, 1, 2))):
            if waiting:
                name = waiting.pop()
                length = int(name.partition("-")[0])
                engine.llm_engine.add_request(name, prompt_of(length), params_of())
        live = [n for n in names if n not in waiting and n not in aborted]
        live = [n for n in live if n not in outputs or not outputs[n].finished]
        if live and draw.random() < 0.15:
            aborted.add(draw.choice(live))
            engine.llm_engine.abort_request([name for name in live if name in aborted])

    outputs = step_through(engine, [("40-first", prompt_of(40), params_of())], go_on)
    assert not waiting and 10 < len(aborted) < 90
    for name in set(names) - aborted:
        assert tokens_of(outputs[name]) == expected[int(name.partition("-")[0])]
