"""The benchmark of the kernels counts without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_kernels.py"


def run_bench(out: Path, *arguments: str) -> dict:
    """JSON of a run."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", str(SCRIPT), *arguments, "--out", str(out)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(out.read_text())


def test_launches_are_counted_without_a_gpu(tmp_path):
    content = run_bench(
        tmp_path / "counts.json",
        *("--count", "--shapes", "Llama-3.1-8B", "--batches", "32", "--kept", "1024"),
        *("--prompts", "32768"),
    )
    rows = {(row["op"], row["case"]): row for row in content["rows"]}
    decode = rows["ragged_decode", "batch 32, 1024 kept"]
    assert decode["num_launches"] == 2
    # Mean of 1024 kept tokens, give or take the layer's share of the pages; keys and values.
    assert decode["num_bytes"] == pytest.approx(32 * 8 * (1024 + 100) * 512, rel=0.15)
    # Launches of compaction do not grow with layers, heads or tokens.
    assert rows["compact", "prompt 32768, all layers"]["num_launches"] == 1
    assert rows["select", "prompt 32768, 256 of 2047 pages"]["num_launches"] == 6
    assert rows["compress a prompt", "prompt 32768"]["num_launches"] == 32 * 7 + 6 + 1
