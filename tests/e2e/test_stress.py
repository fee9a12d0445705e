"""Very many requests, aborts, and a pool that is far too small for them."""

from __future__ import annotations

import random

import pytest
from devices import EVERYWHERE, Text
from in_process_engines import start, stop
from tiny_models import tiny_llama

pytestmark = pytest.mark.parametrize("device", EVERYWHERE, indirect=True, scope="module")
# On the CUDA side without a GPU references stand in for kernels.
NUM_REQUESTS = {"cpu": 120, "cuda_on_cpu": 100, "plain": 100, "cuda": 200}
MAX_LEN = 640
# The largest request, and a little more.
NUM_BLOCKS = 28


@pytest.fixture(scope="module")
def engine(device, dtype, engines_in_process, model, tmp_path_factory):
    engine = start(
        tiny_llama(
            tmp_path_factory.mktemp("llama"),
            model,
            hidden_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        kv_compress="span",
        kv_compress_ratio=0.75,
        # Nobody is held back, so that many are preempted.
        kv_compress_options={"headroom": 0},
        dtype=dtype,
        max_model_len=MAX_LEN,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=NUM_BLOCKS,
    )
    yield engine
    stop(engine)


def _params(max_tokens):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def test_texts_are_those_of_requests_run_one_by_one(engine, device, read_metric) -> None:
    rng = random.Random(0)
    num_requests = NUM_REQUESTS[device]
    shared = [rng.randrange(5, 40_000) for _ in range(300)]
    requests = []
    for _ in range(num_requests):
        length = rng.choice((rng.randint(1, 60), rng.randint(100, 350), rng.randint(400, 560)))
        start = shared[: rng.choice((0, 0, 200, 300))][:length]
        prompt = start + [rng.randrange(5, 40_000) for _ in range(length - len(start))]
        requests.append((prompt, rng.randint(1, 70)))
    llm_engine, outputs, aborted, waiting = engine.llm_engine, {}, set(), list(range(num_requests))
    while waiting or llm_engine.has_unfinished_requests():
        for _ in range(rng.choice((0, 1, 1, 2, 5))):
            if waiting:
                name = waiting.pop(0)
                prompt, max_tokens = requests[name]
                llm_engine.add_request(str(name), {"prompt_token_ids": prompt}, _params(max_tokens))
        for output in llm_engine.step():
            outputs[output.request_id] = output
        if rng.random() < 0.03:
            live = [n for n in range(num_requests - len(waiting)) if str(n) not in aborted]
            live = [n for n in live if str(n) not in outputs or not outputs[str(n)].finished]
            if live:
                name = str(rng.choice(live))
                llm_engine.abort_request([name])
                aborted.add(name)
    records = {r["request_id"]: r for r in engine.kv_compress_stats()["requests"]}
    assert len(aborted) > 5
    assert read_metric(engine, "vllm:num_preemptions") >= 5
    assert sum(record["one_shot"] for record in records.values()) > num_requests / 20
    assert sum(record["num_prefills"] > 1 and record["compressed"] for record in records.values())
    differing = []
    for name, (prompt, max_tokens) in enumerate(requests):
        if str(name) in aborted:
            continue
        request = {"prompt_token_ids": prompt}
        (alone,) = engine.generate(request, _params(max_tokens), use_tqdm=False)
        if Text.of(outputs[str(name)]).tokens != Text.of(alone).tokens:
            differing.append((name, len(prompt), records[str(name)]))
    if device != "cuda":
        # In half precision a batch's rounding may choose other pages.
        assert not differing
    assert read_metric(engine, "vllm:kv_cache_usage_perc") == 0.0
