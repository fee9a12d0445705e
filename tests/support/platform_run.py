"""An engine on one of the platforms, in a process of its own: what it generates and keeps.

As a script it reads a run from standard input as JSON and prints what came out; see `main`.
"""

from __future__ import annotations

import json
import os
import sys

from cuda_on_cpu import pretend_triton_has_a_cpu_backend, use_cuda_side


def main() -> None:
    """Run an engine and print one line, 'RESULT ' and JSON.

    Standard input: `runner` ('cpu' or 'plain', these platforms; 'v1' or 'v2', the CUDA side on that
    model runner), `model` (folder), `engine` (arguments of LLM), and `scenarios`, each with method,
    ratio, options, prompts (token ids) and max_tokens. The result has the model runner's module,
    and per scenario its setting, each prompt's text (token ids), cached tokens, one_shot and
    kept_per_head, and the preemptions so far.
    """
    run = json.loads(sys.stdin.read())
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if run["runner"] == "v2":
        pretend_triton_has_a_cpu_backend()
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import pytest
    from plain_platform.worker import PlainWorker
    from vllm import SamplingParams

    from vllm_kvcompress import LLM

    with pytest.MonkeyPatch.context() as patch:
        if run["runner"] == "plain":
            run["engine"]["worker_cls"] = PlainWorker.platform.worker
        elif run["runner"] != "cpu":
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
