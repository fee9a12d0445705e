"""The GPU run of fifteen minutes on a CPU: every step, and what becomes of those that go wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[2]
GPU_SCRIPTS = REPO / "scripts" / "gpu"
# Of part 1 and part 2, in their order.
STEPS = [
    ["machine", "real_size", "csrc_tests", "triton_tests", "timings", "tuning", "rig", "engine"],
    ["engine_graphs", "sanitizer"],
]


def environment(**changes):
    """Without what would let the run find this repository, or change its plan."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("KVC_", "PYTHON"))}
    return {**inherited, "PYTHON": sys.executable, **changes}


def prepare(out, **changes):
    command = ["bash", str(GPU_SCRIPTS / "prepare.sh"), "--dry-run", str(out)]
    return subprocess.run(command, env=environment(**changes), capture_output=True, text=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared folder, moved to where no repository is."""
    made = tmp_path_factory.mktemp("made") / "gpu"
    done = prepare(made)
    assert done.returncode == 0, done.stdout + done.stderr
    return shutil.move(made, tmp_path_factory.mktemp("elsewhere") / "folder")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    return tmp_path_factory.mktemp("unpacked")


def fifteen(prepared, unpacked, out, *arguments, **changes):
    """(exit status, what was printed) of a dry run."""
    command = ["bash", str(prepared / "fifteen.sh"), "--dry-run", str(out), *arguments]
    done = subprocess.run(
        command,
        env=environment(KVC_UNPACKED=str(unpacked), **changes),
        cwd=prepared,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def read(out, part="part1"):
    found = json.loads((out / f"{part}.json").read_text())
    return {step["name"]: step for step in found["steps"]}, found["results"]


def test_every_step_runs_and_reports(prepared, unpacked, tmp_path):
    out = tmp_path / "out"
    status, said = fifteen(prepared, unpacked, out)
    assert status == 0, said
    for part, names in zip(("part1", "part2"), STEPS, strict=True):
        steps, results = read(out, part)
        assert list(steps) == names
        assert set(results) == set(names)
    files = sorted(path.name for path in out.iterdir())
    assert files == ["part1.json", "part1.log", "part2.json", "part2.log", "summary.txt"]
    assert all(path.stat().st_size < 16 << 20 for path in out.iterdir())
    # The package is the folder's, not this repository's.
    machine = read(out)[1]["machine"]
    assert Path(machine["package"]).is_relative_to(unpacked)
    summary = (out / "summary.txt").read_text()
    assert len(summary.splitlines()) < 120
    for wanted in ("copy_gb_per_s", "ragged_decode", "ms per token", "launches per step"):
        assert wanted in summary
    for engine in ("stock", "nothing removed", "0.875 removed"):
        assert f"{engine} decode, batch 3" in summary


def test_a_step_that_crashes_is_reported_and_the_next_one_runs(prepared, unpacked, tmp_path):
    status, said = fifteen(
        prepared,
        unpacked,
        tmp_path,
        "part1",
        KVC_STEPS="csrc_tests tuning",
        KVC_FAULT="csrc_tests:crash",
    )
    # Correctness, as summary.py says.
    assert status == 2, said
    steps, results = read(tmp_path)
    assert (steps["csrc_tests"]["status"], steps["csrc_tests"]["exit_status"]) == ("failed", -11)
    assert steps["tuning"]["status"] == "passed"
    # It had done its work before.
    assert results["csrc_tests"]["failures"] == 0
    assert "csrc_tests     failed" in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize(
    ("found", "status"),
    [({}, "stopped"), ({"vllm_imports": "ImportError: no torch"}, "left out")],
)
def test_an_engine_is_left_out_for_a_reason_only(prepared, unpacked, tmp_path, found, status):
    work = unpacked / "work"
    work.mkdir(exist_ok=True)
    (work / "machine.json").write_text(json.dumps({"python": "3.12", **found}))
    # It shall start, no more.
    wanted = {"KVC_STEPS": "engine", "KVC_FAULT": "engine:hang:1"}
    assert fifteen(prepared, unpacked, tmp_path, "part1", **wanted)[0] == 8
    (work / "machine.json").unlink()
    steps, _ = read(tmp_path)
    assert steps["engine"]["status"] == status


def test_a_part_on_another_machine_looks_at_it_first(prepared, tmp_path):
    unpacked = tmp_path / "unpacked"
    out = tmp_path / "out"
    for _ in range(2):
        status, said = fifteen(prepared, unpacked, out, "part2", KVC_STEPS="sanitizer")
        assert status == 0, said
    # Only what was asked for is run again, and the rest stays.
    steps, results = read(out, "part2")
    assert list(steps) == ["machine", "sanitizer"]
    assert results["machine"]["vllm_imports"] == "loads"


def test_a_damaged_archive_is_refused(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "folder")
    archive = folder / "project.tar.xz"
    archive.write_bytes(archive.read_bytes()[:-100] + bytes(100))
    status, said = fifteen(folder, tmp_path / "unpacked", tmp_path / "out")
    assert status == 1
    assert "project.tar.xz is not what manifest.json says" in said


def test_a_folder_over_its_limit_is_not_made(tmp_path):
    done = prepare(tmp_path / "gpu", KVC_LIMIT_MIB="0.1")
    assert done.returncode == 1
    assert "larger than 0.1 MiB" in done.stderr


def run_step(folder, limit, code, **changes):
    """One step that is a Python program; (step, result, log)."""
    (folder / "work").mkdir(exist_ok=True)
    command = [sys.executable, "-P", str(GPU_SCRIPTS / "run_step.py"), "--kind", "numbers"]
    command += ["--part", str(folder / "part1.json"), "--work", str(folder / "work")]
    command += ["--limit", str(limit), "name", "--", sys.executable, "-c", code]
    subprocess.run(command, env=environment(**changes), check=True)
    steps, results = read(folder)
    return steps["name"], results.get("name"), (folder / "part1.log").read_text()


WRITE_ROWS = """
import json, os, sys, time
print("ready", flush=True)
for n in (1, 2):
    open(os.environ["KVC_RESULT"], "w").write(json.dumps({"rows": list(range(n))}))
"""


def test_rows_so_far_are_kept_when_a_step_is_stopped(tmp_path):
    start = time.monotonic()
    step, result, log = run_step(tmp_path, 4, WRITE_ROWS + "time.sleep(600)")
    assert time.monotonic() - start < 60
    assert step["status"] == "stopped"
    assert step["error"] == "KeyboardInterrupt"
    assert result == {"rows": [0, 1]}
    assert "ready" in log and "KeyboardInterrupt" in log


def test_a_step_that_does_not_listen_is_killed_with_its_children(tmp_path):
    deaf = (
        "import signal, subprocess; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '600']); print('child', child.pid, flush=True)\n"
    )
    step, result, log = run_step(tmp_path, 2, deaf + WRITE_ROWS + "time.sleep(600)")
    assert (step["status"], step["exit_status"]) == ("stopped", -9)
    assert result == {"rows": [0, 1]}
    # Not even left for a parent to take note.
    assert not is_running(log.split("child ")[1].split()[0])


def is_running(process):
    return Path(f"/proc/{process}").exists()


@pytest.mark.parametrize("ended", ["step", "caller"])
def test_a_step_does_not_outlive_who_runs_it(tmp_path, ended):
    """Killed are run_step.py's caller, as a limit on fifteen.sh does; or run_step.py itself."""
    (tmp_path / "work").mkdir()
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid) + ' ')\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-P", str(GPU_SCRIPTS / "run_step.py"), "--kind", "numbers"]
    command += ["--part", str(tmp_path / "part1.json"), "--work", str(tmp_path / "work")]
    command += ["--limit", "600", "name", "--", sys.executable, "-c", code]
    # As fifteen.sh does, with something left to do after it.
    script = 'echo $$ >"$0/caller"; "$@" & echo $! >"$0/step"; wait; true'
    caller = subprocess.Popen(["bash", "-c", script, str(tmp_path), *command], env=environment())
    wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text().strip())
    child = (tmp_path / "child").read_text().strip()
    step = (tmp_path / "step").read_text().strip()
    if ended == "caller":
        caller.kill()
    else:
        os.kill(int(step), signal.SIGTERM)
    caller.wait()
    wait_for(lambda: not is_running(child) and not is_running(step))
    steps, _ = read(tmp_path)
    assert steps["name"]["status"] == "stopped"
    assert steps["name"]["error"] == "the whole run was ended"


def wait_for(is_true, seconds=20):
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_planted_hang_comes_after_the_work(tmp_path):
    step, result, _ = run_step(tmp_path, 600, WRITE_ROWS, KVC_FAULT="name:hang:3")
    assert step["status"] == "stopped"
    assert result == {"rows": [0, 1]}


def test_a_half_written_result_does_not_replace_a_whole_one(tmp_path):
    half = "time.sleep(3); open(os.environ['KVC_RESULT'], 'w').write('{\"rows\": [')"
    step, result, _ = run_step(tmp_path, 60, WRITE_ROWS + half)
    assert step["status"] == "passed"
    assert result == {"rows": [0, 1]}


def test_a_step_that_is_run_again_has_no_old_result(tmp_path):
    assert run_step(tmp_path, 60, WRITE_ROWS)[1] == {"rows": [0, 1]}
    step, result, _ = run_step(tmp_path, 60, "raise ValueError")
    assert (step["status"], result) == ("failed", None)


def test_the_first_error_is_named(tmp_path):
    step, _, _ = run_step(tmp_path, 60, "print('fine'); raise ValueError('this is it')")
    assert (step["status"], step["exit_status"]) == ("failed", 1)
    assert step["error"] == "ValueError: this is it"
