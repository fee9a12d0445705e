"""Prompts computed in one shot, in the real engine and a pool of little more than one dense
request.

The model is a small one of random weights: texts are compared, not read. On a CPU it runs in
float32, so that greedy texts do not depend on which requests share a batch.
"""

from __future__ import annotations

import pytest
from devices import Text, assert_same_texts
from in_process_engines import start, stop

NUM_BLOCKS = 78
RATIO = 0.875
METHODS = ("ada-criticalkv", "keydiff", "h2o")


@pytest.fixture(scope="module")
def engine(device, dtype, engines_in_process, llama):
    engine = start(
        llama,
        kv_compress="span",
        kv_compress_ratio=RATIO,
        dtype=dtype,
        max_num_batched_tokens=2048,
        num_gpu_blocks_override=NUM_BLOCKS,
        enable_prefix_caching=True,
    )
    yield engine
    stop(engine)


@pytest.fixture(autouse=True)
def pool_is_whole_again(engine, read_metric):
    yield
    _run(engine, [[5, 6, 7]], 2, read_metric)
    assert read_metric(engine, "vllm:kv_cache_usage_perc") == 0.0


def _configure(engine, one_shot, method="span", **options):
    options["one_shot"] = one_shot
    engine.kv_compress_reconfigure(method=method, ratio=RATIO, options=options)
    engine.reset_prefix_cache()


def _run(engine, prompts, max_tokens, read_metric):
    """All prompts at once; texts, records of the prompts, most requests running together."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=4)
    llm_engine, outputs, most = engine.llm_engine, {}, 0
    before = len(engine.kv_compress_stats()["requests"])
    for i, prompt in enumerate(prompts):
        llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            outputs[output.request_id] = output
        most = max(most, read_metric(engine, "vllm:num_requests_running"))
    texts = [Text.of(outputs[str(i)]) for i in range(len(prompts))]
    records = {
        record["request_id"]: record for record in engine.kv_compress_stats()["requests"][before:]
    }
    return texts, [records[str(i)] for i in range(len(prompts))], most


@pytest.fixture(scope="module")
def prompts(engine, needle):
    tokenizer = engine.get_tokenizer()
    texts = (
        tokenizer.apply_chat_template(needle(seed)[0], tokenize=False, add_generation_prompt=True)
        for seed in range(8)
    )
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def test_a_full_pool_takes_prompts_in_one_shot(engine, device, prompts, read_metric) -> None:
    dense_blocks = min(map(len, prompts)) // 32
    assert dense_blocks < NUM_BLOCKS - 1 < 2 * dense_blocks
    results = {}
    for option in ("never", "auto"):
        _configure(engine, option)
        results[option] = _run(engine, prompts, 24, read_metric)
    texts, records, most = results["never"]
    assert not any(record["one_shot"] for record in records)
    assert most <= 5
    other_texts, other_records, other_most = results["auto"]
    assert_same_texts(other_texts, texts, device)
    assert other_most == 8
    for record, other in zip(records, other_records, strict=True):
        assert other["kept_per_head"] == record["kept_per_head"]
        spared = "blocks_not_taken" if other["one_shot"] else "blocks_returned"
        assert other[spared] == record["blocks_returned"] > 0
        assert other["blocks_not_taken"] + other["blocks_returned"] == other[spared]
    # The first finds room for all of its blocks, which others may then reuse; not so the last.
    in_one_shot = [record["one_shot"] for record in other_records]
    assert not in_one_shot[0] and in_one_shot[-1]


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_prompts_with_blocks(
    engine, device, prompts, method, read_metric
) -> None:
    texts = {}
    for option in ("never", "always"):
        _configure(engine, option, method)
        texts[option], records, _ = _run(engine, prompts[:2], 16, read_metric)
        assert [r["one_shot"] for r in records] == [option == "always"] * 2
    assert_same_texts(texts["always"], texts["never"], device)


def test_only_prompts_with_blocks_fill_the_prefix_cache(engine, prompts, read_metric) -> None:
    from vllm import SamplingParams

    for option, is_cached in (("auto", True), ("always", False)):
        _configure(engine, option)
        params = SamplingParams(temperature=0, max_tokens=4)
        hits = []
        for _ in range(2):
            (output,) = engine.generate({"prompt_token_ids": prompts[0]}, params, use_tqdm=False)
            hits.append(output.num_cached_tokens > 0)
        assert hits == [False, is_cached]


def test_preempted_requests_come_back_in_one_shot(engine, device, prompts, read_metric) -> None:
    _configure(engine, "always", headroom=0)
    before = read_metric(engine, "vllm:num_preemptions")
    texts, records, _ = _run(engine, prompts[2:], 270, read_metric)
    assert read_metric(engine, "vllm:num_preemptions") > before
    assert max(record["num_prefills"] for record in records) > 1
    assert all(record["one_shot"] for record in records)
    (index, *_) = [i for i, record in enumerate(records) if record["num_prefills"] > 1]
    alone, _, _ = _run(engine, [prompts[2 + index]], 270, read_metric)
    assert_same_texts([texts[index]], alone, device)


def test_with_headroom_no_prompt_is_computed_again(engine, device, prompts, read_metric) -> None:
    found = {}
    for headroom in (0, 1):
        _configure(engine, "auto", headroom=headroom)
        before = read_metric(engine, "vllm:num_preemptions")
        texts, records, most = _run(engine, prompts, 270, read_metric)
        num_preempted = read_metric(engine, "vllm:num_preemptions") - before
        assert (num_preempted == 0) == all(record["num_prefills"] == 1 for record in records)
        found[headroom] = texts, num_preempted, most
    assert found[0][1] > 0 == found[1][1]
    assert found[0][2] > found[1][2] > 1
    assert_same_texts(found[1][0], found[0][0], device)


def test_a_prompt_longer_than_a_step_gets_blocks(engine, prompts, read_metric) -> None:
    _configure(engine, "always")
    longest = prompts[0] + prompts[1][: 2045 - len(prompts[0])]
    texts, (long, short), _ = _run(engine, [longest, prompts[2]], 3, read_metric)
    assert not long["one_shot"] and long["blocks_returned"] > 0
    assert short["one_shot"]
    assert all(len(text.tokens) == 3 for text in texts)


def test_workers_say_the_state_of_every_row(engine, prompts, read_metric) -> None:
    from vllm import SamplingParams

    from vllm_kvcompress.memory import CompressedRow

    llm_engine, states = engine.llm_engine, []
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    long, short = (prompts[0] + prompts[1])[:1850], prompts[2][:250]
    # A step has not enough room for both; of the last prompt nothing is evicted.
    for option, asked in (("never", [long, short]), ("always", [prompts[2], [5] * 9])):
        _configure(engine, option, headroom=0)
        for i, prompt in enumerate(asked):
            llm_engine.add_request(f"{option}{i}", {"prompt_token_ids": prompt}, params)
        while llm_engine.has_unfinished_requests():
            llm_engine.step()
            (rows,) = engine.collective_rpc("kv_compress_rows")
            rows = {name: CompressedRow.from_dict(row) for name, row in rows.items()}
            states.append({name.split("-")[0]: row.state.value for name, row in rows.items()})
            records = {r["internal_id"]: r for r in engine.kv_compress_stats()["requests"]}
            for name, row in rows.items():
                if not row.is_compacted:
                    assert row.page_counts is None
                    continue
                assert row.prompt_len == records[name]["prompt_len"]
                tail = row.prompt_len - row.layout.points[-1].first_kept_block * row.block_size
                kept = [tokens for layer in records[name]["kept_per_head"] for tokens in layer]
                assert [row.block_size * pages + tail for pages in row.page_counts] == kept
    assert states[0] == {"never0": "compacted", "never1": "dense"}
    assert {"never0": "compacted", "never1": "compacted"} in states
    assert states[-1] == {"always0": "compacted", "always1": "whole"}
