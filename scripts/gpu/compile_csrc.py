"""Compile and link the CUDA C++ kernels for GPUs that need not be there; print what each one uses.

    python scripts/gpu/compile_csrc.py --json csrc.json

Needs nvcc and any torch from 2.10 on, with CUDA or without. The library is linked as an install
would link it, and every symbol that it leaves open must be torch's stable ABI's or the C and C++
libraries'. Exit status 1 if anything fails to compile or link, or if a kernel spills registers.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2] / "csrc"))

import build_cuda
import torch


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--archs",
        type=int,
        nargs="+",
        default=list(build_cuda.DEFAULT_ARCHS),
        help="compute capabilities x 10",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows")
    arguments = parser.parse_args()
    nvcc = build_cuda.find_nvcc()
    if nvcc is None:
        print("no nvcc in $CUDA_HOME, $PATH or /usr/local/cuda")
        return 1
    with TemporaryDirectory() as folder:
        torch_root = Path(torch.__file__).parent
        try:
            library, uses = build_cuda.build_and_measure(
                nvcc, Path(folder), torch_root, arguments.archs
            )
        except build_cuda.BuildError as error:
            print(error)
            return 1
        num_bytes = library.stat().st_size
        symbols = build_cuda.undefined_symbols(library)
        exported = build_cuda.exported_functions(library)
    shims = [symbol for symbol in symbols if "@" not in symbol]
    print(f"{'kernel':30} {'arch':>6} {'registers':>9} {'spills':>7} {'stack':>6} {'shared':>7}")
    for use in sorted(uses, key=lambda use: (use.kernel, use.arch)):
        print(
            f"{use.kernel:30} {'sm_' + str(use.arch):>6} {use.registers:9} {use.spill_bytes:7} "
            f"{use.stack_bytes:6} {use.static_shared_bytes:7}"
        )
    num_spilling = sum(use.spill_bytes > 0 for use in uses)
    print(
        f"{len(uses)} kernels, {num_spilling} spill; linked for torch from 2.10 on, "
        f"{num_bytes} bytes, {len(shims)} symbols of torch"
    )
    if arguments.json:
        version = build_cuda.nvcc_version(nvcc)
        result = {
            "nvcc": version,
            "library_bytes": num_bytes,
            "torch_symbols": shims,
            "exported": exported,
            "kernels": [asdict(use) for use in uses],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if num_spilling else 0


if __name__ == "__main__":
    sys.exit(main())
