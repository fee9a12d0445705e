"""Run pytest in this process, and write a small JSON of it as it goes.

    KVC_RESULT=tests.json python scripts/gpu/run_tests.py PYTEST_ARGUMENT...

The JSON has what `test_report.report` gives, written anew every few seconds, so that a run that is
killed loses little: counts so far, what failed and why, and what had begun and not ended.
`exit_status` is pytest's, and null until there is one.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import machine
import torch

WRITE_EVERY_S = 2.0
REASON_LENGTH = 160


class Progress:
    """A plugin of pytest that counts tests as their reports come in, from workers too.

    Attributes:
        found: what is written.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.start = time.monotonic()
        self.begun: dict[str, None] = {}
        self.found: dict[str, Any] = {
            **machine.device(),
            "torch": torch.__version__,
            "commit": machine.commit(),
            "exit_status": None,
            **dict.fromkeys(("tests", "failures", "errors", "skipped"), 0),
            "seconds": 0.0,
            "failed": [],
            "unfinished": [],
        }
        self.is_over = threading.Event()
        # Also while a test hangs.
        self.writer = threading.Thread(target=self._write_on, daemon=True)
        self.write()
        self.writer.start()

    def _write_on(self) -> None:
        while not self.is_over.wait(WRITE_EVERY_S):
            self.write()

    def end(self, exit_status: int) -> None:
        """Nothing comes after this."""
        self.is_over.set()
        self.writer.join()
        self.found["exit_status"] = exit_status
        self.write()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """One more has begun."""
        self.begun[nodeid] = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's set-up, call or teardown came to an end."""
        if report.failed:
            self._failed("failures" if report.when == "call" else "errors", report)
        if report.skipped:
            self.found["skipped"] += 1
        if report.when == "teardown":
            self.found["tests"] += 1
            self.begun.pop(report.nodeid, None)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that does not import is an error."""
        if report.failed:
            self._failed("errors", report)

    def _failed(self, kind: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        # Without a crash of its own it is a text, at whose end the error stands.
        lines = (crash.message if crash is not None else str(report.longrepr)).splitlines()
        reason = lines[0 if crash is not None else -1] if lines else ""
        self.found[kind] += 1
        self.found["failed"].append(f"{report.nodeid}: {reason[:REASON_LENGTH]}")

    def write(self) -> None:
        """All there is so far."""
        self.found["seconds"] = time.monotonic() - self.start
        self.found["unfinished"] = list(self.begun)
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.out)


def main() -> int:
    """See the module."""
    progress = Progress(Path(os.environ["KVC_RESULT"]))
    # Names go to the log: the last one tells what crashed a process.
    options = ["-v", "--tb=short", "-p", "no:cacheprovider"]
    # Not what argparse or a crash of pytest itself would say.
    status = int(pytest.ExitCode.INTERNAL_ERROR)
    try:
        status = int(pytest.main([*options, *sys.argv[1:]], plugins=[progress]))
    finally:
        progress.end(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
