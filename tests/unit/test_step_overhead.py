"""The benchmark of a step's host cost measures steps that do what it says."""

import json
import sys

import pytest

pytest.importorskip("vllm")

from timing import step_overhead as bench

from vllm_kvcompress.compaction.requests import OFFSETS_ROW


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_steps_are_of_the_kind_that_they_are_called(runner):
    plans = []
    for num_prompts in (0, bench.NUM_PROMPTS):
        step = bench.Step(32, num_prompts, runner)
        plans.append(step.plan(*step.names(step.common)))
    decode, mixed = plans
    assert decode.num_single == 32
    assert not decode.chunks and not decode.extended and not decode.finished_whole
    assert (decode.numbers[OFFSETS_ROW] > 0).sum() == 24
    assert mixed.num_single == 24
    assert [chunk.finishes for chunk in mixed.chunks] == [True] * 4
    assert (mixed.numbers[OFFSETS_ROW] > 0).sum() == 18


def test_the_json_has_every_case(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--repeats", "3", "--out", str(out)])
    monkeypatch.setattr(bench, "SIZES", (16,))
    bench.main()
    said = json.loads(out.read_text())
    assert [(row["runner"], row["step"]) for row in said["rows"]] == [
        ("v1", "decode"),
        ("v1", "mixed"),
        ("v2", "decode"),
        ("v2", "mixed"),
    ]
    for row in said["rows"]:
        assert 0 < row["total"]["p20_us"] <= row["total"]["p50_us"] <= row["total"]["p80_us"]
    assert len(capsys.readouterr().out.splitlines()) == 4
