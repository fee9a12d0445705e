"""vLLM's engine with and without compression, in this process, with random weights.

    KVC_RESULT=engine.json python scripts/gpu/engine_run.py [--graphs] [--dry-run]

Model Runner V2. Engines in turn: span with 0.875 of every prompt removed, the same engine with
nothing removed, and stock vLLM. Each one decodes batches of made-up prompts; log-probabilities must
be finite, and those of nothing removed must be stock's, as far as both chose the same tokens.
`--graphs` captures decode steps and has vLLM refuse to compile a kernel while it serves; else steps
run eagerly, and the kernels of some are counted.

A row is written after every measurement, and one for what fails. Exit status 1 if anything did.
`--dry-run`: a tiny model on vLLM for CPUs with this package's CUDA side in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "scripts"))

METHOD, REMOVED = "span", 0.875
# Of log-probabilities in bfloat16, between two kernels for the same attention.
TOLERANCE = 0.15
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Load:
    """Prompts of one length, and how many tokens each is answered with."""

    batch: int
    prompt_len: int
    output_len: int

    def prompts(self, vocab_size: int) -> list[dict[str, list[int]]]:
        """Random token ids, the same every time."""
        draw = random.Random(self.prompt_len * 1000 + self.batch).randrange
        return [
            {"prompt_token_ids": [draw(5, vocab_size) for _ in range(self.prompt_len)]}
            for _ in range(self.batch)
        ]


@dataclass
class Plan:
    """What is run: the model's folder, arguments of every engine, and loads."""

    model: str
    vocab_size: int
    settings: dict[str, Any]
    loads: list[Load]
    is_dry: bool
    has_graphs: bool


@dataclass
class Report:
    """Rows, written to a file after each; `is_fine` is whether all went well."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    is_fine: bool = True

    def add(self, what: str, **row: Any) -> None:
        """A row; one with an 'error' is a failure."""
        self.rows.append({"what": what, **row})
        self.is_fine &= "error" not in row
        self.path.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(self.rows[-1]), flush=True)


def tiny_plan(folder: Path, has_graphs: bool) -> Plan:
    """A model that a CPU runs in no time."""
    (folder / "config.json").write_text(json.dumps(TINY))
    settings = {
        "max_model_len": 320,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 32 << 20,
        "block_size": 32,
        "dtype": "float32",
        "enforce_eager": True,
    }
    loads = [Load(1, 150, 4), Load(3, 200, 4)]
    return Plan(str(folder), TINY["vocab_size"], settings, loads, True, has_graphs)


def gpu_plan(has_graphs: bool) -> Plan:
    """The 8B shape."""
    folder = REPO / "configs" / "models" / "llama-3.1-8b"
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    settings: dict[str, Any] = {
        "max_model_len": 4352,
        "max_num_seqs": 64 if has_graphs else 8,
        "kv_cache_memory_bytes": 20 << 30,
        # Of what must be free at start; the pool's size is given.
        "gpu_memory_utilization": 0.45,
        "dtype": "bfloat16",
    }
    if has_graphs:
        settings["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 8, 32, 64],
        }
        loads = [Load(8, 4096, 65), Load(32, 4096, 65), Load(1, 4096, 65), Load(64, 1024, 65)]
    else:
        settings["enforce_eager"] = True
        loads = [Load(8, 4096, 33)]
    return Plan(str(folder), vocab_size, settings, loads, False, has_graphs)


def start_engine(plan: Plan, is_stock: bool) -> Any:
    """An engine of the plan."""
    import vllm

    import vllm_kvcompress

    settings = {
        **plan.settings,
        "model": plan.model,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "seed": 0,
        "jit_monitor_mode": "error" if plan.has_graphs else "warn",
    }
    if is_stock:
        return vllm.LLM(**settings)
    return vllm_kvcompress.LLM(kv_compress=METHOD, kv_compress_ratio=REMOVED, **settings)


def seed_weights(model: Any) -> int:
    """Fill a model's weights in place, so that its layers have something to say; returns how many.

    vLLM's own dummy weights are so small that every token is about equally likely.
    """
    import torch

    generator = None
    parameters = sorted(model.named_parameters(), key=lambda item: item[0])
    for name, weight in parameters:
        if generator is None:
            generator = torch.Generator(weight.device).manual_seed(0)
        if not weight.numel():
            # vLLM's CPU build keeps these elsewhere.
            continue
        if "norm" in name:
            weight.data.fill_(1.0)
        else:
            weight.data.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    return len(parameters)


def release() -> None:
    """Give back what an engine that is shut down and forgotten took; another one can start then."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def generate(engine: Any, plan: Plan, load: Load, output_len: int) -> tuple[float, list[Any]]:
    """(seconds, outputs) of a load's prompts, all sent at once."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=output_len, ignore_eos=True, logprobs=1, detokenize=False
    )
    start = time.perf_counter()
    outputs = engine.generate(load.prompts(plan.vocab_size), params, use_tqdm=False)
    return time.perf_counter() - start, outputs


def chosen(outputs: list[Any]) -> list[list[tuple[int, float]]]:
    """Per prompt (token, its log-probability) of every step.

    Raises:
        ValueError: if a log-probability is not finite.
    """
    texts = []
    for output in outputs:
        sample = output.outputs[0]
        pairs = [
            (token, place[token].logprob)
            for token, place in zip(sample.token_ids, sample.logprobs, strict=True)
        ]
        if not all(math.isfinite(logprob) for _, logprob in pairs):
            raise ValueError(f"log-probabilities that are not finite: {pairs[:4]}")
        texts.append(pairs)
    return texts


def measure(engine: Any, plan: Plan, load: Load) -> tuple[dict[str, Any], Any]:
    """(a row's numbers, what was chosen) of a load."""
    prefill_s, _ = generate(engine, plan, load, 1)
    total_s, outputs = generate(engine, plan, load, load.output_len)
    texts = chosen(outputs)
    steps = load.output_len - 1
    row = {
        "batch": load.batch,
        "prompt_len": load.prompt_len,
        "prefill_s": prefill_s,
        "ms_per_output_token": 1000 * (total_s - prefill_s) / steps,
        "output_tokens_per_s": load.batch * steps / max(total_s - prefill_s, 1e-9),
    }
    return row, texts


def compare(texts: Any, stock: Any) -> dict[str, float]:
    """How log-probabilities differ where all tokens before were the same.

    Returns:
        compared: number of them; max_difference; first_difference: the largest of the first
        tokens, which depend on the prompt alone.
    """
    differences, first = [], []
    for ours, theirs in zip(texts, stock, strict=True):
        for place, ((token, logprob), (other, expected)) in enumerate(
            zip(ours, theirs, strict=True)
        ):
            differences.append(abs(logprob - expected))
            if place == 0:
                first.append(differences[-1])
            if token != other:
                break
    return {
        "compared": len(differences),
        "max_difference": max(differences),
        "first_difference": max(first),
    }


def count_kernels(engine: Any, plan: Plan, load: Load) -> dict[str, Any]:
    """Kernels of a decode step: a longer answer's less those of a single token."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CPU if plan.is_dry else ProfilerActivity.CUDA
    counts, steps = [], 2 if plan.is_dry else 8
    for output_len in (1, 1 + steps):
        with profile(activities=[activity]) as profiler:
            generate(engine, plan, load, output_len)
            if not plan.is_dry:
                torch.cuda.synchronize()
        counts.append(Counter({e.key: e.count for e in profiler.key_averages()}))
    per_step = {name: (n - counts[0][name]) / steps for name, n in counts[1].items()}
    most = sorted(per_step.items(), key=lambda item: -item[1])[:25]
    return {
        "launches_per_step": sum(per_step.values()),
        "most": {name[:80]: count for name, count in most},
    }


def attempt(report: Report, what: str, work: Any, **row: Any) -> Any:
    """What `work(row)` returns; None if it fails, which the row says.

    An interrupt, as at a step's limit, is said too, and goes on.
    """
    start = time.perf_counter()
    try:
        return work(row)
    except BaseException as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if not isinstance(error, Exception):
            raise
        return None
    finally:
        row["seconds"] = time.perf_counter() - start
        report.add(what, **row)


def run_loads(engine: Any, plan: Plan, report: Report, label: str) -> dict[Load, Any]:
    """Measure every load; what was chosen, of those that went well."""
    texts = {}

    def seed(row: dict[str, Any]) -> None:
        row["weights"] = engine.apply_model(seed_weights)

    attempt(report, "seed weights", seed, engine=label)
    # What a first step compiles is not timed.
    attempt(report, "warm up", lambda row: generate(engine, plan, plan.loads[0], 2), engine=label)
    for load in plan.loads:

        def work(row: dict[str, Any], load: Load = load) -> Any:
            numbers, found = measure(engine, plan, load)
            row.update(numbers)
            return found

        found = attempt(report, "decode", work, engine=label)
        if found is not None:
            texts[load] = found
    return texts


def check_kept(engine: Any, report: Report) -> None:
    """Prompts must have been cut to an eighth, or nobody measured compression."""

    def work(row: dict[str, Any]) -> None:
        last = engine.kv_compress_stats()["requests"][-1]
        row["kept_tokens"], row["prompt_len"] = last["kept_tokens"], last["prompt_len"]
        share = row["kept_tokens"] / row["prompt_len"]
        if not share < 0.5:
            raise ValueError(f"{share:.0%} of a prompt was kept")

    attempt(report, "kept", work)


def report_difference(report: Report, plan: Plan, found: dict[str, dict[Load, Any]]) -> None:
    """Both of our settings against stock; nothing removed must be the same but for rounding."""
    for label in ("nothing removed", f"{REMOVED} removed"):
        for load, stock in found.get("stock", {}).items():
            if load not in found.get(label, {}):
                continue

            def work(
                row: dict[str, Any], label: str = label, load: Load = load, stock: Any = stock
            ):
                row.update(compare(found[label][load], stock))
                if label == "nothing removed" and not row["first_difference"] < TOLERANCE:
                    raise ValueError(f"first tokens differ by {row['first_difference']:.3f}")
                if label != "nothing removed" and not row["max_difference"]:
                    raise ValueError("what was removed made no difference")

            attempt(report, "against stock", work, engine=label, batch=load.batch)


def run_ours(plan: Plan, report: Report, found: dict[str, dict[Load, Any]]) -> None:
    """One engine, with most of every prompt removed, then with nothing; adds what they chose."""
    label = f"{REMOVED} removed"
    engine = attempt(report, "start", lambda row: start_engine(plan, False), engine=label)
    if engine is None:
        return
    found[label] = run_loads(engine, plan, report, label)
    check_kept(engine, report)
    if not plan.has_graphs:

        def count(row: dict[str, Any]) -> None:
            row.update(count_kernels(engine, plan, plan.loads[0]))

        attempt(report, "kernels", count, engine=label)

    def reconfigure(row: dict[str, Any]) -> bool:
        engine.kv_compress_reconfigure(method=METHOD, ratio=0.0)
        return True

    if attempt(report, "reconfigure", reconfigure):
        found["nothing removed"] = run_loads(engine, plan, report, "nothing removed")
    shut_down = engine.llm_engine.engine_core.shutdown
    attempt(report, "stop", lambda row: shut_down(), engine=label)


def run_stock(plan: Plan, report: Report, found: dict[str, dict[Load, Any]]) -> None:
    """The same loads without compression; adds what it chose."""
    engine = attempt(report, "start", lambda row: start_engine(plan, True), engine="stock")
    if engine is None:
        return
    found["stock"] = run_loads(engine, plan, report, "stock")
    shut_down = engine.llm_engine.engine_core.shutdown
    attempt(report, "stop", lambda row: shut_down(), engine="stock")


def run(plan: Plan, report: Report) -> None:
    """Both engines, and what came of them side by side."""
    found: dict[str, dict[Load, Any]] = {}
    for one in (run_ours, run_stock):
        one(plan, report, found)
        attempt(report, "release", lambda row: release())
    report_difference(report, plan, found)


def on_a_cpu(stack: ExitStack) -> None:
    """Have vLLM for CPUs take this package's CUDA side; before vLLM is imported."""
    sys.path.insert(0, str(REPO / "tests" / "support"))
    import pytest
    from cuda_on_cpu import pretend_triton_has_a_cpu_backend, use_cuda_side

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    pretend_triton_has_a_cpu_backend()
    use_cuda_side(stack.enter_context(pytest.MonkeyPatch.context()))


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graphs", action="store_true", help="captured decode steps")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU")
    arguments = parser.parse_args()
    report = Report(Path(os.environ["KVC_RESULT"]))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    with ExitStack() as stack:
        if arguments.dry_run:
            on_a_cpu(stack)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            plan = tiny_plan(folder, arguments.graphs)
        else:
            plan = gpu_plan(arguments.graphs)
        run(plan, report)
    return 0 if report.is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
