"""The compiled ops: their schemas, one for every device, and the libraries that bring them.

`csrc/` builds `_native_cuda.so`, which setup.py puts beside this package where it can be built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

NAMESPACE = "vllm_kvcompress"
CUDA_LIBRARY = Path(__file__).parents[1] / "_native_cuda.so"
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
)


# Schemas live as long as the library objects that define them.
_SCHEMA_OWNERS: list[torch.library.Library] = []
_LOADED: list[Path] = []


def load(library: Path = CUDA_LIBRARY) -> None:
    """Register a library's ops. Does nothing if one has been loaded already.

    Raises:
        RuntimeError: if it is not there, or does not load here.
    """
    if _LOADED:
        return
    if not library.exists():
        raise RuntimeError(
            f"this installation has no compiled CUDA ops ({library.name} is built where nvcc and a "
            "torch with CUDA are installed)"
        )
    if not _SCHEMA_OWNERS:
        _SCHEMA_OWNERS.append(torch.library.Library(NAMESPACE, "FRAGMENT"))
        for schema in SCHEMAS:
            _SCHEMA_OWNERS[0].define(schema)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise RuntimeError(f"the compiled CUDA ops do not load here: {error}") from None
    _LOADED.append(library)


def problem() -> str | None:
    """Why the compiled ops cannot be used here, in one line; None if they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        load()
    except RuntimeError as error:
        return str(error)
    return None


def native_ops(*tensors: torch.Tensor) -> Any:
    """The compiled ops, if they can run on these tensors.

    Raises:
        RuntimeError: for tensors that are not on a GPU, or without the library.
    """
    elsewhere = [tensor.device for tensor in tensors if not tensor.is_cuda]
    if elsewhere:
        raise RuntimeError(f"the native backend needs CUDA tensors, got {elsewhere[0]}")
    load()
    return getattr(torch.ops, NAMESPACE)
