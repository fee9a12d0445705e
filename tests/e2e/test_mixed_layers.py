"""Models that mix sliding-window layers with full attention: only the latter are compressed.

Tiny Gemma-3 models with random weights, in float32 on a CPU.
"""

from __future__ import annotations

import random
import time

import pytest
from devices import EVERYWHERE, Text, assert_same_texts
from in_process_engines import start, stop
from tiny_models import FULL, WINDOWED, tiny_gemma3

pytestmark = pytest.mark.parametrize("device", EVERYWHERE, indirect=True, scope="module")
RATIO = 0.75


@pytest.fixture(scope="module")
def tiny_gemma(model, tmp_path_factory):
    return tiny_gemma3(tmp_path_factory.mktemp("gemma"), model, [WINDOWED, WINDOWED, FULL] * 2)


def _prompt(length):
    draw = random.Random(length).randrange
    return [draw(5, 40_000) for _ in range(length)]


PROMPTS = [_prompt(length) for length in (700, 901, 64, 1100)]


def _params():
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=4)


def _texts(engine, prompts=PROMPTS):
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = engine.generate(requests, _params(), use_tqdm=False)
    return [Text.of(output) for output in outputs], outputs


@pytest.fixture(scope="module")
def stock_texts(tiny_gemma, dtype, engines_in_process):
    engine = start(tiny_gemma, dtype=dtype)
    texts, _ = _texts(engine)
    stop(engine)
    return texts


@pytest.fixture(scope="module")
def engine(tiny_gemma, dtype, stock_texts):
    # After the stock engine: one at a time in a process.
    engine = start(tiny_gemma, dtype=dtype, kv_compress="span", kv_compress_ratio=RATIO)
    yield engine
    stop(engine)


def _configure(engine, ratio, one_shot="auto", method="span"):
    engine.kv_compress_reconfigure(method=method, ratio=ratio, options={"one_shot": one_shot})
    engine.reset_prefix_cache()


def test_nothing_evicted_is_stock(engine, device, stock_texts) -> None:
    _configure(engine, 0.0)
    texts, _ = _texts(engine)
    assert_same_texts(texts, stock_texts, device)


@pytest.mark.parametrize("method", ["span", "pyramidkv", "h2o"])
def test_only_full_attention_layers_are_compressed(
    engine, device, stock_texts, method, read_metric
) -> None:
    results = {}
    for one_shot in ("never", "always"):
        _configure(engine, RATIO, one_shot, method)
        results[one_shot], outputs = _texts(engine)
        by_id = {r["request_id"]: r for r in engine.kv_compress_stats()["requests"]}
        for output, prompt in zip(outputs, PROMPTS, strict=True):
            record = by_id[output.request_id]
            assert record["compressed"] == (len(prompt) > 64)
            if record["compressed"]:
                # Two of the six layers.
                assert [len(heads) for heads in record["kept_per_head"]] == [2, 2]
                assert record["one_shot"] == (one_shot == "always")
    assert_same_texts(results["always"], results["never"], device)
    # The short prompt stays whole; what is evicted of the others matters.
    assert_same_texts(results["never"][2:3], stock_texts[2:3], device)
    assert [text.tokens for text in results["never"]] != [text.tokens for text in stock_texts]
    _texts(engine, [[5, 6, 7]])
    assert read_metric(engine, "vllm:kv_cache_usage_perc") == 0.0


def test_prefix_hits_give_the_same_text(engine, device) -> None:
    _configure(engine, RATIO)
    texts, hits = zip(*(_texts(engine, PROMPTS[3:]) for _ in range(3)), strict=True)
    assert_same_texts(texts[0] + texts[0], texts[1] + texts[2], device)
    # vLLM keeps of the windowed layers only blocks where it expects a hit, at the prompt's end.
    # Ours ends before the scoring window; there it keeps them from the second time on.
    cached = [output.num_cached_tokens for (output,) in hits]
    assert cached[:2] == [0, 0]
    assert len(PROMPTS[3]) - 16 - 32 <= cached[2] <= len(PROMPTS[3]) - 16


@pytest.mark.parametrize("num_steps", [2, 12, 25])
def test_preempted_soon_after_its_prompt_a_request_goes_on(engine, device, num_steps) -> None:
    # Its windowed layers have kept what a lookup of prompt and output would hit.
    _configure(engine, RATIO)
    (expected,), _ = _texts(engine, PROMPTS[1:2])
    llm_engine = engine.llm_engine
    scheduler = llm_engine.engine_core.engine_core.scheduler
    llm_engine.add_request("preempted", {"prompt_token_ids": PROMPTS[1]}, _params())
    num_done, outputs = 0, {}
    while llm_engine.has_unfinished_requests():
        outputs.update((output.request_id, output) for output in llm_engine.step())
        num_done += 1
        if num_done == num_steps:
            (request,) = scheduler.running
            assert request.num_computed_tokens >= len(PROMPTS[1])
            scheduler.running.clear()
            scheduler._preempt_request(request, time.monotonic())
    assert request.num_preemptions == 1
    assert_same_texts([Text.of(outputs["preempted"])], [expected], device)


def test_padded_blocks_are_refused(model, tmp_path, dtype, engine) -> None:
    from vllm_kvcompress import KVCompressConfigError

    stop(engine)
    path = tiny_gemma3(tmp_path, model, [WINDOWED, FULL] * 5 + [WINDOWED])
    with pytest.raises(KVCompressConfigError, match="that it pads: 5 of them"):
        start(path, dtype=dtype, kv_compress="span", kv_compress_ratio=RATIO)
