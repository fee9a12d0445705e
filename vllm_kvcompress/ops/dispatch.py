"""Which code runs an op: its providers by backend.

Every provider of an op takes the same arguments, tensors by position and all else by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.native import native_ops

Provider = Callable[..., Any]


def choose(providers: Mapping[str, Provider], backend: str) -> Provider:
    """A backend's provider.

    Raises:
        ValueError: if it has none.
    """
    check(
        backend in providers,
        f"unknown ops backend {backend!r}; known: {', '.join(providers)}",
    )
    return providers[backend]


def by_triton(name: str) -> Provider:
    """A launcher of the package's Triton kernels, which is imported when it is first called."""

    def launch(*tensors: torch.Tensor | None, **options: Any) -> Any:
        return getattr(triton_kernels(*tensors), name)(*tensors, **options)

    return launch


def by_native(name: str, only: str | None = None) -> Provider:
    """A compiled op.

    Args:
        name: of its schema.
        only: 'cpu' if it is compiled for no other device.
    """

    def call(*tensors: torch.Tensor | None, **options: Any) -> Any:
        return getattr(native_ops(*tensors, only=only), name)(*tensors, **options)

    return call


def triton_kernels(*tensors: torch.Tensor | None) -> ModuleType:
    """The package's Triton kernels, if they can run on these tensors; None is skipped.

    Raises:
        RuntimeError: without Triton, for CPU tensors outside Triton's interpreter, or for fp8 e4m3
            on a GPU that has no such type.
    """
    try:
        kernels = importlib.import_module("vllm_kvcompress.triton_kernels")
    except ImportError as error:
        raise RuntimeError(f"the triton backend needs triton, but: {error}") from None
    given = [tensor for tensor in tensors if tensor is not None]
    on_cpu = [tensor for tensor in given if not tensor.is_cuda]
    if on_cpu and not kernels.is_interpreted():
        raise RuntimeError(
            f"the triton backend needs CUDA tensors, got {on_cpu[0].device} "
            "(set TRITON_INTERPRET=1 before triton is imported to run it on the CPU)"
        )
    for tensor in given:
        if not tensor.is_cuda or tensor.dtype != torch.float8_e4m3fn:
            continue
        capability = torch.cuda.get_device_capability(tensor.device)
        if capability < (8, 9):
            raise RuntimeError(
                "fp8 e4m3 caches need compute capability 8.9, this GPU has "
                f"{capability[0]}.{capability[1]}; e5m2 works"
            )
    return kernels
