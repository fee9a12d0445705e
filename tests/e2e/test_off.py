"""Off means off: the same tokens as stock vLLM."""

from __future__ import annotations

import pytest

from vllm_kvcompress import KVCompressConfigError

WORKERS = {
    "cpu": "vllm.v1.worker.cpu_worker.CPUWorker",
    "cuda": "vllm.v1.worker.gpu_worker.Worker",
}


@pytest.fixture(scope="module")
def prompts(prose) -> list[str]:
    return [prose(seed, 2 + 14 * seed) for seed in range(6)]


def _generate(engine, prompts: list[str]) -> list[list[tuple[int, ...]]]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    sampled = SamplingParams(temperature=0.9, top_p=0.9, seed=7, max_tokens=24, ignore_eos=True)
    # One at a time: the batch that a request shares changes the last bits of its matmuls.
    return [
        [
            tuple(engine.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids)
            for params in (greedy, sampled)
        ]
        for prompt in prompts
    ]


@pytest.fixture(scope="module")
def stock_tokens(model, prompts):
    """Tokens of vLLM with no plugin loaded at all, from a process of its own."""
    import json
    import os
    import subprocess
    import sys

    program = (
        "import json, sys\n"
        "def main():\n"
        "    from vllm import LLM, SamplingParams\n"
        "    spec = json.load(sys.stdin)\n"
        "    engine = LLM(spec['model'], max_model_len=2560, max_num_seqs=8,\n"
        "                 kv_cache_memory_bytes=256 << 20, block_size=32, enforce_eager=True)\n"
        "    both = [dict(temperature=0), dict(temperature=0.9, top_p=0.9, seed=7)]\n"
        "    out = [[engine.generate([p], SamplingParams(max_tokens=24, ignore_eos=True, **s),\n"
        "                            use_tqdm=False)[0].outputs[0].token_ids for s in both]\n"
        "           for p in spec['prompts']]\n"
        "    print('TOKENS ' + json.dumps([[list(t) for t in pair] for pair in out]))\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps({"model": model, "prompts": prompts}),
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_PLUGINS": ""},
        timeout=500,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, result.stderr[-3000:]
    return [[tuple(tokens) for tokens in pair] for pair in json.loads(lines[0][7:])]


def test_plugin_installed_but_not_asked_for(start_engine, device, prompts, stock_tokens) -> None:
    engine = start_engine()
    config = engine.llm_engine.vllm_config
    assert config.parallel_config.worker_cls == WORKERS[device]
    assert "kv_compress" not in config.additional_config
    for call in (engine.kv_compress_stats, engine.kv_compress_reconfigure):
        with pytest.raises(KVCompressConfigError, match="runs without KV compression"):
            call()
    assert _generate(engine, prompts) == stock_tokens


def test_budget_above_every_prompt(
    engines_in_process, start_engine, device, prompts, stock_tokens
) -> None:
    engine = start_engine(kv_compress="pyramidkv", kv_compress_budget=2500)
    tokens = _generate(engine, prompts)
    if device == "cpu":
        # On a GPU other kernels decode; see test_model_shapes for how near they come.
        assert tokens == stock_tokens
    stats = engine.kv_compress_stats()
    assert stats["totals"]["prompts"] == 2 * len(prompts)
    assert stats["totals"]["compressed_prompts"] == 0
    assert stats["totals"]["evicted_tokens"] == 0
