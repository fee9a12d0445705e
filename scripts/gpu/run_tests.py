"""Run pytest in this process, and write a small JSON of it (see `test_report`) however it ends.

KVC_RESULT=tests.json python scripts/gpu/run_tests.py PYTEST_ARGUMENT...
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.test_report import report


def main() -> int:
    """See the module."""
    with tempfile.TemporaryDirectory() as name:
        xml = Path(name) / "junit.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junit-xml={xml}"]
        status = int(pytest.main([*options, *sys.argv[1:]]))
        found = report(xml, status)
    text = json.dumps(found, indent=1) + "\n"
    Path(os.environ["KVC_RESULT"]).write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
