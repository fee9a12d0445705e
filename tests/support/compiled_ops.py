"""Compiled CPU ops in tests: they must be there where a compiler is, for every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import build_cpu
import pytest
from paged_pool import DEVICE

from vllm_kvcompress.ops import native

INSTRUCTION_SETS = tuple(build_cpu.instruction_sets())


def need_compiled_ops() -> None:
    """Skip where tensors are on a GPU, or where the CPU ops cannot be built; else they must run."""
    if DEVICE.type != "cpu":
        pytest.skip("compiled ops of a GPU are tested in test_csrc_cuda.py")
    if build_cpu.find_compiler() is None:
        pytest.skip("no C++ compiler")
    native.load("cpu")


@contextmanager
def using(instruction_set: str) -> Iterator[None]:
    """The compiled ops use it; skips if this CPU does not have it."""
    need_compiled_ops()
    if instruction_set not in native.instruction_sets():
        pytest.skip(f"this CPU has no {instruction_set}")
    in_use = native.instruction_set()
    native.use_instruction_set(instruction_set)
    yield
    native.use_instruction_set(in_use)
