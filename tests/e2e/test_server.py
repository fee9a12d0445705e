"""`vllm serve` as a process, spoken to by the real OpenAI client."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from compiled_ops import need_compiled_ops
from server_process import serving

from vllm_kvcompress import ops


@pytest.fixture(scope="module")
def server(model, device, tmp_path_factory):
    flags = [
        "--served-model-name",
        "smollm2",
        "--kv-compress",
        "ada-snapkv",
        "--kv-compress-budget",
        "640",
        "--kv-compress-options",
        '{"pool_kernel": 7}',
        "--max-model-len",
        "2560",
        "--kv-cache-memory-bytes",
        str(256 << 20),
        "--enforce-eager",
        "--max-num-seqs",
        "8",
    ]
    folder = tmp_path_factory.mktemp("server")
    with serving([model, *flags], folder, VLLM_LOGGING_LEVEL="DEBUG") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")


def test_needles_through_chat_side_by_side(server, client, needle) -> None:
    chats = [needle(seed) for seed in range(30, 36)]

    def ask(chat: list[dict]) -> str:
        reply = client.chat.completions.create(
            model="smollm2", messages=chat, temperature=0, max_tokens=16
        )
        return reply.choices[0].message.content

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, [chat for chat, _ in chats]))
    found = sum(code in answer for (_, code), answer in zip(chats, answers, strict=True))
    assert found >= 3, answers
    lines = re.findall(
        r"kv-compress: request \S+: prompt (\d+) tokens, kept (\d+) per head, evicted \d+, "
        r"(\d+) blocks returned, 0 never taken, (\d+) blocks of region",
        server.output(),
    )
    assert len(lines) == 6
    for prompt_len, kept, returned, region in (map(int, line) for line in lines):
        assert 640 - 32 < kept <= 640
        assert returned > 0.9 * prompt_len / 32
        assert region <= 640 / 32


def test_streaming_gives_the_same_text(client, needle) -> None:
    chat, _ = needle(40)
    settings = {"model": "smollm2", "messages": chat, "temperature": 0, "max_tokens": 16}
    # Twice, so that both of the compared requests start from the same cached prefix.
    client.chat.completions.create(**settings)
    whole = client.chat.completions.create(**settings).choices[0].message.content
    chunks = list(client.chat.completions.create(**settings, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole
    assert len(chunks) > 3


def test_completions_with_logprobs_and_samples(client, prose) -> None:
    reply = client.completions.create(
        model="smollm2", prompt=prose(4, 100), n=2, temperature=0.8, max_tokens=8, logprobs=1
    )
    assert len(reply.choices) == 2
    for choice in reply.choices:
        assert 1 <= len(choice.logprobs.tokens) <= 8
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)


def test_too_long_prompt_gets_vllms_error(client, prose) -> None:
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="2560"):
        client.completions.create(model="smollm2", prompt=prose(5, 400), max_tokens=4)


def test_start_up_says_which_ops(server) -> None:
    need_compiled_ops()
    line = f"layers x 3 KV heads, ops: native ({ops.instruction_set()})\n"
    assert line in server.output()


def test_summary_line_and_empty_pool_after_all(server, client) -> None:
    deadline = time.monotonic() + 30
    pattern = r"INFO.*kv-compress: \d+ prompts \(\d+ compressed, .* blocks returned to the pool"
    while not re.search(pattern, server.output()):
        assert time.monotonic() < deadline, "no summary line within 30 s"
        time.sleep(1)
    client.completions.create(model="smollm2", prompt="ok", max_tokens=2)
    deadline = time.monotonic() + 30
    while server.metric("vllm:kv_cache_usage_perc") != 0.0:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert server.metric("vllm:num_requests_running") == 0
