"""The files in examples/ run as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = ("offline_batch.py", "plan.py", "server_client.py")


def run_example(name: str, model: str) -> str:
    """What an example prints, run from the root as its text says."""
    # As in an activated environment, which has the command `vllm`.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [sys.executable, f"examples/{name}", model],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_every_example_is_tried_and_named_in_the_readme():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == list(SCRIPTS)
    readme = (EXAMPLES / "README.md").read_text()
    for name in SCRIPTS:
        assert f"python examples/{name} MODEL" in readme
        assert f"python examples/{name} MODEL" in (EXAMPLES / name).read_text()


@pytest.mark.parametrize("shape", ["smollm2", "llama-3.1-8b"])
def test_plan(shape, model):
    folder = model if shape == "smollm2" else ROOT / "configs/models" / shape
    lines = run_example("plan.py", str(folder)).splitlines()[-3:]
    for line, most in zip(lines, (2048, 756, 1024), strict=True):
        kept, fit, full = re.search(
            r"keeps (\d+) tokens per head, .* (\d+) requests fit instead of (\d+)$", line
        ).groups()
        assert most - 32 < int(kept) <= most
        assert int(fit) > int(full)


@pytest.mark.e2e
def test_offline_batch(model):
    output = run_example("offline_batch.py", str(model))
    kept = re.findall(r"^kept (\d+) of (\d+) tokens per head, (\d+) blocks went back", output, re.M)
    assert len(kept) == 3, output
    for num_kept, prompt_len, _ in kept:
        assert 480 <= int(num_kept) <= 512 < 2000 < int(prompt_len)
    # The facts are in the middle of what was evicted most.
    assert sum(number in output for number in ("48213", "90417", "36655")) >= 2, output


@pytest.mark.e2e
def test_server_and_client(model):
    output = run_example("server_client.py", str(model))
    num_tokens, answer = re.search(r"^(\d+) prompt tokens, answer: (.*)$", output, re.M).groups()
    assert int(num_tokens) > 2000
    assert "48213" in answer
    # The server's own words.
    assert re.search(r"kv-compress: 1 prompts \(1 compressed", output), output
