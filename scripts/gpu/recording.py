"""Which kernels a call launches, without running them: needs no GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from triton.runtime.jit import JITFunction

from vllm_kvcompress import triton_kernels


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its positional arguments, its options and constants by name."""

    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name without underscores around it."""
        return self.kernel.__name__.strip("_")


class _Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, kernel: JITFunction, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.launches.append(Launch(self.kernel, args, options))

        return launch


def record(run: Callable[[], Any]) -> list[Launch]:
    """Launches that `run` would make of this package's kernels; none of them happens."""
    launches: list[Launch] = []
    replaced = []
    package = triton_kernels.__name__
    for module in [m for name, m in sys.modules.items() if name.startswith(package + ".")]:
        for name, value in vars(module).copy().items():
            if hasattr(value, "__getitem__") and name.endswith("_kernel"):
                setattr(module, name, _Recorder(value, launches))
                replaced.append((module, name, value))
    try:
        run()
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)
    return launches
