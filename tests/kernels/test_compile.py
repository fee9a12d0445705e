"""The kernels compile for a GPU that is not here, and the benchmark counts without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
KERNELS = {
    "compact_kernel",
    "defensive_scores_kernel",
    "join_scores_kernel",
    "joint_digit_kernel",
    "merge_splits_kernel",
    "move_entries_kernel",
    "ragged_decode_kernel",
    "select_kernel",
    "share_pages_kernel",
    "store_tokens_kernel",
    "token_slots_kernel",
    "value_effect_kernel",
    "window_scores_kernel",
    "window_sums_kernel",
}


def run_script(script: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    command = [sys.executable, "-P", str(SCRIPTS / script), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "shape", "num_spilling"),
    # The second: the most shared memory on a GPU that has little of it.
    [("90", "Llama-3.1-8B", 0), ("89", "head size 256, block size 128, float16", 1)],
)
def test_every_kernel_compiles(tmp_path, arch, shape, num_spilling):
    out = tmp_path / "compiled.json"
    stdout = run_script(
        "gpu/compile_kernels.py", "--arch", arch, "--shapes", shape, "--out", str(out)
    )
    assert ", 0 failed, 0 need too much shared memory, " in stdout
    assert ", 0 have narrow loads" in stdout
    rows = json.loads(out.read_text())["kernels"]
    assert {row["kernel"] for row in rows} == KERNELS
    assert sum(row["stack_bytes"] > 0 for row in rows) <= num_spilling


def test_launches_are_counted_without_a_gpu(tmp_path):
    out = tmp_path / "counts.json"
    run_script(
        "bench_kernels.py",
        "--count",
        *("--shapes", "Llama-3.1-8B", "--batches", "32", "--kept", "1024"),
        *("--prompts", "32768", "--out", str(out)),
    )
    rows = {(row["op"], row["case"]): row for row in json.loads(out.read_text())["rows"]}
    decode = rows["ragged_decode", "batch 32, 1024 kept"]
    assert decode["num_launches"] == 2
    # Mean of 1024 kept tokens, give or take the layer's share of the pages; keys and values.
    assert decode["num_bytes"] == pytest.approx(32 * 8 * (1024 + 100) * 512, rel=0.15)
    # Launches of compaction do not grow with layers, heads or tokens.
    assert rows["compact", "prompt 32768, all layers"]["num_launches"] == 1
    assert rows["select", "prompt 32768, 256 of 2047 pages"]["num_launches"] == 6
    assert rows["compress a prompt", "prompt 32768"]["num_launches"] == 4 + 6 + 1
