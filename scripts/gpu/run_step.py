"""Run one step of fifteen.sh: in a process of its own, for a limited time; keep what comes of it.

    python scripts/gpu/run_step.py --part OUT/part1.json --work DIR --kind numbers --limit 80 \\
      NAME -- COMMAND...

What the command writes to $KVC_RESULT (JSON, as often as it likes) goes into the part's JSON every
other second and at the end, and what it prints into the part's log, whether it passes, fails,
crashes, hangs or runs out of memory. The exit status is 0 in all these cases: the next step does
not depend on it. It returns once all of the step's processes are gone, and the GPU's memory with
them. They do not outlive it: who ends this process, or the script that has called it, ends them.

KVC_FAULT=NAME:crash or NAME:hang, for tests, lets the step die or hang once it has done its work;
NAME:hang:SECONDS gives it another limit.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

POLL_S = 2.0
# From the interrupt on, for reports and open files.
GRACE_S = 8.0
# For processes that were killed to give back what they have.
GONE_S = 20.0
# Of Linux' prctl.
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LOG_TAIL_BYTES = 200_000
# Lines of a log that say what went wrong, those that say most first.
ERRORS = (
    re.compile(r"^(E  .*|\S*(Error|Exception|Interrupt)\b.*|.*\b(fatal|error:).*)"),
    re.compile(r".*\bFAILED\b.*"),
)


@dataclass
class Step:
    """One step and how it ended.

    Attributes:
        name: of the step.
        kind: 'setup', 'correctness', 'numbers' or 'engine'.
        status: 'running', 'passed', 'failed', 'stopped' (at its limit), 'left out'.
        exit_status: of the command, negative for a signal; None without one.
        limit_s, seconds: given and taken.
        new_kernels: entries that it added to Triton's cache; None without a cache.
        error: first line of its log that tells what went wrong, or why it was left out.
    """

    name: str
    kind: str
    status: str = "running"
    exit_status: int | None = None
    limit_s: float = 0.0
    seconds: float = 0.0
    new_kernels: int | None = None
    error: str | None = None


def cache_entries() -> int | None:
    """Entries of Triton's cache; None if its folder is not given."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    if folder is None:
        return None
    path = Path(folder)
    return sum(entry.is_dir() for entry in path.iterdir()) if path.is_dir() else 0


def read_part(path: Path) -> dict[str, Any]:
    """Steps and results so far."""
    if not path.exists():
        return {"steps": [], "results": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def keep(path: Path, step: Step, result: Path) -> None:
    """Put a step and its result into the part's JSON, which is whole at any time."""
    part = read_part(path)
    part["steps"] = [s for s in part["steps"] if s["name"] != step.name] + [asdict(step)]
    if not result.exists():
        # An earlier run's.
        part["results"].pop(step.name, None)
    # A file that is being written is left for the next time.
    with contextlib.suppress(OSError, json.JSONDecodeError):
        part["results"][step.name] = json.loads(result.read_text(encoding="utf-8"))
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def first_error(log: str) -> str:
    """The line that tells most, at most 300 characters."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for error in ERRORS:
        for line in lines:
            if error.match(line):
                return line[:300]
    return lines[-1][:300] if lines else "no output"


def planted_fault(name: str) -> tuple[str | None, float | None]:
    """(kind, limit) of $KVC_FAULT if it is about this step."""
    step, _, rest = os.environ.get("KVC_FAULT", "").partition(":")
    if step != name:
        return None, None
    kind, _, limit = rest.partition(":")
    return kind, float(limit) if limit else None


def with_fault(command: list[str], kind: str | None) -> list[str]:
    """The command, after which its process crashes or hangs."""
    if kind is None:
        return command
    end = {"crash": "kill -SEGV $$", "hang": "sleep 600"}[kind]
    return ["bash", "-c", f'"$@"; {end}', "step", *command]


LIBC = ctypes.CDLL(None)


def _own_session() -> None:
    os.setsid()
    # Should this process be killed, where nobody can end the group.
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ignored where the whole run was started in the background.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def go_with_caller() -> None:
    """Have SIGTERM raise SystemExit, and come when the calling process ends."""

    def ended(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, ended)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # Orphans of the step become children of this process, which can wait for them.
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_group(group: int) -> bool:
    """Kill what is left of a process group, and wait until it is gone; False if it stays."""
    until = time.monotonic() + GONE_S
    while time.monotonic() < until:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            return True
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-group, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)
    return False


def wait(
    process: subprocess.Popen[bytes], step: Step, grace: float, part: Path, result: Path
) -> None:
    """Until it ends by itself, by an interrupt at its limit, or by force after the grace."""
    start = time.monotonic()
    for signal_number, until in (
        (None, step.limit_s),
        (signal.SIGINT, step.limit_s + grace),
        (signal.SIGKILL, None),
    ):
        if signal_number is not None:
            step.status = "stopped"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal_number)
        while process.poll() is None:
            left = POLL_S if until is None else start + until - time.monotonic()
            if left <= 0:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(POLL_S, left))
            step.seconds = round(time.monotonic() - start, 2)
            keep(part, step, result)
        if process.poll() is not None:
            return


def run(step: Step, command: list[str], grace: float, part: Path, log: Path, result: Path) -> None:
    """Run a command until it ends or its time is over, and fill in the step."""
    start = time.monotonic()
    environment = {**os.environ, "KVC_RESULT": str(result), "PYTHONUNBUFFERED": "1"}
    before = cache_entries()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=_own_session,
        )
        try:
            wait(process, step, grace, part, result)
        except SystemExit:
            step.status, step.error = "stopped", "the whole run was ended"
            raise
        finally:
            # The process itself too, if somebody has ended this one.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            is_gone = end_group(process.pid)
            step.exit_status = process.returncode
            step.seconds = round(time.monotonic() - start, 2)
            keep(part, step, result)
    if before is not None:
        step.new_kernels = (cache_entries() or 0) - before
    if step.status == "running":
        step.status = "failed" if process.returncode else "passed"
    if not is_gone:
        step.status, step.error = "failed", "its processes could not be ended"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=Path, required=True)
    parser.add_argument("--kind", choices=["setup", "correctness", "numbers", "engine"])
    parser.add_argument("--limit", type=float, required=True, help="seconds, grace included")
    parser.add_argument(
        "--grace", type=float, default=GRACE_S, help="seconds of it after the interrupt"
    )
    parser.add_argument("--left-out", help="why the step does not run")
    parser.add_argument("--work", type=Path, required=True, help="folder for its files")
    parser.add_argument("name")
    parser.add_argument("command", nargs="*")
    arguments = parser.parse_args()
    kind, limit = planted_fault(arguments.name)
    limit = arguments.limit if limit is None else limit
    grace = arguments.grace
    # The grace is part of the limit where there is room for it.
    step = Step(arguments.name, arguments.kind, limit_s=max(limit - grace, limit / 2))
    log = arguments.work / f"{step.name}.log"
    result = arguments.work / f"{step.name}.json"
    # An earlier run's.
    result.unlink(missing_ok=True)
    if arguments.left_out:
        step.status, step.error = "left out", arguments.left_out
        log.write_text(arguments.left_out + "\n")
    else:
        go_with_caller()
        command = with_fault(arguments.command, kind)
        run(step, command, grace, arguments.part, log, result)
        if step.status != "passed" and step.error is None:
            step.error = first_error(log.read_text(encoding="utf-8", errors="replace"))
    keep(arguments.part, step, result)
    tail = log.read_bytes()[-LOG_TAIL_BYTES:]
    with arguments.part.with_suffix(".log").open("ab") as all_logs:
        all_logs.write(f"\n===== {step.name}: {step.status} =====\n".encode() + tail)
    said = f": {step.error}" if step.error else ""
    print(f"{step.name:14} {step.status:9} {step.seconds:6.1f} s{said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
