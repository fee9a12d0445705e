"""Run a script for a GPU on a CPU: every line of it, with numbers that mean nothing.

    python scripts/gpu/as_if_gpu.py benchmarks/timing/gpu_kernels.py ARGUMENT...

Tensors for 'cuda' go to the CPU, Triton's kernels run in its interpreter, a captured graph runs
when it is captured and not when it is replayed, and timings are of one call. Tensors that measure a
GPU's rates are made small.
"""

from __future__ import annotations

import contextlib
import math
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


def on_cpu(value: Any) -> Any:
    """A device argument, which is the CPU instead of a GPU."""
    is_cuda = value.type == "cuda" if isinstance(value, torch.device) else False
    return torch.device("cpu") if is_cuda or (isinstance(value, str) and value == "cuda") else value


# Elements; what kernels are tried on is smaller.
MAX_ELEMENTS = 1 << 22
FACTORIES = (torch.empty, torch.randn)


def cut(size: Any) -> Any:
    """Dimensions of a tensor, each at most 256 if there are more than `MAX_ELEMENTS`."""
    if all(isinstance(n, int) for n in size) and math.prod(size) > MAX_ELEMENTS:
        return tuple(min(n, 256) for n in size)
    return size


class OnCPU(TorchFunctionMode):
    """Calls of torch's functions with their devices replaced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(on_cpu, (args, kwargs or {}))
        return func(*(cut(args) if func in FACTORIES else args), **kwargs)


class Graph:
    """Stands in for a captured graph."""

    def replay(self) -> None:
        """Its work is done."""


@contextlib.contextmanager
def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands in for a capture, whose body runs."""
    yield


def do_bench(
    run: Callable[[], Any], quantiles: Sequence[float] | None = None, **options: Any
) -> Any:
    """Milliseconds of one call, as `triton.testing.do_bench` returns them."""
    start = time.perf_counter()
    run()
    milliseconds = max(1000 * (time.perf_counter() - start), 1e-6)
    return milliseconds if quantiles is None else [milliseconds] * len(quantiles)


def main() -> None:
    """See the module."""
    stand_ins = {
        "is_available": lambda: True,
        "synchronize": lambda *args: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *args: (8 << 30, 8 << 30),
        "get_device_name": lambda *args: "no GPU: a dry run",
        "get_device_capability": lambda *args: (9, 0),
        "CUDAGraph": Graph,
        "graph": graph,
    }
    script, *sys.argv[1:] = sys.argv[1:]
    sys.argv[0] = script
    with contextlib.ExitStack() as stack:
        for name, value in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(triton.testing, "do_bench", do_bench))
        stack.enter_context(OnCPU())
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
