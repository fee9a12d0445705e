"""Where a number was measured: commit, processor or GPU, driver."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# When the process began, as far as its script imports this first.
STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]


def seconds_running() -> float:
    """What torch's import takes is part of it, as of a limit that others keep to."""
    return time.monotonic() - STARTED


def said_by(*command: str) -> str | None:
    """What a program prints; None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """$KVC_COMMIT, which is for copies without git; else what is checked out."""
    return os.environ.get("KVC_COMMIT") or said_by("git", "rev-parse", "HEAD")


def command() -> str:
    """As it was given."""
    return "python " + shlex.join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])


def cpu_name() -> str:
    """As the kernel says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def device() -> dict[str, Any]:
    """The GPU and its driver, or the cores that this process may use."""
    import torch

    if not torch.cuda.is_available():
        return {"device": f"{len(os.sched_getaffinity(0))} cores of {cpu_name()}"}
    driver = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"device": torch.cuda.get_device_name(), "driver": driver}
