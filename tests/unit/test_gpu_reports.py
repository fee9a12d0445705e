"""What results say of themselves: where they were measured, and which tests failed."""

from __future__ import annotations

import json
import re
import sys

import machine
import pytest
from gpu import engine_run, first_look
from gpu.run_step import Step
from gpu.summary import exit_status, summary
from gpu.test_report import report


def test_the_commit_is_gits_or_as_told(monkeypatch, tmp_path):
    monkeypatch.delenv("KVC_COMMIT", raising=False)
    if machine.said_by("git", "status") is not None:
        assert re.fullmatch(r"[0-9a-f]{40}", machine.commit())
    # A copy without git, on a machine without it.
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit() is None
    monkeypatch.setenv("KVC_COMMIT", "abc")
    assert machine.commit() == "abc"


def test_a_program_that_fails_says_nothing():
    assert machine.said_by("false") is None
    assert machine.said_by("echo", "a b") == "a b"


@pytest.mark.parametrize("is_passed", [True, False])
def test_a_report_counts_tests_and_names_the_failed(monkeypatch, tmp_path, is_passed):
    monkeypatch.setattr(machine, "device", lambda: {"device": "a GPU", "driver": "580"})
    cases = ['<testcase classname="tests.a" name="fine" />']
    if not is_passed:
        cases += [
            '<testcase classname="tests.a" name="wrong"><failure message="m" /></testcase>',
            '<testcase classname="tests.b" name="broken"><error message="m" /></testcase>',
        ]
    counts = f'tests="{len(cases)}" failures="{not is_passed:d}" errors="{not is_passed:d}"'
    xml = tmp_path / "junit.xml"
    xml.write_text(
        f'<testsuites><testsuite name="pytest" {counts} skipped="0" time="1.5">'
        f"{''.join(cases)}</testsuite></testsuites>"
    )
    found = report(xml, 0 if is_passed else 1)
    assert found["exit_status"] == int(not is_passed)
    assert (found["device"], found["driver"], found["seconds"]) == ("a GPU", "580", 1.5)
    assert found["tests"] == len(cases)
    assert found["failed"] == ([] if is_passed else ["tests.a::wrong", "tests.b::broken"])


def step(name, kind, status="passed", error=None):
    return vars(Step(name, kind, status, 0, 20.0, 3.0, 2, error))


ENGINE_ROWS = [
    {"what": "start", "engine": "stock", "seconds": 40.0},
    {
        "what": "decode",
        "engine": "stock",
        "batch": 8,
        "prompt_len": 4096,
        "prefill_s": 1.5,
        "ms_per_output_token": 7.25,
        "output_tokens_per_s": 1103.4,
    },
    {"what": "kernels", "engine": "0.875 removed", "launches_per_step": 333.0},
    {"what": "kept", "kept_tokens": 512.0, "prompt_len": 4096},
    {"what": "reconfigure", "error": "ValueError: no room"},
    {
        "what": "against stock",
        "engine": "nothing removed",
        "batch": 8,
        "compared": 99,
        "max_difference": 0.02,
        "first_difference": 0.01,
    },
]
RESULTS = {
    "machine": {"python": "3.12", "device": "a GPU", "copy_gb_per_s": 3000.0, "library": "loads"},
    "rig": {
        **{"tests": 9, "failures": 1, "errors": 0, "skipped": 2, "seconds": 7.0},
        "failed": ["tests.a::wrong"],
    },
    "timings": {
        "rows": [
            {"op": "decode", "case": "batch 1", "by": "us", "p50_us": 10.0, "of_copy": 0.85},
            {"op": "compress", "case": "32768", "by": "us", "p50_us": 9.0, "of_prefill": 0.004},
        ]
    },
    "tuning": {"rows": [{"batch": 1, "kept_tokens": 64, "tiles": None, "p50_us": 5.0}]},
    "real_size": {"rows": [{"case": "a", "ok": True}, {"case": "b", "ok": False}]},
    "engine": {"rows": ENGINE_ROWS},
}


def test_a_summary_has_the_key_numbers_and_every_failure():
    steps = [step("machine", "setup"), step("rig", "correctness", "failed", "AssertionError: it")]
    text = summary({"part1": {"steps": steps, "results": RESULTS}})
    for wanted in (
        "failed         3 of 20 s, 2 entries new in Triton's cache",
        "    AssertionError: it",
        "device a GPU, python 3.12",
        "copy_gb_per_s 3000",
        "rig: 9 tests, 1 failures, 0 errors, 2 skipped, 7 s",
        "    tests.a::wrong",
        "timings: decode batch 1 us: 10.0 us, 85% of copy",
        "timings: compress 32768 us: 9.0 us, 0.40% of prefill",
        "tuning: batch 1, 64 kept, None: 5.0 us",
        "real_size: 2 rows, 1 wrong",
        "engine: stock start: 40 s",
        "engine: stock decode, batch 8 x 4096: 7.25 ms per token, 1103 tokens/s, prefill 1.50 s",
        "engine: 0.875 removed kernels: 333 launches per step",
        "engine:  kept: 512 of 4096 tokens per head",
        "engine:  reconfigure: ValueError: no room",
        "99 log-probabilities, largest difference 0.0200, of first tokens 0.0100",
    ):
        assert wanted in text, (wanted, text)


def test_the_exit_status_says_what_failed():
    fine = [step("machine", "setup"), step("timings", "numbers")]
    assert exit_status(fine) == 0
    wrong = [
        *fine,
        step("rig", "correctness", "failed"),
        step("csrc", "correctness", "stopped"),
        step("engine", "engine", "left out"),
    ]
    assert exit_status(wrong) == 2 + 8
    # Nothing ran.
    assert exit_status([]) == 1


def test_a_row_or_step_that_cannot_be_read_hides_nothing_else():
    rows = [{"what": "decode", "engine": "stock", "seconds": 3.0}, {}, *ENGINE_ROWS]
    results = {**RESULTS, "rig": {"failures": 1}, "csrc_tests": None, "engine": {"rows": rows}}
    steps = [{"name": "half", "kind": "setup"}, step("engine", "engine", "stopped")]
    text = summary({"part1": {"steps": steps, "results": results}, "part2": {}})
    assert text.count("engine: not readable from here on: KeyError") == 2
    assert "half: not readable from here on: KeyError: 'new_kernels'" in text
    assert "csrc_tests: not readable from here on: TypeError" in text
    assert "stock decode, batch 8 x 4096: 7.25 ms per token" in text
    assert "timings: decode batch 1 us: 10.0 us" in text
    assert exit_status(steps) == 1 + 8


def test_ops_of_vllm_that_do_not_work_are_told():
    found = {"python": "3.12", "vllm_ops": "RuntimeError: rms_norm differs by 3"}
    text = summary({"part1": {"steps": [], "results": {"machine": found}}})
    assert "vllm_ops: RuntimeError: rms_norm differs by 3" in text
    assert "vLLM's compiled ops do not work here" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupted_measurement_is_a_row_that_says_so(tmp_path, error):
    report = engine_run.Report(tmp_path / "engine.json")

    def work(row):
        raise error

    with pytest.raises(type(error)):
        engine_run.attempt(report, "decode", work, engine="stock")
    (row,) = report.rows
    assert row["error"].startswith(type(error).__name__)
    assert not report.is_fine


@pytest.mark.parametrize("slow", ["copy_gb_per_s", "library"])
def test_what_engines_go_by_is_known_before_anything_slow(monkeypatch, tmp_path, slow):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setenv("KVC_RESULT", str(tmp_path / "machine.json"))
    monkeypatch.setattr(sys, "argv", ["first_look.py", "--dry-run", "--site", str(tmp_path)])
    monkeypatch.setattr(first_look, "outcome", lambda attempt: "loads")
    monkeypatch.setattr(first_look, "copy_gb_per_s", lambda *arguments: 1.0)
    monkeypatch.setattr(first_look, slow, interrupted)
    with pytest.raises(KeyboardInterrupt):
        first_look.main()
    found = json.loads((tmp_path / "machine.json").read_text())
    assert found["vllm_imports"] == found["flash_attention"] == "loads"
