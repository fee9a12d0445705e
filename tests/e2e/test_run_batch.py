"""`vllm run-batch` as a process: the answers of an engine of ours, and its counts in the log."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.parametrize("device", ["cpu"], indirect=True, scope="module")
BUDGET = 512
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def chats(needle):
    """Two that are compressed, and a short one."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    return [needle(30)[0], needle(31, sentences=60)[0], question]


@pytest.fixture(scope="module")
def batch(model, device, chats, tmp_path_factory):
    """The results by custom id, and what the process printed."""
    folder = tmp_path_factory.mktemp("batch")
    requests = [
        {
            "custom_id": f"chat-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": model,
                "messages": chat,
                "temperature": 0,
                "max_completion_tokens": NUM_TOKENS,
            },
        }
        for i, chat in enumerate(chats)
    ]
    # A bad request among them gets its error, and no other does.
    bad = {**requests[0], "custom_id": "bad"}
    bad["body"] = {**bad["body"], "max_completion_tokens": -5}
    source, target = folder / "requests.jsonl", folder / "results.jsonl"
    source.write_text("".join(json.dumps(request) + "\n" for request in [*requests, bad]))
    flags = ["--kv-compress", "span", "--kv-compress-budget", str(BUDGET)]
    flags += ["--max-model-len", "2560", "--kv-cache-memory-bytes", str(256 << 20)]
    flags += ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "8"]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "run-batch"]
    command += ["-i", str(source), "-o", str(target), "--model", model, *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=800, env=os.environ)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-3000:]
    results = [json.loads(line) for line in target.read_text().splitlines()]
    return {entry["custom_id"]: entry for entry in results}, output


@pytest.fixture(scope="module")
def expected(model, batch, chats, engines_in_process, start_engine):
    """Answers and records of the same chats, one by one in an engine of ours."""
    from vllm import SamplingParams

    engine = start_engine(kv_compress="span", kv_compress_budget=BUDGET, dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    answers = [engine.chat([chat], params, use_tqdm=False)[0].outputs[0].text for chat in chats]
    return answers, engine.kv_compress_stats()["requests"]


def test_answers_are_those_of_an_engine(batch, expected, chats) -> None:
    results, _ = batch
    answers, records = expected
    assert [record["compressed"] for record in records] == [True, True, False]
    assert len(results) == len(chats) + 1
    for i, answer in enumerate(answers):
        body = results[f"chat-{i}"]["response"]["body"]
        assert body["choices"][0]["message"]["content"].strip() == answer.strip()
        assert body["usage"]["prompt_tokens"] == records[i]["prompt_len"]


def test_a_bad_request_gets_its_error(batch) -> None:
    result = batch[0]["bad"]
    text = json.dumps(result)
    assert "max_completion_tokens" in text or "max_tokens" in text
    body = (result["response"] or {}).get("body") or {}
    assert "choices" not in body


def test_counts_are_in_the_log(batch, expected) -> None:
    _, output = batch
    _, records = expected
    lines = re.findall(
        r"kv-compress: (\d+) prompts \((\d+) compressed, (\d+) in one shot(?:, [^)]*)?\), "
        r"(\d+) of (\d+) prompt tokens kept per head \(\S+% evicted\), "
        r"(\d+) blocks returned to the pool, (\d+) never taken, (\d+) blocks of regions",
        output,
    )
    # One line each 10 seconds, and one at the end: together they count each prompt once.
    sums = [sum(map(int, column)) for column in zip(*lines, strict=True)]
    assert sums[:3] == [3, 2, 0]
    assert sums[4] == sum(record["prompt_len"] for record in records)
    assert sums[5] == sum(record["blocks_returned"] for record in records)
    assert sums[7] == sum(record["region_blocks"] for record in records)
    kept = sum(record["kept_tokens"] for record in records)
    assert abs(sums[3] - kept) <= len(lines)
