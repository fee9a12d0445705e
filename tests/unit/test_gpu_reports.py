"""What results say of themselves: where they were measured, and which tests failed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import machine
import pytest
from gpu import engine_run, first_look
from gpu import run_tests as run_tests_script
from gpu.engine_run import Load
from gpu.launch_watch import LaunchWatch
from gpu.run_step import Step, first_error
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
    {"what": "compiled while serving", "ours": {}, "others": {"a": 2, "b": 1}},
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
        **{"failed": ["tests.a::wrong"], "exit_status": None, "unfinished": ["tests.a::slow"]},
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
        "    not over: the process ended before pytest did",
        "    not over: tests.a::slow",
        "timings: decode batch 1 us: 10.0 us, 85% of copy",
        "timings: compress 32768 us: 9.0 us, 0.40% of prefill",
        "tuning: batch 1, 64 kept, None: 5.0 us",
        "real_size: 2 rows, 1 wrong",
        "engine: stock start: 40 s",
        "engine: stock decode, batch 8 x 4096: 7.25 ms per token, 1103 tokens/s, prefill 1.50 s",
        "engine: 0.875 removed kernels: 333 launches per step",
        "engine:  kept: 512 of 4096 tokens per head",
        "engine:  reconfigure: ValueError: no room",
        "engine:  compiled while serving: 0 kernels of ours, 3 others",
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


PAIRS = [[(7, -0.5), (8, -0.25)]]


class FakeEngine:
    """Chooses the same tokens all the time; `fails_at` is the batch that it does not survive."""

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))

    def apply_model(self, change):
        return [1]

    def kv_compress_reconfigure(self, **options):
        pass

    def kv_compress_stats(self):
        return {"requests": [{"kept_tokens": 1, "prompt_len": 8}]}


@pytest.fixture
def fake_engines(monkeypatch):
    """Engines are fake; a dictionary of what to do, by whether it is stock."""
    engines = {True: FakeEngine(), False: FakeEngine()}

    def measure(engine, plan, load):
        if load.batch == engine.fails_at:
            raise KeyboardInterrupt
        return {"batch": load.batch, "prompt_len": load.prompt_len}, PAIRS

    monkeypatch.setattr(engine_run, "start_engine", lambda plan, is_stock: engines[is_stock])
    monkeypatch.setattr(engine_run, "generate", lambda *arguments: (0.0, []))
    monkeypatch.setattr(engine_run, "measure", measure)
    monkeypatch.setattr(engine_run, "release", lambda: None)
    monkeypatch.setattr(engine_run, "count_kernels", lambda *arguments: {"launches_per_step": 1})
    return engines


def engine_plan(has_graphs=False):
    return engine_run.Plan("", 9, {}, [Load(1, 64, 2), Load(4, 64, 2)], True, has_graphs)


def test_stock_is_compared_after_every_load(fake_engines, tmp_path):
    fake_engines[True].fails_at = 4
    report = engine_run.Report(tmp_path / "engine.json")
    with pytest.raises(KeyboardInterrupt):
        engine_run.run(engine_plan(), report)
    compared = [row for row in report.rows if row["what"] == "against stock"]
    assert [(row["engine"], row["batch"]) for row in compared] == [
        ("nothing removed", 1),
        ("0.875 removed", 1),
    ]
    assert compared[0]["max_difference"] == 0


def test_what_is_worth_most_comes_first_and_the_profiler_last(fake_engines, tmp_path):
    report = engine_run.Report(tmp_path / "engine.json")
    engine_run.run(engine_plan(), report)
    told = [row for row in report.rows if row["what"] in ("decode", "against stock", "kernels")]
    assert [(row["what"], row["engine"], row.get("batch")) for row in told] == [
        *(("decode", "nothing removed", batch) for batch in (1, 4)),
        *(("decode", "0.875 removed", batch) for batch in (1, 4)),
        ("decode", "stock", 1),
        *(("against stock", name, 1) for name in ("nothing removed", "0.875 removed")),
        ("decode", "stock", 4),
        *(("against stock", name, 4) for name in ("nothing removed", "0.875 removed")),
        ("kernels", "0.875 removed", None),
    ]


@pytest.mark.parametrize("has_graphs", [False, True])
def test_loads_grow(has_graphs):
    plan = engine_run.gpu_plan(has_graphs)
    sizes = [load.batch * load.prompt_len for load in plan.loads]
    assert sizes == sorted(sizes)
    assert max(load.batch for load in plan.loads) <= plan.settings["max_num_seqs"]
    assert max(sizes) > 4096
    # vLLM's own monitor would end the process for what its cache on disk has.
    assert "jit_monitor_mode" not in plan.settings


def test_a_row_has_what_was_chosen(monkeypatch):
    monkeypatch.setattr(engine_run, "generate", lambda *arguments: (1.0, []))
    monkeypatch.setattr(engine_run, "chosen", lambda outputs: [[(n, -1.0) for n in range(20)]] * 9)
    row, texts = engine_run.measure(None, engine_plan(), Load(9, 64, 20))
    assert row["chosen"] == [texts[0][:8]] * 8


def test_only_kernels_of_the_device_count():
    def event(key, count, device_type):
        return SimpleNamespace(key=key, count=count, device_type=device_type)

    events = [
        event("ragged_decode_kernel", 32, "cuda"),
        event("Memcpy DtoD (Device -> Device)", 3, "cuda"),
        event("Memset (Device)", 2, "cuda"),
        event("cudaLaunchKernel", 35, "cpu"),
    ]
    assert engine_run.kernel_counts(events, "cuda") == {"ragged_decode_kernel": 32}


def test_kernels_that_were_not_ready_are_told(tmp_path):
    from triton import knobs

    before = knobs.runtime.jit_post_compile_hook
    ours = SimpleNamespace(module="vllm_kvcompress.triton_kernels.compact", name="compact_kernel")
    other = SimpleNamespace(module="vllm.sampler", name="top_k")
    with LaunchWatch() as watch:
        for kernel in (ours, other, other):
            knobs.runtime.jit_post_compile_hook(fn=kernel, key="", repr="")
    assert knobs.runtime.jit_post_compile_hook is before
    assert (watch.ours, watch.others) == (["compact_kernel"], ["top_k", "top_k"])
    report = engine_run.Report(tmp_path / "engine.json")
    engine_run.check_launches(watch, report)
    assert report.rows[0]["error"].endswith("not compiled before requests came: compact_kernel")
    engine_run.check_launches(LaunchWatch(), report)
    assert "error" not in report.rows[1]


TESTS = """
import os, signal, time
import pytest

def test_fine(): pass
def test_wrong(): assert 1 == 2, "one is not two"
@pytest.fixture
def broken(): raise ValueError("no fixture")
def test_broken(broken): pass
@pytest.mark.skip(reason="why not")
def test_skipped(): pass
def test_killed():
    if "KILL" in os.environ:
        time.sleep(float(os.environ["KILL"]))
        os.kill(os.getpid(), signal.SIGKILL)
"""


def run_tests(folder, *arguments, text=TESTS, **changes):
    """(exit status, JSON, log) of a run of `text`."""
    (folder / "test_it.py").write_text(text)
    result = folder / "tests.json"
    command = [sys.executable, "-P", run_tests_script.__file__, str(folder / "test_it.py")]
    command += ["-c", "/dev/null", "--rootdir", str(folder), *arguments]
    environment = {**os.environ, "KVC_RESULT": str(result), "KVC_COMMIT": "0123", **changes}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, json.loads(result.read_text()), done.stdout


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_a_run_of_tests_is_told(tmp_path, workers):
    status, found, log = run_tests(tmp_path, *workers)
    assert status == found["exit_status"] == 1
    counts = {key: found[key] for key in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": 5, "failures": 1, "errors": 1, "skipped": 1}
    wrong, broken = found["failed"]
    assert wrong.startswith("test_it.py::test_wrong: AssertionError: one is not two")
    assert broken == "test_it.py::test_broken: ValueError: no fixture"
    assert (found["commit"], found["unfinished"]) == ("0123", [])
    assert re.search(r"test_it.py::test_fine PASSED|PASSED \S*test_it.py::test_fine", log)


def test_a_killed_run_of_tests_keeps_what_it_had(tmp_path):
    status, found, _ = run_tests(tmp_path, KILL="5")
    assert status == -9
    counts = {key: found[key] for key in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": 4, "failures": 1, "errors": 1, "skipped": 1}
    assert (found["exit_status"], found["unfinished"]) == (None, ["test_it.py::test_killed"])


def test_arguments_that_pytest_does_not_take_are_told(tmp_path):
    status, found, _ = run_tests(tmp_path, "--no-such-option")
    assert status == found["exit_status"] == 4
    _, found, _ = run_tests(tmp_path, text="import no_such_module")
    assert found["errors"] == 1 and "No module named 'no_such_module'" in str(found["failed"])


def test_an_error_says_more_than_the_name_of_its_test():
    names = "[gw0] [  5%] FAILED tests/a.py::test_it\n"
    assert first_error(names + "E   AssertionError: it\n") == "E   AssertionError: it"
    assert first_error(names) == names.strip()


def test_cases_of_pages_come_before_those_of_tokens():
    folder = Path(__file__).parents[1] / "integration"
    spec = importlib.util.spec_from_file_location("integration_conftest", folder / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)

    def item(name, path, granularity=None):
        call = SimpleNamespace(params={"granularity": granularity})
        return SimpleNamespace(
            **{"name": name, "path": path, "get_closest_marker": lambda marker: None},
            **({"callspec": call} if granularity else {}),
        )

    own, other = folder / "test_a.py", folder.parent / "kernels" / "test_b.py"
    items = [item(1, own, "token"), item(2, other, "token"), item(3, own, "page"), item(4, own)]
    conftest.pytest_collection_modifyitems(items)
    # Those of other folders stay where they are.
    assert [item.name for item in items] == [3, 2, 4, 1]
