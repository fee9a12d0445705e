"""A scorer of another package in a real server, whose engine and workers are processes."""

from __future__ import annotations

import re

import pytest
from outside_packages import install, install_example
from server_process import serving

BUDGET = 320


@pytest.fixture(scope="module")
def server(model, device, tmp_path_factory):
    packages = tmp_path_factory.mktemp("packages")
    install_example(packages)
    # Beside it one that ends every process which imports it, and one that wants our name.
    install(packages, "own-exit", {"own-exit": "own_exit:Own"}, "raise SystemExit(3)")
    install(packages, "own-clash", {"snapkv": "own_clash:Own"}, "raise SystemExit(4)")
    flags = ["--served-model-name", "smollm2", "--kv-compress", "value-norm"]
    flags += ["--kv-compress-budget", str(BUDGET), "--kv-compress-options", '{"num_sinks": 2}']
    flags += ["--max-model-len", "2560", "--kv-cache-memory-bytes", str(256 << 20)]
    flags += ["--enforce-eager", "--max-num-seqs", "4"]
    folder = tmp_path_factory.mktemp("server")
    environment = {"PYTHONPATH": str(packages), "VLLM_LOGGING_LEVEL": "DEBUG"}
    with serving([model, *flags], folder, **environment) as server:
        yield server


def test_prompts_are_compressed_by_it(server, prose) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    for seed in range(2):
        reply = client.completions.create(
            model="smollm2", prompt=prose(seed, 90), temperature=0, max_tokens=8
        )
        assert reply.choices[0].text
    output = server.output()
    assert f"kv-compress: value-norm, budget {BUDGET}, window 32, granularity token" in output
    assert "kv-compress: value-norm does not look at the question" in output
    kept = re.findall(r"kv-compress: request \S+: prompt \d+ tokens, kept (\d+) per head", output)
    assert len(kept) == 2
    assert all(BUDGET - 32 < int(tokens) <= BUDGET for tokens in kept)
