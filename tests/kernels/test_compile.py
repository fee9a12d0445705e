"""The kernels compile for GPUs that are not here, and keep their loads under way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {
    "compact_kernel",
    "decode_work_kernel",
    "defensive_scores_kernel",
    "join_scores_kernel",
    "joint_digit_kernel",
    "move_entries_kernel",
    "ragged_decode_kernel",
    "select_kernel",
    "share_pages_kernel",
    "token_slots_kernel",
    "value_effect_kernel",
    "window_scores_kernel",
    "window_sums_kernel",
}
# The version that torch for CUDA brings with vLLM 0.32, beside the one installed here.
OTHER_TRITON = "3.6.0"
OTHER_FOLDER = ROOT / ".cache" / f"triton-{OTHER_TRITON}"


@pytest.fixture(params=["installed", OTHER_TRITON])
def triton_folder(request) -> Path | None:
    """Where Triton is imported from; None for the installed one."""
    if request.param == "installed":
        return None
    if not (OTHER_FOLDER / "triton").is_dir():
        pytest.skip(f"no Triton {OTHER_TRITON} in {OTHER_FOLDER}: scripts/test.sh could not get it")
    return OTHER_FOLDER


def compiled(folder: Path | None, out: Path, *arguments: str) -> tuple[int, str, dict]:
    """(exit status, output, JSON) of the script."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    if folder:
        environment["PYTHONPATH"] = str(folder)
    script = ROOT / "scripts" / "gpu" / "compile_kernels.py"
    command = [sys.executable, "-P", str(script), *arguments, "--out", str(out)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert out.exists(), result.stdout + result.stderr
    content = json.loads(out.read_text())
    assert folder is None or content["triton"] == OTHER_TRITON
    return result.returncode, result.stdout, content


@pytest.mark.slow
def test_every_kernel_keeps_its_loads_under_way(tmp_path, triton_folder):
    status, output, content = compiled(
        triton_folder, tmp_path / "compiled.json", "--shapes", "Llama-3.1-8B"
    )
    assert status == 0, output
    rows = content["kernels"]
    assert {row["kernel"] for row in rows} == KERNELS
    # What the check is about: keys and values, and not only the first of their loads.
    decode = next(row for row in rows if row["kernel"] == "ragged_decode_kernel")
    streamed = [load["name"] for load in decode["loads"] if load["source"] == "pool_ptr"]
    assert streamed == ["key", "value"]
    assert all(row["blocks"] and row["registers"] for row in rows)


@pytest.mark.slow
def test_fp8_decode_keeps_its_loads_under_way(tmp_path, triton_folder):
    status, output, _ = compiled(
        triton_folder,
        tmp_path / "compiled.json",
        *("--shapes", "Llama-3.1-8B fp8", "--kernels", "ragged_decode_kernel"),
    )
    assert status == 0, output


def test_a_kernel_that_waits_for_its_loads_fails(tmp_path, triton_folder):
    status, output, _ = compiled(
        triton_folder,
        tmp_path / "compiled.json",
        *("--shapes", "Llama-3.1-8B", "--kernels", "value_effect_kernel"),
        *("--set", "num_stages=1"),
    )
    assert status == 1
    assert "FAILED value_effect_kernel (Llama-3.1-8B, only launch): value: number of" in output


@pytest.mark.slow
def test_most_shared_memory_fits_a_small_gpu(tmp_path):
    status, output, content = compiled(
        None,
        tmp_path / "compiled.json",
        *("--arch", "89", "--shapes", "head size 256, block size 128, float16"),
    )
    assert status == 0, output
    assert {row["kernel"] for row in content["kernels"]} == KERNELS
    # The widest tiles: 16 heads of size 256 times 8 tokens or a window, and a root of 256 x 256.
    spilling = {row["kernel"] for row in content["kernels"] if row["stack_bytes"]}
    assert spilling <= {"ragged_decode_kernel", "value_effect_kernel", "defensive_scores_kernel"}
    assert ", 0 have narrow loads" in output
