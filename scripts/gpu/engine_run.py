"""vLLM's engine with and without compression, in this process, with random weights.

    KVC_RESULT=engine.json python scripts/gpu/engine_run.py [--graphs] [--dry-run]

Model Runner V2. Engines in turn: this package's with nothing removed of any prompt, and then with
span and 0.875 removed; and stock vLLM. Each one decodes batches of made-up prompts, the smallest
first; log-probabilities must be finite, and those of nothing removed must be stock's, as far as
both chose the same tokens. Stock's are compared after each batch. This package's kernels must all
have been compiled before the first request. `--graphs` captures decode steps; else steps run
eagerly, and at the end an engine's kernels are counted by a profiler.

A row is written after every measurement, and one for what fails. Exit status 1 if anything did.
`--dry-run`: a tiny model on vLLM for CPUs with this package's CUDA side in it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu.answers import Answers, chosen, compare
from gpu.launch_watch import LaunchWatch

REPO = Path(__file__).resolve().parents[2]

METHOD, REMOVED = "span", 0.875
# Of this package's engine, and of what it is asked for.
OURS, NOTHING, MOST = "compressing", "nothing removed", f"{REMOVED} removed"
# Of log-probabilities in bfloat16, between two kernels for the same attention.
TOLERANCE = 0.15
# Of the prompts of a batch, and of the tokens of an answer.
KEPT_PAIRS = 8
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


# What was chosen, by label and load.
Found = dict[str, dict[Load, Answers]]


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
    # Smallest first, here and below: what is known first is worth most.
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
        loads = [Load(1, 4096, 65), Load(8, 4096, 65), Load(64, 1024, 65), Load(32, 4096, 65)]
    else:
        settings["enforce_eager"] = True
        loads = [Load(2, 1024, 17), Load(8, 4096, 33)]
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


def measure(engine: Any, plan: Plan, load: Load) -> tuple[dict[str, Any], Answers]:
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
        # Enough to compare them later, should the other engine's come from another run.
        "chosen": [pairs[:KEPT_PAIRS] for pairs in texts[:KEPT_PAIRS]],
    }
    return row, texts


def kernel_counts(events: Iterable[Any], device_type: Any) -> Counter[str]:
    """How often each kernel ran: no copies, and no calls that launch one."""
    return Counter(
        {
            event.key: event.count
            for event in events
            if event.device_type == device_type and not event.key.startswith(("Memcpy", "Memset"))
        }
    )


def count_kernels(engine: Any, plan: Plan, load: Load) -> dict[str, Any]:
    """Kernels of a decode step: a longer answer's less those of a single token."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CPU if plan.is_dry else ProfilerActivity.CUDA
    device_type = DeviceType.CPU if plan.is_dry else DeviceType.CUDA
    counts, steps = [], 2 if plan.is_dry else 8
    for output_len in (1, 1 + steps):
        with profile(activities=[activity]) as profiler:
            generate(engine, plan, load, output_len)
            if not plan.is_dry:
                torch.cuda.synchronize()
        counts.append(kernel_counts(profiler.key_averages(), device_type))
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


def started(plan: Plan, report: Report, label: str, is_stock: bool) -> Any:
    """An engine with weights that say something, which has run once; None if it does not start."""
    engine = attempt(report, "start", lambda row: start_engine(plan, is_stock), engine=label)
    if engine is None:
        return None

    def seed(row: dict[str, Any]) -> None:
        row["weights"] = engine.apply_model(seed_weights)

    attempt(report, "seed weights", seed, engine=label)
    return engine


def warm_up(engine: Any, plan: Plan, report: Report, label: str) -> None:
    """What vLLM compiles for a first step is not timed."""
    attempt(report, "warm up", lambda row: generate(engine, plan, plan.loads[0], 2), engine=label)


def stop(engine: Any, report: Report, label: str) -> None:
    """Shut an engine down; its memory comes back once it is forgotten too."""
    shut_down = engine.llm_engine.engine_core.shutdown
    attempt(report, "stop", lambda row: shut_down(), engine=label)


def run_loads(
    engine: Any,
    plan: Plan,
    report: Report,
    label: str,
    found: Found,
    then: Callable[[Load], None] = lambda load: None,
) -> None:
    """Measure every load, and call `then` after each; adds what was chosen where it went well."""
    found[label] = {}
    for load in plan.loads:

        def work(row: dict[str, Any], load: Load = load) -> Any:
            numbers, texts = measure(engine, plan, load)
            row.update(numbers)
            return texts

        texts = attempt(report, "decode", work, engine=label)
        if texts is not None:
            found[label][load] = texts
            then(load)


def check_kept(engine: Any, report: Report) -> None:
    """Prompts must have been cut to an eighth, or nobody measured compression."""

    def work(row: dict[str, Any]) -> None:
        last = engine.kv_compress_stats()["requests"][-1]
        row["kept_tokens"], row["prompt_len"] = last["kept_tokens"], last["prompt_len"]
        share = row["kept_tokens"] / row["prompt_len"]
        if not share < 0.5:
            raise ValueError(f"{share:.0%} of a prompt was kept")

    attempt(report, "kept", work, engine=MOST)


def check_launches(watch: LaunchWatch, report: Report) -> None:
    """Every kernel of this package must have been ready before the first request."""

    def work(row: dict[str, Any]) -> None:
        row["ours"], row["others"] = Counter(watch.ours), Counter(watch.others)
        if watch.ours:
            raise ValueError(f"not compiled before requests came: {', '.join(row['ours'])}")

    attempt(report, "compiled while serving", work, engine=OURS)


def report_difference(report: Report, found: Found, load: Load) -> None:
    """Both of our settings against stock; nothing removed must be the same but for rounding."""
    for label in (NOTHING, MOST):
        if load not in found.get(label, {}):
            continue

        def work(row: dict[str, Any], label: str = label) -> None:
            row.update(compare(found[label][load], found["stock"][load]))
            if label == NOTHING and not row["first_difference"] < TOLERANCE:
                raise ValueError(f"first tokens differ by {row['first_difference']:.3f}")
            if label != NOTHING and not row["max_difference"]:
                raise ValueError("what was removed made no difference")

        where = {"batch": load.batch, "prompt_len": load.prompt_len}
        attempt(report, "against stock", work, engine=label, **where)


def run_ours(plan: Plan, report: Report, found: Found) -> None:
    """One engine, with nothing of any prompt removed, then with most; adds what they chose."""
    engine = started(plan, report, OURS, is_stock=False)
    if engine is None:
        return
    with LaunchWatch() as watch:
        warm_up(engine, plan, report, OURS)
        for label, ratio in ((NOTHING, 0.0), (MOST, REMOVED)):

            def reconfigure(row: dict[str, Any], ratio: float = ratio) -> bool:
                engine.kv_compress_reconfigure(method=METHOD, ratio=ratio)
                return True

            if attempt(report, "reconfigure", reconfigure, engine=label):
                run_loads(engine, plan, report, label, found)
        check_kept(engine, report)
    check_launches(watch, report)
    stop(engine, report, OURS)


def run_stock(plan: Plan, report: Report, found: Found) -> None:
    """The same loads without compression, compared as they come."""
    engine = started(plan, report, "stock", is_stock=True)
    if engine is None:
        return
    warm_up(engine, plan, report, "stock")

    def then(load: Load) -> None:
        report_difference(report, found, load)

    run_loads(engine, plan, report, "stock", found, then)
    stop(engine, report, "stock")


def run_profiler(plan: Plan, report: Report, found: Found) -> None:
    """Count kernels, in an engine of its own: a profiler may not work, or slow down the rest."""
    engine = started(plan, report, OURS, is_stock=False)
    if engine is None:
        return
    warm_up(engine, plan, report, OURS)

    def count(row: dict[str, Any]) -> None:
        row.update(count_kernels(engine, plan, plan.loads[0]))

    attempt(report, "kernels", count, engine=MOST)
    stop(engine, report, OURS)


def run(plan: Plan, report: Report) -> None:
    """All engines, one after the other."""
    found: Found = {}
    for one in (run_ours, run_stock, *([] if plan.has_graphs else [run_profiler])):
        one(plan, report, found)
        attempt(report, "release", lambda row: release())


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
