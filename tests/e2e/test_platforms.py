"""Platforms in real engines: the CPU side's texts, token by token.

The engine's own scheduler, block pool and model runner: chunked prefill, preemption, prefix
caching, async scheduling. The model is tiny and random, in float32. The CUDA side runs without a
GPU, on Model Runner V1 and V2 (see `cuda_on_cpu`).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_model

SUPPORT = Path(__file__).parents[1] / "support"


def prompt(length: int) -> list[int]:
    draw = random.Random(length).randrange
    return [draw(5, 40_000) for _ in range(length)]


# Steps of 320 tokens, so in chunks or not; at most some of these requests fit the pool at once.
FIVE = [prompt(length) for length in (300, 401, 40, 352, 277)]
SCENARIOS = [
    {"method": "span", "ratio": 0.75, "options": {}, "prompts": FIVE, "max_tokens": 8},
    {"method": "ada-criticalkv", "ratio": 0.8, "options": {"granularity": "token"}},
    {"method": "h2o", "ratio": 0.5, "options": {}},
    {"method": "pyramidkv", "ratio": 0.6, "options": {"suffix_tokens": 70}},
    {"method": "snapkv", "ratio": 0.0, "options": {}},
    {"method": "span", "ratio": 0.875, "options": {"one_shot": "always"}},
    {"method": "ada-snapkv", "ratio": 0.8, "options": {"one_shot": "always"}},
]
SCENARIOS = [{"prompts": FIVE, "max_tokens": 8, **scenario} for scenario in SCENARIOS]
# More than the pool holds once the texts have grown.
GROWING = {
    "method": "span",
    "ratio": 0.0,
    "options": {},
    "prompts": [prompt(length) for length in (250, 310, 100, 60)],
    "max_tokens": 70,
}
# The same prompt twice, and one that goes on from it.
AGAIN = {
    "method": "snapkv",
    "ratio": 0.75,
    "options": {},
    "prompts": [FIVE[0], FIVE[0], FIVE[0] + prompt(90)],
    "max_tokens": 6,
}
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 320,
    "num_gpu_blocks_override": 28,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 32,
    "enforce_eager": True,
    "disable_log_stats": False,
}


@pytest.fixture(scope="module")
def llama(model, tmp_path_factory):
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
    )
    return make_model(tmp_path_factory.mktemp("llama"), model, config)


def run(model: str, runner: str, scenarios: list[dict], **engine) -> dict:
    request = {
        "runner": runner,
        "model": model,
        "engine": {**ENGINE, **engine},
        "scenarios": scenarios,
    }
    command = [sys.executable, "-P", str(SUPPORT / "platform_run.py")]
    result = subprocess.run(
        command,
        input=json.dumps(request),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert result.returncode == 0 and lines, result.stdout[-3000:] + result.stderr[-6000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


def environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**inherited, "PYTHONPATH": str(SUPPORT)}


@pytest.fixture(scope="module")
def expected(llama):
    return run(llama, "cpu", [*SCENARIOS, GROWING, AGAIN])


def check(found: dict, expected: dict) -> None:
    settings = [scenario["scenario"] for scenario in expected["scenarios"]]
    for ours in found["scenarios"]:
        theirs = expected["scenarios"][settings.index(ours["scenario"])]
        assert ours["texts"] == theirs["texts"], ours["scenario"]
        assert ours["kept"] == theirs["kept"], ours["scenario"]
        assert ours["cached"] == theirs["cached"], ours["scenario"]
        assert ours["one_shot"] == theirs["one_shot"], ours["scenario"]


def test_the_run_has_what_it_is_for(expected):
    growing, again = expected["scenarios"][-2:]
    assert growing["preemptions"] > 0
    # Later prompts find the first one's blocks, up to the window.
    assert min(again["cached"][1:]) > 200
    # Those that fit a step, if they are compressed at all.
    for scenario in expected["scenarios"][5:7]:
        assert scenario["one_shot"] == [True, False, False, False, True]
    texts = [scenario["texts"] for scenario in expected["scenarios"][:7]]
    assert all(text != other for text, other in itertools.combinations(texts, 2))


@pytest.mark.parametrize(
    ("is_async", "scenarios"),
    [(True, [*SCENARIOS, GROWING, AGAIN]), (False, [SCENARIOS[0], SCENARIOS[5], GROWING])],
    ids=["async", "sync"],
)
def test_model_runner_v1(llama, expected, is_async, scenarios):
    found = run(llama, "v1", scenarios, async_scheduling=is_async)
    assert found["runner"] == "vllm.v1.worker.cpu_model_runner"
    check(found, expected)


@pytest.mark.parametrize(
    ("is_async", "scenarios"),
    [(True, [*SCENARIOS[:3], *SCENARIOS[5:], AGAIN]), (False, SCENARIOS[:1])],
    ids=["async", "sync"],
)
def test_model_runner_v2(llama, expected, is_async, scenarios):
    found = run(llama, "v2", scenarios, async_scheduling=is_async)
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    check(found, expected)


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_a_platform_from_elsewhere(llama, expected, is_async):
    """See `plain_platform`: attention by torch, chosen by its worker class."""
    found = run(llama, "plain", [*SCENARIOS, GROWING, AGAIN], async_scheduling=is_async)
    check(found, expected)
