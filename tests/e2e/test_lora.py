"""LoRA adapters with compression: as if their weights were part of the model."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
from in_process_engines import start, stop
from tiny_models import tiny_llama

# Merged weights round differently in half precision: not on a GPU.
pytestmark = pytest.mark.parametrize(
    "device", ["cpu", "cuda_on_cpu"], indirect=True, scope="module"
)
RANK, ALPHA = 8, 32
# Scores by queries alone, and by the output projection, which the adapter leaves as it is.
METHODS = ("snapkv", "span")


def prompt(length):
    draw = random.Random(length).randrange
    return [draw(5, 40_000) for _ in range(length)]


PROMPTS = [prompt(length) for length in (333, 600, 40)]


@pytest.fixture(scope="module")
def models(model, tmp_path_factory):
    """A model, an adapter for it, and the model with the adapter's weights added."""
    from safetensors.torch import load_file, save_file

    folders = {name: tmp_path_factory.mktemp(name) for name in ("base", "adapter", "merged")}
    for name in ("base", "merged"):
        tiny_llama(folders[name], model)
    weights = load_file(folders["merged"] / "model.safetensors")
    generator, adapter = torch.Generator().manual_seed(3), {}
    for name in [n for n in weights if n.endswith(("q_proj.weight", "k_proj.weight"))]:
        num_out, num_in = weights[name].shape
        down = torch.randn(RANK, num_in, generator=generator) / 8
        up = torch.randn(num_out, RANK, generator=generator) / 8
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"] = down, up
        weights[name] += ALPHA / RANK * up @ down
    save_file(weights, folders["merged"] / "model.safetensors", metadata={"format": "pt"})
    save_file(adapter, folders["adapter"] / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj"],
    }
    (folders["adapter"] / "adapter_config.json").write_text(json.dumps(config))
    return SimpleNamespace(**{name: str(folder) for name, folder in folders.items()})


def run(engine, method, requests):
    """Tokens and kept_per_head of (prompt, adapter or None)."""
    from vllm import SamplingParams

    engine.kv_compress_reconfigure(method=method, ratio=0.7)
    engine.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = engine.generate(
        [{"prompt_token_ids": tokens} for tokens, _ in requests],
        params,
        use_tqdm=False,
        lora_request=[adapter for _, adapter in requests],
    )
    records = {r["request_id"]: r for r in engine.kv_compress_stats()["requests"]}
    return [
        (list(output.outputs[0].token_ids), records[output.request_id]["kept_per_head"])
        for output in outputs
    ]


SETTINGS = {"kv_compress": "span", "kv_compress_ratio": 0.7, "dtype": "float32"}


@pytest.fixture(scope="module")
def expected(models, engines_in_process):
    """By model and method, what the CPU side makes of models without adapters."""
    results = {}
    for name in ("base", "merged"):
        engine = start(getattr(models, name), **SETTINGS)
        for method in METHODS:
            results[name, method] = run(engine, method, [(tokens, None) for tokens in PROMPTS])
        stop(engine)
    return results


@pytest.fixture(scope="module")
def engine(models, expected, device):
    engine = start(models.base, **SETTINGS, enable_lora=True, max_lora_rank=RANK)
    yield engine
    stop(engine)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_as_good_as_merged_weights(engine, models, expected, method) -> None:
    from vllm.lora.request import LoRARequest

    base, merged = (expected[name, method] for name in ("base", "merged"))
    assert base != merged
    # One after the other: in a batch with adapters, vLLM 0.32 on a CPU changes what requests
    # without one get, with this plugin or not.
    adapter = LoRARequest("adapter", 1, models.adapter)
    assert run(engine, method, [(tokens, adapter) for tokens in PROMPTS]) == merged
    assert run(engine, method, [(tokens, None) for tokens in PROMPTS]) == base
