"""Compression in the real engine: chunked prefill, prefix caching on, a pool of about two
dense requests.

On a CPU the model runs in float32, so that greedy texts do not depend on how prompts are chunked
and which requests share a batch (in bfloat16 stock vLLM's do).
"""

from __future__ import annotations

import pytest
from devices import Text, assert_same_texts

NUM_BLOCKS = 125
RATIO = 0.875
# Scored by the last 16 tokens, of which 8 are kept in any case.
WINDOW, RECENT = 16, 8


@pytest.fixture(scope="module")
def engine(start_engine, dtype):
    return start_engine(
        kv_compress="pyramidkv",
        kv_compress_ratio=RATIO,
        dtype=dtype,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=NUM_BLOCKS,
        enable_prefix_caching=True,
    )


@pytest.fixture(autouse=True)
def pool_is_whole_again(engine, read_metric):
    """After every test, each block but the null block is free (usage is exactly 0)."""
    yield
    # One more request reports the pool's state after the test's last one was freed.
    _generate(engine, ["ok"], max_tokens=2)
    assert read_metric(engine, "vllm:kv_cache_usage_perc") == 0.0


def _params(**settings):
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "logprobs": 4, **settings})


def _generate(engine, prompts, **settings):
    return engine.generate(prompts, _params(**settings), use_tqdm=False)


def _chat(engine, chats, **settings):
    return engine.chat(chats, _params(**settings), use_tqdm=False)


def _assert_same_text(output, expected, device) -> None:
    assert_same_texts([Text.of(output)], [Text.of(expected)], device)


def _new_records(engine, before: int) -> list[dict]:
    return engine.kv_compress_stats()["requests"][before:]


def _num_records(engine) -> int:
    return len(engine.kv_compress_stats()["requests"])


def _run(engine, prompts, params, read_metric, on_step=None):
    """Step an engine by hand; returns outputs by id and the running requests at each step."""
    llm_engine = engine.llm_engine
    for i, prompt in enumerate(prompts):
        llm_engine.add_request(f"r{i}", prompt, params)
    outputs, running, step = {}, [], 0
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            outputs[output.request_id] = output
        running.append(read_metric(engine, "vllm:num_requests_running"))
        if on_step is not None:
            on_step(step, outputs)
        step += 1
    return outputs, running


def _prompt(engine, chat) -> str:
    return engine.get_tokenizer().apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )


def test_eight_long_requests_share_a_pool_of_two(engine, needle, read_metric) -> None:
    before = _num_records(engine)
    chats = [needle(seed) for seed in range(8)]
    prompts = [_prompt(engine, chat) for chat, _ in chats]
    outputs, running = _run(engine, prompts, _params(max_tokens=64, ignore_eos=True), read_metric)
    dense_blocks = min(len(o.prompt_token_ids) for o in outputs.values()) // 32
    assert 2 * dense_blocks <= NUM_BLOCKS - 1 < 3 * dense_blocks
    # The one that is being prefilled is among the running ones.
    assert max(running) >= 7
    found = sum(code in outputs[f"r{i}"].outputs[0].text for i, (_, code) in enumerate(chats))
    records = _new_records(engine, before)
    assert len(records) == 8
    for record in records:
        prompt_len = record["prompt_len"]
        assert record["compressed"]
        kept = record["kept_per_head"]
        mean = sum(map(sum, kept)) / sum(map(len, kept))
        assert mean == pytest.approx(record["kept_tokens"])
        # Rounded to the nearest page.
        assert abs(mean - (1 - RATIO) * prompt_len) <= 16 + 1
        assert record["blocks_returned"] == (prompt_len - RECENT) // 32
        # PyramidKV: the first layer keeps more than the last, heads of a layer the same.
        assert sum(kept[0]) > sum(kept[-1])
        assert all(len(set(layer)) == 1 for layer in kept)
    assert found >= 6


def test_second_request_hits_the_prefix_cache_and_gets_the_same_answer(
    engine, device, needle
) -> None:
    chat, _ = needle(50)
    before = _num_records(engine)
    first, second = (_chat(engine, [chat], max_tokens=24)[0] for _ in range(2))
    prompt_len = len(first.prompt_token_ids)
    assert first.num_cached_tokens == 0
    assert prompt_len - WINDOW - 64 <= second.num_cached_tokens <= prompt_len - WINDOW
    _assert_same_text(second, first, device)
    records = _new_records(engine, before)
    assert [r["compressed"] for r in records] == [True, True]
    assert records[0]["kept_per_head"] == records[1]["kept_per_head"]


def test_generated_tokens_of_a_compressed_request_are_not_cached(engine, needle) -> None:
    chat, _ = needle(51)
    first = _chat(engine, [chat], max_tokens=80, ignore_eos=True)[0]
    history = first.prompt_token_ids + list(first.outputs[0].token_ids)
    follow_up = {"prompt_token_ids": history + first.prompt_token_ids[5:60]}
    second = _generate(engine, [follow_up], max_tokens=4)[0]
    assert second.num_cached_tokens == len(first.prompt_token_ids) // 32 * 32


def test_short_prompts_beside_long_ones_stay_dense(engine, device, needle) -> None:
    before = _num_records(engine)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    outputs = _chat(engine, [needle(60)[0], question, needle(61)[0], question], max_tokens=16)
    assert "Paris" in outputs[1].outputs[0].text
    _assert_same_text(outputs[1], outputs[3], device)
    by_id = {r["request_id"]: r for r in _new_records(engine, before)}
    assert [by_id[o.request_id]["compressed"] for o in outputs] == [True, False, True, False]
    assert by_id[outputs[1].request_id]["evicted_tokens"] == 0


def test_each_prompt_gets_a_budget_for_its_own_length(engine, needle) -> None:
    before = _num_records(engine)
    outputs = _chat(engine, [needle(62 + i, sentences=n)[0] for i, n in enumerate((140, 40, 90))])
    by_id = {r["request_id"]: r for r in _new_records(engine, before)}
    for output in outputs:
        record = by_id[output.request_id]
        asked = record["prompt_len"] - int(RATIO * record["prompt_len"])
        assert record["prompt_len"] == len(output.prompt_token_ids)
        assert abs(record["kept_tokens"] - asked) <= 16
    assert len({by_id[output.request_id]["region_blocks"] for output in outputs}) == 3


def test_abort_in_mid_prefill_and_mid_decode(engine, device, needle, read_metric) -> None:
    prompts = [_prompt(engine, needle(seed)[0]) for seed in (70, 71, 72)]
    alone = _generate(engine, [prompts[2]], max_tokens=40, ignore_eos=True)[0]
    aborted = []

    def abort(step, outputs):
        llm_engine = engine.llm_engine
        if step == 1:
            llm_engine.abort_request(["r1"])
            aborted.append("r1")
        started = "r0" in outputs and len(outputs["r0"].outputs[0].token_ids) >= 3
        if started and "r0" not in aborted:
            llm_engine.abort_request(["r0"])
            aborted.append("r0")

    outputs, _ = _run(engine, prompts, _params(max_tokens=40, ignore_eos=True), read_metric, abort)
    assert aborted == ["r1", "r0"]
    assert not outputs["r0"].finished
    assert len(outputs["r2"].outputs[0].token_ids) == 40
    _assert_same_text(outputs["r2"], alone, device)


def test_parallel_samples_stop_strings_and_logprobs(engine, needle) -> None:
    chat, _ = needle(90)
    before = _num_records(engine)
    (output,) = _chat(
        engine, [chat], n=3, temperature=1.0, max_tokens=20, logprobs=2, ignore_eos=True
    )
    assert len(output.outputs) == 3
    assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1
    for sample in output.outputs:
        assert len(sample.logprobs) == 20
        assert all(
            token in step for token, step in zip(sample.token_ids, sample.logprobs, strict=True)
        )
    records = _new_records(engine, before)
    assert len(records) == 3
    assert {r["request_id"] for r in records} == {output.request_id}
    assert all(r["compressed"] for r in records)
    (stopped,) = _chat(engine, [chat], max_tokens=60, stop=["."], ignore_eos=True)
    assert stopped.outputs[0].finish_reason in ("stop", "length")
    assert "." not in stopped.outputs[0].text


def test_engine_in_another_process_cannot_be_reconfigured(engine) -> None:
    from vllm_kvcompress import KVCompressConfigError

    with pytest.raises(KVCompressConfigError, match="set VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        engine.kv_compress_reconfigure(method="snapkv", ratio=RATIO)


def test_a_prompt_that_is_too_long_hurts_no_other(engine, prose) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises((ValueError, VLLMValidationError), match="2560"):
        _generate(engine, [prose(1, 400)])
    assert _generate(engine, [prose(2, 100)], max_tokens=3)[0].finished
