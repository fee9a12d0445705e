"""The benchmark of the kernels counts without a GPU, and a dry run executes all but CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import machine
import pytest
import torch
from gpu import peers
from gpu.shapes import ModelShape
from timing import report
from timing.case import Case
from timing.report import Timer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "timing" / "gpu_kernels.py"
CPU = torch.device("cpu")
SHAPE = ModelShape("small", 3, 1, 2, 64, torch.float32, torch.float32)


def run_bench(out: Path, *arguments: str) -> tuple[dict, str]:
    """(JSON, output) of a run."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["KVC_COMMIT"] = "0123"
    command = [sys.executable, "-P", str(SCRIPT), *arguments, "--out", str(out)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(out.read_text()), result.stdout


def test_launches_are_counted_without_a_gpu(tmp_path):
    content, _ = run_bench(
        tmp_path / "counts.json",
        *("--count", "--shapes", "Llama-3.1-8B", "--batches", "32", "--kept", "1024"),
        *("--prompts", "32768"),
    )
    rows = {(row["op"], row["case"]): row for row in content["rows"]}
    decode = rows["ragged_decode", "batch 32, 1024 kept"]
    # The list of all layers' work, and each layer.
    assert decode["launches"] == {"decode_work_kernel": 1, "ragged_decode_kernel": 32}
    # 1024 kept tokens and a tail, keys and values; then queries and results.
    attention = 32 * 32 * (8 * (1024 + 100) * 512 + 2 * 32 * 128 * 2)
    assert decode["num_bytes"] == attention
    # Launches of compaction do not grow with layers, heads or tokens.
    assert rows["compact", "prompt 32768, all layers"]["num_launches"] == 1
    assert rows["select", "prompt 32768, 256 of 2047 pages"]["num_launches"] == 6
    assert rows["compress a prompt", "prompt 32768"]["num_launches"] == 4 + 6 + 1


@pytest.mark.slow
def test_a_dry_run_executes_every_case(tmp_path):
    content, output = run_bench(tmp_path / "dry.json", "--dry-run")
    rows = content["rows"]
    own = {row["op"] for row in rows if row["by"] == "vllm-kvcompress"}
    assert own == {
        "ragged_decode",
        "window_scores",
        "paged_value_effect",
        "join_scores",
        "select",
        "compact",
        "move_entries",
        "compress a prompt",
    }
    assert {"torch SDPA", "torch.topk", "index_select"} <= {row["by"] for row in rows}
    # What a prompt costs comes first, and others' decoding last.
    assert rows[0]["op"] == "compress a prompt"
    is_peer = [row["op"] == "ragged_decode" and row["by"] != "vllm-kvcompress" for row in rows]
    assert is_peer == sorted(is_peer)
    missing = {row["by"]: row["left_out"] for row in rows if "left_out" in row}
    assert missing["FlashInfer"].startswith("ModuleNotFoundError")
    for row in (row for row in rows if "left_out" not in row):
        assert row["dry_run"] is True
        assert row["commit"] == "0123"
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["layer_p50_us"] == pytest.approx(row["p50_us"] / row["num_layers"])
        bandwidth = content["run"]["copy_gb_per_s"]
        assert row["of_copy"] * bandwidth == pytest.approx(row["gb_per_s"])
        assert row["gb_per_s"] == pytest.approx(row["num_bytes"] / row["p50_us"] / 1000)
    assert {row["num_layers"] for row in rows if row["op"] == "ragged_decode"} == {2}
    assert content["run"]["copy_gb_per_s_after"] > 0
    assert "FlashInfer left out: ModuleNotFoundError" in output


def test_nothing_is_started_when_the_time_is_up(tmp_path):
    content, output = run_bench(tmp_path / "late.json", "--dry-run", "--limit", "0")
    assert content["rows"] == []
    assert content["run"]["stopped_before"] == "dry run, compress a prompt, prompt 128"
    assert content["run"]["copy_gb_per_s_after"] > 0
    assert "what is left is not timed" in output


def test_a_limit_counts_from_the_start_of_the_process(monkeypatch):
    assert not Timer(CPU, 50.0).is_late or machine.seconds_running() > 50
    monkeypatch.setattr(machine, "STARTED", machine.STARTED - 1000)
    assert Timer(CPU, 900.0).is_late


def test_what_fails_is_a_row_with_its_reason(capsys):
    def fail():
        raise RuntimeError("no such kernel")

    timer = Timer(CPU, None)
    case = Case("op", "label", fail, 100, peers={"other": fail, "works": lambda: lambda: None})
    failed, left_out, works = timer.rows(SHAPE, case)
    assert failed["by"] == "vllm-kvcompress" and failed["error"] == "RuntimeError: no such kernel"
    # Others are not ours to mend.
    assert left_out["left_out"] == "RuntimeError: no such kernel" and "error" not in left_out
    assert works["by"] == "works" and "error" not in works
    assert "other left out: RuntimeError: no such kernel" in capsys.readouterr().out


def test_a_peer_without_room_is_left_out(monkeypatch):
    monkeypatch.setattr(report, "free_bytes", lambda device: 1000)
    timer = Timer(CPU, None)
    for num_bytes, is_left_out in ((901, True), (900, False)):
        case = Case("op", "label", None, num_bytes, later={"other": lambda: lambda: None})
        (row,) = timer.peer_rows(SHAPE, case)
        assert ("left_out" in row) == is_left_out
    assert "p50_us" in row


def test_peers_do_not_keep_a_pool_alive():
    pool = torch.empty(8)
    alive = weakref.ref(pool)
    case = Case("op", "", lambda pool=pool: pool, 1, peers={"a": lambda pool=pool: pool})
    kept = case.of_peers()
    del pool, case
    assert alive() is None
    with pytest.raises(AssertionError):
        kept.run()


def test_a_peer_attends_in_every_layer_to_its_own_cache(monkeypatch):
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def recorded(query, key, value, **options):
        seen.append((key.data_ptr(), value.data_ptr()))
        return attention(query, key, value, **options)

    monkeypatch.setattr(peers.F, "scaled_dot_product_attention", recorded)
    step = peers.decode_peers(["torch SDPA"], SHAPE, 2, 20, torch.device("cpu"))["torch SDPA"]()
    assert step().shape == (2, 2, 1, 64)
    assert len(set(seen)) == len(seen) == SHAPE.num_layers
