"""Tuning of the decode kernel: every setting is checked against the default before it is timed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from bench_kernels import decode_case
from gpu import tune_decode
from gpu.shapes import ModelShape
from gpu.tune_decode import KERNEL_MODULE, tune

SHAPE = ModelShape("small", 2, 1, 2, 64, torch.float32, torch.float32)


@pytest.fixture
def few_settings(monkeypatch):
    monkeypatch.setattr(tune_decode, "NUM_KEYS", (32, 128))
    monkeypatch.setattr(tune_decode, "NUM_WARPS", (4,))
    monkeypatch.setattr(tune_decode, "NUM_STAGES", (3,))
    monkeypatch.setattr(tune_decode, "SPLITS", (1, 2))


def test_settings_reach_the_kernel(monkeypatch, few_settings, device):
    case = decode_case(SHAPE, 2, 64, device, SHAPE.num_layers, ())
    kernel, seen = KERNEL_MODULE._ragged_decode_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                seen.append((options["TILE_N"], grid[2]))
                kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(KERNEL_MODULE, "_ragged_decode_kernel", Recorder())
    times = iter([5.0, 4.0, 6.0, 3.0, 2.0])
    rows = list(tune(case.run, lambda call: {"p50_us": next(times)}))
    found = [(row["tiles"] and row["tiles"]["num_keys"], row["splits"]) for row in rows]
    # Splits are tried with the best tiles.
    assert found == [(None, None), (32, None), (128, None), (32, 1), (32, 2)]
    own = seen[0]
    assert seen[1:] == [own, (32, own[1]), (128, own[1]), (32, 1), (32, 2)]


def test_a_setting_that_does_not_run_is_left_out(few_settings, capsys):
    def run():
        # As a GPU says of more shared memory than it has.
        if KERNEL_MODULE.decode_tiles(16, 64).num_keys == 32:
            raise RuntimeError("out of resource: shared memory")
        tries.append(KERNEL_MODULE.num_decode_splits(2, 1))
        return torch.ones(3)

    tries: list[int] = []
    rows = list(tune(run, lambda call: {"p50_us": float(len(tries))}))
    assert [row["tiles"] and row["tiles"]["num_keys"] for row in rows] == [None, 128, None, None]
    assert "left out: DecodeTiles(num_keys=32" in capsys.readouterr().out


def test_a_setting_with_another_result_is_an_error(few_settings):
    calls = SimpleNamespace(number=0)

    def run():
        calls.number += 1
        return torch.full((3,), float(calls.number > 3))

    with pytest.raises(AssertionError):
        list(tune(run, lambda call: {"p50_us": 1.0}))
