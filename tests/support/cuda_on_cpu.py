"""The CUDA side of the seam inside a real engine on a CPU, on either of vLLM's model runners.

vLLM's own CPU worker, model runner, scheduler and block pool, with our CUDA engine, builder and
impl in place of the CPU ones. References stand in for our kernels and plain torch for vLLM's
compiled ops, while its FlashAttention builder and impl run. Model Runner V2 has its Triton kernels
run in Triton's interpreter.

As a script it reads a run from standard input as JSON and prints what came out; see `main`.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any


def pretend_triton_has_a_cpu_backend() -> None:
    """Let vLLM's CPU build use Triton, which then has to run interpreted. Before importing vLLM."""
    assert "vllm" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def use_cuda_side(patch: Any) -> None:
    """Make engines of this process take the CUDA side; `patch` is a pytest MonkeyPatch.

    As on a GPU, layers with a sliding window get the stock FlashAttention backend. Engines without
    compression stay what they are.
    """
    from cuda_path_worker import CUDAPathWorker
    from plain_flash_attention import use_plain_attention
    from vllm.config import get_current_vllm_config
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_kvcompress.vllm_integration import platforms

    stock_choice = CpuPlatform.get_attn_backend_cls

    def choose(selected: Any, *args: Any, **kwargs: Any) -> str:
        if selected is AttentionBackendEnum.CUSTOM:
            return selected.get_path()
        kinds = get_current_vllm_config().attention_config.backend_per_kind
        if AttentionBackendEnum.CUSTOM in kinds.values():
            return AttentionBackendEnum.FLASH_ATTN.get_path()
        return stock_choice(selected, *args, **kwargs)

    patch.setattr(CpuPlatform, "get_attn_backend_cls", staticmethod(choose))
    patch.setattr(platforms, "PLATFORMS", (CUDAPathWorker.platform,))
    use_plain_attention(patch)


def main() -> None:
    """Run an engine and print one line, 'RESULT ' and JSON.

    Standard input: `runner` ('cpu', 'v1' or 'v2'; the first is the CPU side), `model` (folder),
    `engine` (arguments of LLM), and `scenarios`, each with method, ratio, options, prompts (token
    ids) and max_tokens. The result has the model runner's module, and per scenario its setting,
    each prompt's text (token ids), cached tokens, one_shot and kept_per_head, and the preemptions
    so far.
    """
    run = json.loads(sys.stdin.read())
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if run["runner"] == "v2":
        pretend_triton_has_a_cpu_backend()
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import pytest
    from vllm import SamplingParams

    from vllm_kvcompress import LLM

    with pytest.MonkeyPatch.context() as patch:
        if run["runner"] != "cpu":
            use_cuda_side(patch)
        engine = LLM(run["model"], kv_compress="snapkv", kv_compress_ratio=0.5, **run["engine"])
        results = []
        for scenario in run["scenarios"]:
            engine.kv_compress_reconfigure(
                method=scenario["method"], ratio=scenario["ratio"], options=scenario["options"]
            )
            engine.reset_prefix_cache()
            params = SamplingParams(
                temperature=0, max_tokens=scenario["max_tokens"], ignore_eos=True
            )
            requests = [{"prompt_token_ids": prompt} for prompt in scenario["prompts"]]
            outputs = engine.generate(requests, params, use_tqdm=False)
            records = {r["request_id"]: r for r in engine.kv_compress_stats()["requests"]}
            preemptions = [m for m in engine.get_metrics() if m.name == "vllm:num_preemptions"]
            results.append(
                {
                    "scenario": {k: scenario[k] for k in ("method", "ratio", "options")},
                    "texts": [list(output.outputs[0].token_ids) for output in outputs],
                    "cached": [output.num_cached_tokens for output in outputs],
                    "one_shot": [records[output.request_id]["one_shot"] for output in outputs],
                    "kept": [records[output.request_id]["kept_per_head"] for output in outputs],
                    "preemptions": sum(metric.value for metric in preemptions),
                }
            )
        runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
        print("RESULT", json.dumps({"runner": type(runner).__module__, "scenarios": results}))
        engine.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
