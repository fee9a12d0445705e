"""Tuning of the decode kernel: every setting is checked against the default before it is timed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import tune_decode
from gpu.shapes import DRY_SHAPE
from gpu.tune_decode import tune
from timing.step_cases import decode_step
from vllm_kvcompress.triton_kernels import DecodeTiles

from vllm_kvcompress import ops

SMALL, LARGE = DecodeTiles(32, 4, 3, 1, least_tiles=1), DecodeTiles(128, 4, 3, 2, least_tiles=1)
SCRIPT = Path(tune_decode.__file__)


@pytest.fixture
def step(device):
    return decode_step(DRY_SHAPE, 2, 64, device)


@pytest.fixture(autouse=True)
def few_settings(monkeypatch):
    monkeypatch.setattr(tune_decode, "PROGRAMS_PER_SM", (2, 3))
    monkeypatch.setattr(tune_decode, "LEAST_TILES", (1, 8))


def test_settings_reach_the_kernel_and_the_best_is_varied(monkeypatch, step):
    decode, seen = ops.ragged_decode, []

    def recorded(*arguments, work, **options):
        seen.append((work.tiles, work.first_streams.shape[1]))
        return decode(*arguments, work=work, **options)

    monkeypatch.setattr(ops, "ragged_decode", recorded)
    times = iter([5.0, 4.0, 3.0, 2.0, 6.0])
    rows = list(tune(step, lambda call: {"p50_us": next(times)}, [SMALL, LARGE]))
    tried = [step.new_work().tiles, SMALL, LARGE]
    # The best of the two with another number of programs, then of least tiles.
    tried += [dataclasses.replace(LARGE, programs_per_sm=3)]
    tried += [dataclasses.replace(LARGE, least_tiles=8)]
    assert [row["tiles"] for row in rows] == [dataclasses.asdict(tiles) for tiles in tried]
    assert [row["is_default"] for row in rows] == [True, *[False] * 4]
    num_sms = ops.num_multiprocessors(step.pool.device)
    launched = [(tiles, num_sms * tiles.programs_per_sm) for tiles in tried]
    # The default's result is what the others are compared with.
    assert list(dict.fromkeys(seen)) == launched


def test_a_setting_that_does_not_run_is_left_out(monkeypatch, step, capsys):
    decode = ops.ragged_decode

    def refusing(*arguments, work, **options):
        # As a GPU says of more shared memory than it has.
        if work.tiles.num_keys == 128:
            raise RuntimeError("out of resource: shared memory")
        return decode(*arguments, work=work, **options)

    monkeypatch.setattr(ops, "ragged_decode", refusing)
    rows = list(tune(step, lambda call: {"p50_us": 1.0}, [LARGE, SMALL]))
    assert {row["tiles"]["num_keys"] for row in rows} == {32}
    assert "left out: DecodeTiles(num_keys=128" in capsys.readouterr().out


def test_a_setting_with_another_result_is_an_error(monkeypatch, step):
    decode = ops.ragged_decode

    def wrong(*arguments, work, out, **options):
        decode(*arguments, work=work, out=out, **options)
        return out.add_(work.tiles.num_keys == 128)

    monkeypatch.setattr(ops, "ragged_decode", wrong)
    with pytest.raises(AssertionError):
        list(tune(step, lambda call: {"p50_us": 1.0}, [LARGE]))


def test_nothing_is_started_once_the_time_is_up(step):
    answers = iter([False, False, True, True, True, True])
    rows = list(tune(step, lambda call: {"p50_us": 1.0}, [SMALL, LARGE], lambda: next(answers)))
    assert [row["tiles"]["num_keys"] for row in rows] == [32, 32]


@pytest.mark.emulated
def test_a_dry_run_writes_rows_that_say_so(tmp_path):
    out = tmp_path / "tuning.json"
    command = [sys.executable, "-P", str(SCRIPT), "--dry-run", "--settings", "1"]
    subprocess.run([*command, "--out", str(out)], check=True)
    written = json.loads(out.read_text())
    assert written["run"]["dry_run"]
    # The default, and one setting with others of programs and least tiles.
    assert len(written["rows"]) > 5
    assert all(row["p50_us"] > 0 and row["gb_per_s"] > 0 for row in written["rows"])


def test_results_are_finite(step):
    out = step.run(step.new_work(), torch.full_like(step.query, torch.nan))
    assert out.isfinite().all()
