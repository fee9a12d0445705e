"""The compiled ops of csrc/cuda on a GPU: building, loading, and calling them for timings."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

CSRC = Path(__file__).parents[2] / "csrc"
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
# Schemas live as long as this does.
_LIBRARIES: list[torch.library.Library] = []


@cache
def build_cuda() -> ModuleType:
    """csrc/build_cuda.py as a module."""
    spec = importlib.util.spec_from_file_location("build_cuda", CSRC / "build_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load(library: Path) -> None:
    """Register a built library's ops, and those schemas that nobody has defined in this process.

    Raises:
        OSError: if the library does not load here.
    """
    for schema in SCHEMAS:
        if not hasattr(torch.ops.vllm_kvcompress, schema.split("(")[0]):
            _LIBRARIES.append(torch.library.Library("vllm_kvcompress", "FRAGMENT"))
            _LIBRARIES[-1].define(schema)
    torch.ops.load_library(str(library))


@cache
def load_built_here(out_dir: Path) -> None:
    """Build the library for the GPU at hand into a folder, and load it.

    Raises:
        RuntimeError: without nvcc, or if a compiler fails.
    """
    major, minor = torch.cuda.get_device_capability()
    torch_root = Path(torch.__file__).parent
    library = build_cuda().build(out_dir, torch_root, [10 * major + minor])
    if library is None:
        raise RuntimeError("the compiled ops need nvcc in $CUDA_HOME, $PATH or /usr/local/cuda")
    load(library)


def joint_page_counts(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    total_pages: torch.Tensor,
    guaranteed: torch.Tensor,
    page_size: int = 1,
) -> torch.Tensor:
    """See `ops.joint_page_counts`."""
    num_pages = scores.new_empty(scores.shape[:2], dtype=torch.int32)
    arguments = (scores, num_entries, total_pages, guaranteed, num_pages, page_size)
    torch.ops.vllm_kvcompress.joint_page_counts(*arguments)
    return num_pages


def select_entries(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_pages: torch.Tensor,
    max_pages: int,
    page_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.select_entries`."""
    results = _results(scores, max_pages, page_size)
    arguments = (scores, num_entries, num_pages, *results, page_size)
    torch.ops.vllm_kvcompress.select_entries(*arguments)
    return results


def compact(
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    page_offsets: torch.Tensor,
    indices: torch.Tensor,
    *,
    max_region_blocks: int,
    granularity: str = "page",
) -> None:
    """See `ops.compact`."""
    entries_per_page = 1 if granularity == "page" else pool.shape[1]
    arguments = (pool, rows, block_table, page_offsets, indices, None, None)
    torch.ops.vllm_kvcompress.compact(*arguments, max_region_blocks, entries_per_page)


def select_and_compact(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_pages: torch.Tensor,
    max_pages: int,
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_region_blocks: int,
    page_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`select_entries`, then `compact`, in one launch."""
    results = _results(scores, max_pages, page_size)
    arguments = (scores, num_entries, num_pages, *results, pool, rows, block_table, None, None)
    torch.ops.vllm_kvcompress.select_and_compact(*arguments, max_region_blocks, page_size)
    return results


def _results(
    scores: torch.Tensor, max_pages: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page offsets and indices, to be written."""
    num_requests, num_streams, _ = scores.shape
    page_offsets = scores.new_empty((num_requests, num_streams + 1), dtype=torch.int32)
    indices = scores.new_empty((num_requests, max_pages * page_size), dtype=torch.int32)
    return page_offsets, indices
