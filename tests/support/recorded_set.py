"""The recorded set: what 20 prompts give under 24 settings, to compare two versions.

A record is made of every prompt x method x granularity x way of prefill: its text, what every head
keeps, and a digest of the region's keys and values, which says which tokens were kept and where.
In float32, on one machine, two versions that do the same have the same records. Records of
different machines are not comparable: sums of floats differ in their last bits.

As a script, with PYTHONPATH=tests/support::

    python -m recorded_set record --side cpu --prefill chunked --model MODEL --out A
    python -m recorded_set compare A B

`--side cuda` runs the CUDA side without a GPU (see `cuda_on_cpu`), its kernels in Triton's
interpreter, on a tiny random model with the tokenizer of `--model`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METHODS = ("span", "snapkv", "pyramidkv", "ada-criticalkv", "kvc", "h2o")
GRANULARITIES = ("page", "token")
# Chunked: several steps per prompt. One-shot: one step, no blocks for what is evicted.
PREFILLS = ("chunked", "one-shot")
RATIO = 0.75
NUM_PROMPTS = 20
# Per side: prompt lengths from and to, new tokens, and the engine's arguments.
SIDES: dict[str, dict[str, Any]] = {
    "cpu": {
        "lengths": (150, 900),
        "max_tokens": 24,
        "chunk": 256,
        "engine": {"max_model_len": 1024, "kv_cache_memory_bytes": 2 << 30},
    },
    "cuda": {
        "lengths": (120, 330),
        "max_tokens": 6,
        "chunk": 100,
        "engine": {"max_model_len": 384, "kv_cache_memory_bytes": 64 << 20},
    },
}


def prompts(side: str) -> list[list[int]]:
    """Token ids, the same on every machine."""
    shortest, longest = SIDES[side]["lengths"]
    draw = random.Random(22)
    sizes = [draw.randint(shortest, longest) for _ in range(NUM_PROMPTS)]
    # A few words come again and again, as in prose.
    words = [draw.randrange(100, 40_000) for _ in range(60)]
    return [[draw.choice(words) for _ in range(size)] for size in sizes]


def settings() -> Iterator[tuple[str, str]]:
    """Every (method, granularity)."""
    for method in METHODS:
        for granularity in GRANULARITIES:
            yield method, granularity


class Digests:
    """Digests of what requests keep, read from vLLM's pool once a request is compacted.

    Args:
        engine: an `LLM` in this process.
    """

    def __init__(self, engine: Any) -> None:
        self.by_request: dict[str, str] = {}
        self._engine = engine
        self._core = engine.llm_engine.engine_core.engine_core
        self._worker = engine.llm_engine.model_executor.driver_worker.worker
        self._schedule = self._core.scheduler.schedule
        # The pool is whole before every step, and no request of the step before has left it.
        self._core.scheduler.schedule = self._read_and_schedule

    def _read_and_schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.read()
        return self._schedule(*args, **kwargs)

    def read(self) -> None:
        """Take in the requests that run."""
        from vllm_kvcompress.memory import CompressedRow
        from vllm_kvcompress.vllm_integration.scheduler.manager import compressing_manager

        manager = compressing_manager(self._core.scheduler.kv_cache_manager.coordinator)
        running = {request.request_id for request in self._core.scheduler.running}
        for name, raw in self._worker.kv_compress_rows().items():
            row = CompressedRow.from_dict(raw)
            if row.is_compacted and name in running and name not in self.by_request:
                first = row.layout.region_column
                region = slice(first, first + row.layout.points[-1].region_blocks)
                blocks = manager.req_to_blocks[name][region]
                self.by_request[name] = self._digest([block.block_id for block in blocks])

    def _digest(self, blocks: list[int]) -> str:
        layers = self._worker.vllm_config.compilation_config.static_forward_context
        digest = hashlib.sha256()
        for layer in layers.values():
            digest.update(layer.kv_cache[blocks].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def record_engine(model: str, side: str, prefill: str) -> list[dict[str, Any]]:
    """All records of one way of prefill."""
    from vllm import SamplingParams

    from vllm_kvcompress import LLM

    choice = SIDES[side]
    max_len = choice["engine"]["max_model_len"]
    engine = LLM(
        model,
        dtype="float32",
        kv_compress="snapkv",
        kv_compress_ratio=0.5,
        block_size=32,
        max_num_seqs=8,
        max_num_batched_tokens=choice["chunk"] if prefill == "chunked" else 2 * max_len,
        enable_prefix_caching=False,
        async_scheduling=False,
        enforce_eager=True,
        disable_log_stats=False,
        **choice["engine"],
    )
    digests = Digests(engine)
    asked = [{"prompt_token_ids": ids} for ids in prompts(side)]
    params = SamplingParams(temperature=0, max_tokens=choice["max_tokens"], ignore_eos=True)
    records = []
    for method, granularity in settings():
        engine.kv_compress_reconfigure(
            method=method,
            ratio=RATIO,
            options={
                "granularity": granularity,
                "one_shot": "never" if prefill == "chunked" else "always",
            },
        )
        outputs = engine.generate(asked, params, use_tqdm=False)
        stats = {r["request_id"]: r for r in engine.kv_compress_stats()["requests"]}
        for i, output in enumerate(outputs):
            stat = stats[output.request_id]
            records.append(
                {
                    "setting": f"{method}, {granularity}, {prefill}",
                    "prompt": i,
                    "text": list(output.outputs[0].token_ids),
                    "one_shot": stat["one_shot"],
                    "kept_per_head": _short(stat["kept_per_head"]),
                    "region": digests.by_request[stat["internal_id"]],
                }
            )
        print(f"{side} {prefill} {method} {granularity}", file=sys.stderr, flush=True)
    engine.llm_engine.engine_core.shutdown()
    return records


def _short(kept_per_head: Any) -> str:
    """A digest of counts per layer and head."""
    return hashlib.sha256(json.dumps(kept_per_head).encode()).hexdigest()[:16]


def record(side: str, model: str, prefill: str) -> list[dict[str, Any]]:
    """All records of one side and way of prefill, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if side == "cpu":
        return record_engine(model, side, prefill)
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["KVC_TEST_OPS"] = "triton"
    import pytest
    from cuda_on_cpu import use_cuda_side
    from tiny_models import tiny_llama

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        tiny = tiny_llama(Path(folder), model, num_hidden_layers=2)
        use_cuda_side(patch)
        return record_engine(tiny, side, prefill)


def differences(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """One line for every record that differs, with the fields that do."""
    key = ("setting", "prompt")
    ours = {tuple(r[k] for k in key): r for r in after}
    theirs = {tuple(r[k] for k in key): r for r in before}
    lines = [f"{name}: in one set only" for name in ours.keys() ^ theirs.keys()]
    for name in ours.keys() & theirs.keys():
        fields = [f for f in theirs[name] if theirs[name][f] != ours[name].get(f)]
        if fields:
            lines.append(f"{name}: {', '.join(fields)}")
    return sorted(lines)


def main() -> int:
    """Record or compare; returns 1 if two sets differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--side", choices=tuple(SIDES), required=True)
    recording.add_argument("--prefill", choices=PREFILLS, required=True)
    recording.add_argument("--model", required=True)
    recording.add_argument("--out", type=Path, required=True)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        records = record(args.side, args.model, args.prefill)
        lines = ",\n".join(json.dumps(r) for r in records)
        args.out.write_text(f"[\n{lines}\n]\n")
        return 0
    before, after = (json.loads(path.read_text()) for path in (args.before, args.after))
    lines = differences(before, after)
    print("\n".join(lines) or f"{len(before)} records are the same")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
