"""A run of pytest as a small JSON: counts, what failed, and where it ran.

    python scripts/gpu/test_report.py JUNIT_XML EXIT_STATUS OUT

for verify.sh, whose results are kept.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as tree
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import machine


def report(xml: Path, exit_status: int) -> dict[str, Any]:
    """Counts of what pytest wrote with --junit-xml, of the tests that came to an end.

    Args:
        xml: its file.
        exit_status: pytest's; 124 where it was stopped at a limit.
    """
    suite = tree.parse(xml).getroot().find("testsuite")
    assert suite is not None, f"{xml} has no testsuite"
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite
        if case.find("failure") is not None or case.find("error") is not None
    ]
    names = ("tests", "failures", "errors", "skipped")
    return {
        **machine.device(),
        "torch": torch.__version__,
        "commit": machine.commit(),
        "exit_status": exit_status,
        **{name: int(suite.get(name, 0)) for name in names},
        "seconds": float(suite.get("time", 0)),
        "failed": failed,
    }


def main() -> None:
    xml, exit_status, out = sys.argv[1:]
    found = report(Path(xml), int(exit_status))
    Path(out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
