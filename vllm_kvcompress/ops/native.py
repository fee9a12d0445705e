"""The compiled ops: their schemas, one for every device, and the libraries that bring them.

`csrc/` builds `_native_cpu.so` and `_native_cuda.so`, which setup.py puts beside this package where
they can be built.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

NAMESPACE = "vllm_kvcompress"
SCHEMAS = (
    "joint_page_counts(Tensor scores, Tensor num_entries, Tensor total_pages, Tensor guaranteed, "
    "Tensor(a!) num_pages, int page_size) -> ()",
    "select_entries(Tensor scores, Tensor num_entries, Tensor num_pages, Tensor(a!) page_offsets, "
    "Tensor(b!) indices, int page_size) -> ()",
    "compact(Tensor(a!) pool, Tensor rows, Tensor block_table, Tensor page_offsets, "
    "Tensor indices, Tensor? key_offsets, Tensor? value_offsets, int max_region_blocks, "
    "int entries_per_page) -> ()",
    "select_and_compact(Tensor scores, Tensor num_entries, Tensor num_pages, "
    "Tensor(a!) page_offsets, Tensor(b!) indices, Tensor(c!) pool, Tensor rows, "
    "Tensor block_table, Tensor? key_offsets, Tensor? value_offsets, int max_region_blocks, "
    "int page_size) -> ()",
    # The rest is compiled for CPUs only.
    "move_entries(Tensor source, Tensor source_index, Tensor(a!) target, "
    "Tensor target_index) -> ()",
    "window_scores(Tensor query, Tensor pool, Tensor rows, Tensor block_table, Tensor num_rated, "
    "Tensor? key_offsets, Tensor? key_scale, Tensor? lse, Tensor? sinks, Tensor(a!) scores, "
    "int layer, int num_layers, int num_kv_heads, float scale, float logits_soft_cap, int reduce, "
    "int power, int near_tokens, int pool_kernel) -> ()",
    "paged_value_effect(Tensor pool, Tensor output_root, Tensor rows, Tensor block_table, "
    "Tensor num_rated, Tensor? value_offsets, Tensor? value_scale, Tensor(a!) effect, int layer, "
    "int num_layers) -> ()",
    "join_scores(Tensor scores, Tensor num_rated, Tensor num_candidates, Tensor? effect, "
    "Tensor(a!) out, int group_reduce, int pool_kernel, int pool_kind, bool pool_first, "
    "bool floor_at_mean, int span_kernel, int page_reduce, int page_size) -> ()",
)
_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = {
    "cpu": (_PACKAGE / "_native_cpu.so", "a C++ compiler and torch"),
    "cuda": (_PACKAGE / "_native_cuda.so", "nvcc and a torch with CUDA"),
}
_CPU_ISA = "VLLM_KVCOMPRESS_CPU_ISA"

# Schemas live as long as the library objects that define them.
_SCHEMA_OWNERS: list[torch.library.Library] = []
_LOADED: dict[str, ctypes.CDLL] = {}


def is_installed(device_type: str) -> bool:
    """Whether this installation has the ops for 'cpu' or 'cuda'; they may fail to load."""
    return _LIBRARIES[device_type][0].exists()


def load(device_type: str, library: Path | None = None) -> None:
    """Register a library's ops. Does nothing if one for that kind of device has been loaded.

    Args:
        device_type: 'cpu' or 'cuda'.
        library: where it is, if not beside this package.

    Raises:
        RuntimeError: if it is not there, or does not load here, or if $VLLM_KVCOMPRESS_CPU_ISA
            names an instruction set that library or CPU do not have.
    """
    if device_type in _LOADED:
        return
    usual_place, builders = _LIBRARIES[device_type]
    library = library or usual_place
    name = device_type.upper()
    if not library.exists():
        raise RuntimeError(
            f"this installation has no compiled {name} ops ({library.name} is built where "
            f"{builders} are installed)"
        )
    if not _SCHEMA_OWNERS:
        _SCHEMA_OWNERS.append(torch.library.Library(NAMESPACE, "FRAGMENT"))
        for schema in SCHEMAS:
            _SCHEMA_OWNERS[0].define(schema)
    try:
        torch.ops.load_library(str(library))
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise RuntimeError(f"the compiled {name} ops do not load here: {error}") from None
    _LOADED[device_type] = loaded
    if device_type == "cpu" and os.environ.get(_CPU_ISA):
        try:
            use_instruction_set(os.environ[_CPU_ISA])
        except ValueError as error:
            del _LOADED[device_type]
            raise RuntimeError(f"${_CPU_ISA}: {error}") from None


def instruction_sets() -> list[str]:
    """Names of those that the CPU library was built for and this CPU has, best first.

    Raises:
        RuntimeError: without the library.
    """
    load("cpu")
    name_of = _LOADED["cpu"].kvc_instruction_set
    name_of.restype = ctypes.c_char_p
    names: list[str] = []
    while (name := name_of(len(names))) is not None:
        names.append(name.decode())
    return names


def instruction_set() -> str:
    """The one in use.

    Raises:
        RuntimeError: without the library.
    """
    load("cpu")
    name_of = _LOADED["cpu"].kvc_instruction_set_in_use
    name_of.restype = ctypes.c_char_p
    return name_of().decode()


def use_instruction_set(name: str) -> None:
    """Let the CPU ops use it from now on; none of them may be running.

    Raises:
        ValueError: if the library or this CPU does not have it.
        RuntimeError: without the library.
    """
    load("cpu")
    if not _LOADED["cpu"].kvc_use_instruction_set(name.encode()):
        known = ", ".join(instruction_sets())
        raise ValueError(f"no ops for instruction set {name!r} here; known: {known}")


def problem(device_type: str) -> str | None:
    """Why the compiled ops cannot be used on such a device here, in one line; None if they can."""
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    try:
        load(device_type)
    except RuntimeError as error:
        return str(error)
    return _device_problem() if device_type == "cuda" else None


def _device_problem() -> str | None:
    # A library can load and have nothing for this GPU, or a runtime that is too new for its driver.
    problem_of = _LOADED["cuda"].kvc_device_problem
    problem_of.restype = ctypes.c_char_p
    said = problem_of()
    return None if said is None else f"the compiled CUDA ops do not run here: {said.decode()}"


def native_ops(*tensors: torch.Tensor | None, only: str | None = None) -> Any:
    """The compiled ops, if they can run on these tensors.

    Args:
        tensors: arguments; None is skipped.
        only: 'cpu' if the op is compiled for no other device.

    Raises:
        RuntimeError: for tensors on different devices, or on one that there are no such ops for,
            or without the library.
    """
    types = sorted({tensor.device.type for tensor in tensors if tensor is not None})
    wanted = [only] if only else list(_LIBRARIES)
    if len(types) != 1 or types[0] not in wanted:
        raise RuntimeError(
            f"the native backend needs tensors on one of {', '.join(wanted)}, "
            f"got {', '.join(types)}"
        )
    load(types[0])
    return getattr(torch.ops, NAMESPACE)
