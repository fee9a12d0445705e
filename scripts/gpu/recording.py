"""Which kernels a call launches, and as which compiled variants of them: needs no GPU."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from triton.runtime import KernelInterface

from vllm_kvcompress import triton_kernels

# Addresses and sizes that are multiples of this are told to the compiler.
ALIGNMENT = 16


@dataclass(frozen=True)
class Argument:
    """What the compiler is told of one argument.

    Attributes:
        name: of the parameter.
        kind: type of the elements pointed at, 'float', 'int', or 'constant'.
        constant: its value, if the compiler is told it.
        is_aligned: whether it is told that it is a multiple of `ALIGNMENT`.
    """

    name: str
    kind: torch.dtype | str
    constant: Any = None
    is_aligned: bool = False


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its positional arguments, its options and constants by name."""

    kernel: KernelInterface
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name without underscores around it."""
        return self.kernel.__name__.strip("_")

    @property
    def variant(self) -> tuple[Any, ...]:
        """What Triton compiles a kernel for: launches that share it share the compiled kernel."""
        parameters = inspect.signature(self.kernel.fn).parameters
        rest = {name: value for name, value in self.options.items() if name not in parameters}
        return (self.name, tuple(self.arguments()), tuple(sorted(rest.items())))

    def arguments(self) -> Iterator[Argument]:
        """All arguments as the compiler sees them, in the order of the parameters."""
        parameters = inspect.signature(self.kernel.fn).parameters
        values = dict(zip(parameters, self.args, strict=False)) | self.options
        # The interpreter's stand-in keeps these elsewhere.
        settings = getattr(self.kernel, "kwargs", None) or vars(self.kernel)
        unknown = settings.get("do_not_specialize") or ()
        unaligned = settings.get("do_not_specialize_on_alignment") or ()
        for name, parameter in parameters.items():
            value = values[name]
            is_known = name not in unknown
            if parameter.annotation in (tl.constexpr, "tl.constexpr"):
                yield Argument(name, "constant", value)
            elif value is None:
                yield Argument(name, "constant", None)
            elif isinstance(value, torch.Tensor):
                aligned = is_known and name not in unaligned and value.data_ptr() % ALIGNMENT == 0
                yield Argument(name, value.dtype, is_aligned=aligned)
            elif isinstance(value, float):
                yield Argument(name, "float")
            elif value == 1 and is_known:
                yield Argument(name, "constant", 1)
            else:
                yield Argument(name, "int", is_aligned=is_known and value % ALIGNMENT == 0)


class _Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, kernel: KernelInterface, launches: list[Launch], is_run: bool) -> None:
        self.kernel = kernel
        self.launches = launches
        self.is_run = is_run

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.launches.append(Launch(self.kernel, args, options))
            if self.is_run:
                self.kernel[grid](*args, **options)

        return launch


def record(run: Callable[[], Any], is_run: bool = False) -> list[Launch]:
    """Launches that `run` makes of this package's kernels; none of them happens unless `is_run`."""
    launches: list[Launch] = []
    replaced = []
    package = triton_kernels.__name__
    for module in [m for name, m in sys.modules.items() if name.startswith(package + ".")]:
        for name, value in vars(module).copy().items():
            if hasattr(value, "__getitem__") and name.endswith("_kernel"):
                setattr(module, name, _Recorder(value, launches, is_run))
                replaced.append((module, name, value))
    try:
        run()
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)
    return launches
