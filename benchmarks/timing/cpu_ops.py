"""Time the compiled CPU ops against torch: scoring, selection and compaction of one prompt.

    python benchmarks/timing/cpu_ops.py --out cpu_ops.json

A prompt of random keys, values and queries lies in pages as vLLM's CPU kernel stores them, and is
compacted as the engine does it, by `Compactor`. The backends take turns, so that whatever else runs
on the machine slows all of them; what counts is the ratio of the medians. A row has p20, p50 and
p80 in milliseconds of scoring all layers, of the rest (selection and copies), and of both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
# This folder's names are too plain for others to find them at the top.
sys.path[:] = [path for path in sys.path if path != str(HERE)]
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "scripts")]

import machine

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.compactor import Compactor
from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.compaction.prompts import PromptCompaction
from vllm_kvcompress.compaction.scoring import Backends
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import CacheShape, PageFormat
from vllm_kvcompress.ops import native
from vllm_kvcompress.vllm_integration.platforms.cpu.page_order import find_page_order

BLOCK_SIZE = 32
RATIO = 0.75
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Model:
    """Shape of a model's attention: L, H, g, d."""

    num_layers: int
    num_kv_heads: int
    group: int
    head_size: int


SMOLLM2 = Model(30, 3, 3, 64)
LLAMA = Model(32, 8, 4, 128)
CASES = {
    "SmolLM2-135M, 1536 tokens": (SMOLLM2, 1536),
    "SmolLM2-135M, 6144 tokens": (SMOLLM2, 6144),
    "Llama-3.1-8B, 6144 tokens": (LLAMA, 6144),
}
CONFIGS = {
    "span": {"method": "span"},
    "snapkv": {"method": "snapkv"},
    "ada-snapkv": {"method": "ada-snapkv"},
}


class Prompt:
    """One prompt in a pool of its own."""

    def __init__(self, model: Model, num_tokens: int, settings: dict[str, Any]) -> None:
        self.model = model
        self.config = KVCompressConfig.from_dict({"ratio": RATIO, **settings})
        self.geometry = self.config.geometry(BLOCK_SIZE).of(num_tokens)
        self.shape = CacheShape(
            model.num_layers,
            model.num_kv_heads,
            model.group,
            PageFormat(str(DTYPE).removeprefix("torch."), BLOCK_SIZE, model.head_size),
        )
        generator = torch.Generator().manual_seed(0)
        num_blocks = num_tokens // BLOCK_SIZE + self.geometry.num_region_blocks
        size = (num_blocks * self.shape.pages_per_block, BLOCK_SIZE, 2 * model.head_size)
        self.pool = torch.empty(size, dtype=DTYPE).normal_(generator=generator)
        ids = torch.randperm(num_blocks, generator=generator)
        self.blocks, self.region = ids.tensor_split([num_tokens // BLOCK_SIZE])
        heads = (model.num_kv_heads, model.group, self.config.window, model.head_size)
        self.query = torch.randn(model.num_layers, *heads, generator=generator).to(DTYPE)
        root = torch.randn(
            model.num_kv_heads, model.head_size, model.head_size, generator=generator
        )
        layer = LayerParameters(scale=model.head_size**-0.5, output_root=root)
        self.layers = [layer] * model.num_layers
        self.order = find_page_order("vec", BLOCK_SIZE, model.head_size, DTYPE)

    def compactor(self, backend: str) -> Compactor:
        """Of these pages."""
        backends = Backends.all(backend)
        return Compactor(self.config, self.shape, self.pool, self.order, self.layers, backends)

    def run(self, compactor: Compactor) -> tuple[float, float, torch.Tensor]:
        """Seconds of scoring and of the rest, and the region."""
        collected = PromptCompaction(self.geometry, self.model.num_layers)
        collected.window_query = self.query
        collected.num_window_queries = [self.config.window] * self.model.num_layers
        row = torch.cat([self.blocks, self.region]).int()
        start = time.perf_counter()
        batch = compactor.batch([collected], row[None])
        for layer in range(self.model.num_layers):
            pages = compactor.pages(layer, self.blocks)
            compactor.score_layer(batch, layer, [None], [pages])
        scored = time.perf_counter()
        compactor.compact(batch)
        end = time.perf_counter()
        ids = ops.region_page_ids(self.region, self.shape.pages_per_block)
        return scored - start, end - scored, self.pool[ids]


def quantiles(seconds: list[float]) -> dict[str, float]:
    """p20, p50, p80 in milliseconds."""
    fifths = statistics.quantiles(seconds, n=10, method="inclusive")
    return {
        name: round(1000 * value, 3)
        for name, value in (("p20", fifths[1]), ("p50", fifths[4]), ("p80", fifths[7]))
    }


def measure(prompt: Prompt, backends: dict[str, str], repetitions: int) -> dict[str, Any]:
    """Times of every variant, which take turns; the first round does not count.

    Args:
        prompt: to compact.
        backends: instruction set by name of the variant; '' is torch.
        repetitions: rounds that count.
    """
    times: dict[str, dict[str, list[float]]] = {
        name: {"score": [], "rest": [], "both": []} for name in backends
    }
    kept = {}
    for repetition in range(repetitions + 1):
        for name, instruction_set in backends.items():
            if instruction_set:
                native.use_instruction_set(instruction_set)
            score, rest, kept[name] = prompt.run(
                prompt.compactor("native" if instruction_set else "torch")
            )
            if repetition:
                for part, seconds in (("score", score), ("rest", rest), ("both", score + rest)):
                    times[name][part].append(seconds)
    out: dict[str, Any] = {}
    for name, parts in times.items():
        row: dict[str, Any] = {part: quantiles(seconds) for part, seconds in parts.items()}
        row["torch_to_this"] = {
            part: round(statistics.median(times["torch"][part]) / statistics.median(parts[part]), 2)
            for part in parts
        }
        # Scores differ in their last bits, so single entries at the edge may, too.
        row["is_same_selection"] = torch.equal(kept[name], kept["torch"])
        out[name] = row
    return out


def rows(repetitions: int, threads: list[int], sets: list[str]) -> Iterator[dict[str, Any]]:
    """One per shape, setting and number of threads."""
    backends = {"torch": "", **{f"native {name}": name for name in sets}}
    for label, (model, num_tokens) in CASES.items():
        for setting, settings in CONFIGS.items():
            prompt = Prompt(model, num_tokens, settings)
            for num_threads in threads:
                torch.set_num_threads(num_threads)
                variants = measure(prompt, backends, repetitions)
                yield {
                    "shape": label,
                    "setting": setting,
                    "threads": num_threads,
                    "repetitions": repetitions,
                    "variants": variants,
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--sets", nargs="+", help="instruction sets (default: best and avx2)")
    args = parser.parse_args()
    best = ops.instruction_set()
    sets = args.sets or list(dict.fromkeys([best, *({"avx2"} & set(native.instruction_sets()))]))
    result: dict[str, Any] = {
        "cpu": machine.cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": machine.commit(),
        "dtype": str(DTYPE),
        "block_size": BLOCK_SIZE,
        "ratio": RATIO,
        "load_before": os.getloadavg()[0],
        "rows": [],
    }
    for row in rows(args.repetitions, args.threads, sets):
        result["rows"].append(row)
        print(row["shape"], row["setting"], f"{row['threads']} threads")
        for name, parts in row["variants"].items():
            medians = "  ".join(
                f"{part} {parts[part]['p50']:9.2f} ms ({parts['torch_to_this'][part]:5.2f}x)"
                for part in ("score", "rest", "both")
            )
            print(f"  {name:20} {medians}", flush=True)
    result["load_after"] = os.getloadavg()[0]
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
