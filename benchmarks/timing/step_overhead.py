"""Time what a step costs the host on the CUDA side: whose its rows are, and what they are to us.

    python benchmarks/timing/step_overhead.py --out step_overhead.json

Needs no GPU: nothing of it touches the device. `names` tells request ids and prompt lengths of the
rows as either of vLLM's model runners has them, `plan` is `plan_step`, and `total` both, p20, p50
and p80 of many steps in microseconds of the processor, which others on the machine do not add to,
though they slow it down.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).resolve().parent
# This folder's names are too plain for others to find them at the top.
sys.path[:] = [path for path in sys.path if path != str(HERE)]
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "scripts")]

import machine

from vllm_kvcompress.compaction.requests import Requests
from vllm_kvcompress.compaction.step_plan import StepPlan, plan_step
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.vllm_integration.worker.row_names import rows_of_v1, rows_of_v2

SIZES = (32, 256, 1024)
BLOCK_SIZE, NUM_LAYERS, WINDOW = 16, 32, 32
CONFIG = KVCompressConfig("span", ratio=0.875, window=WINDOW)
# A quarter of the rows have prompts that stay whole.
PROMPT_LEN, SHORT_LEN = 4000, 20
# Of a mixed step: so many rows are chunks of prompts, half of them the last.
NUM_PROMPTS, CHUNK = 8, 500


class Step:
    """Rows of a step as either model runner has them, with requests that are known already.

    Args:
        num_rows: in all.
        num_prompts: rows of several tokens among them, behind the others.
        runner: 'v1' or 'v2'.
    """

    def __init__(self, num_rows: int, num_prompts: int, runner: str) -> None:
        self.requests = Requests(CONFIG.geometry(BLOCK_SIZE), NUM_LAYERS, num_rows)
        ids = [f"chatcmpl-{i:08x}-0a1b2c3d" for i in range(num_rows)]
        lens = np.full(num_rows, PROMPT_LEN, np.int32)
        lens[::4] = SHORT_LEN
        counts = np.ones(num_rows, np.int32)
        before = lens + np.arange(num_rows, dtype=np.int32) % 500
        first = num_rows - num_prompts
        lens[first:], counts[first:], before[first:] = PROMPT_LEN, CHUNK, 1000
        # These end in this step.
        before[first::2] = PROMPT_LEN - CHUNK
        for name, length in zip(ids[:first], lens[:first].tolist(), strict=True):
            if self.requests.geometry.of(length).is_compressed:
                self.requests.mark_compacted(self.requests.get_or_create(name, length))
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.seq_lens = before + counts
        if runner == "v1":
            batch = SimpleNamespace(req_ids=ids, num_prompt_tokens=lens, num_reqs=num_rows)
            self.names = rows_of_v1(SimpleNamespace(input_batch=batch))
            self.common = None
            return
        # Requests have come and gone, so that places are in no order.
        places = np.random.default_rng(0).permutation(num_rows)
        prompt_len = np.empty_like(lens)
        prompt_len[places] = lens
        states = SimpleNamespace(
            index_to_req_id=dict(zip(places.tolist(), ids, strict=True)),
            prompt_len=SimpleNamespace(np=prompt_len),
        )
        self.names = rows_of_v2(SimpleNamespace(req_states=states))
        self.common = SimpleNamespace(req_idx=places)

    def plan(self, ids: Sequence[str], lens: np.ndarray) -> StepPlan:
        """Of the step."""
        return plan_step(self.requests, WINDOW, ids, lens, self.starts, self.seq_lens)

    def run(self) -> tuple[float, float]:
        """Microseconds of the names and of the plan."""
        begin = time.thread_time_ns()
        ids, lens = self.names(self.common)
        between = time.thread_time_ns()
        self.plan(ids, lens)
        end = time.thread_time_ns()
        return (between - begin) / 1e3, (end - between) / 1e3


def percentiles(values: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(values, n=5)
    return {
        "p20_us": round(fifths[0], 1),
        "p50_us": round(statistics.median(values), 1),
        "p80_us": round(fifths[3], 1),
    }


def measure(step: Step, repeats: int) -> dict[str, dict[str, float]]:
    """Names, plan and total."""
    for _ in range(20):
        step.run()
    pairs = [step.run() for _ in range(repeats)]
    parts: dict[str, Callable[[tuple[float, float]], float]] = {
        "names": lambda pair: pair[0],
        "plan": lambda pair: pair[1],
        "total": sum,
    }
    return {part: percentiles([take(pair) for pair in pairs]) for part, take in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="host cost of a step on the CUDA side")
    parser.add_argument("--repeats", type=int, default=300, help="steps per row")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    rows = []
    for runner in ("v1", "v2"):
        for num_prompts in (0, NUM_PROMPTS):
            for size in SIZES:
                kind = "mixed" if num_prompts else "decode"
                found = measure(Step(size, num_prompts, runner), args.repeats)
                rows.append({"runner": runner, "step": kind, "num_rows": size, **found})
                total, plan = found["total"], found["plan"]["p50_us"]
                print(
                    f"{runner} {kind:6} {size:5} rows: {total['p50_us']:7.1f} us "
                    f"({total['p20_us']:.1f} to {total['p80_us']:.1f}), plan {plan:.1f}",
                    flush=True,
                )
    if args.out:
        said = {
            "command": machine.command(),
            "commit": machine.commit(),
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            **machine.device(),
            "load_of_the_machine": os.getloadavg()[0],
            "clock": "processor time of the thread",
            "repeats": args.repeats,
            "prompts_of_a_mixed_step": NUM_PROMPTS,
            "rows": rows,
        }
        args.out.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
