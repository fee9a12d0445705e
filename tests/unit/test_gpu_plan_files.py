"""The GPU plan runs tests by name: each must be there, or its step ends before the first test."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["fifteen.sh", "verify.sh"])
def test_tests_that_are_named_are_there(script):
    text = (REPO / "scripts" / "gpu" / script).read_text()
    patterns = re.findall(r"\btests/[\w/{},]+\.py", text)
    # The shell tells what braces stand for.
    expand = ["bash", "-c", f"printf '%s\\n' {' '.join(patterns)}"]
    names = subprocess.run(expand, capture_output=True, text=True, check=True).stdout.split()
    assert names
    assert [name for name in names if not (REPO / name).is_file()] == []
