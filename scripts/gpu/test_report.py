"""A run of pytest as a small JSON: counts, what failed, and where it ran.

python scripts/gpu/test_report.py JUNIT_XML OUT
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


def report(xml: Path) -> dict[str, Any]:
    """Counts of what pytest wrote with --junit-xml; a run that was cut short has fewer tests."""
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
        **{name: int(suite.get(name, 0)) for name in names},
        "seconds": float(suite.get("time", 0)),
        "failed": failed,
    }


def main() -> None:
    xml, out = map(Path, sys.argv[1:])
    found = report(xml)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
