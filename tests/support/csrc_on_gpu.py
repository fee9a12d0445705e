"""The compiled CUDA kernels of csrc/cuda as torch ops, with the signatures of csrc_on_host."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import ModuleType

import torch

ROOT = Path(__file__).parents[2]
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
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "csrc" / "build_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def define_schemas() -> None:
    """Define the ops that the compiled library for CPUs has not defined in this process."""
    for schema in SCHEMAS:
        name = schema.split("(")[0]
        if not hasattr(torch.ops.vllm_kvcompress, name):
            _LIBRARIES.append(torch.library.Library("vllm_kvcompress", "FRAGMENT"))
            _LIBRARIES[-1].define(schema)


@cache
def load() -> None:
    """Build the library for the GPU at hand and register it."""
    major, minor = torch.cuda.get_device_capability()
    torch_root = Path(torch.__file__).parent
    library = build_cuda().build(Path(mkdtemp()), torch_root, [10 * major + minor])
    assert library is not None, "no nvcc"
    define_schemas()
    torch.ops.load_library(str(library))


def joint_page_counts(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    total_pages: torch.Tensor,
    guaranteed: torch.Tensor,
    page_size: int = 1,
    seed: int = 0,
) -> torch.Tensor:
    """See `ops.joint_page_counts`. `seed` changes nothing: the GPU has an order of its own."""
    num_pages = torch.full(scores.shape[:2], -1, dtype=torch.int32, device=scores.device)
    arguments = (scores, num_entries, total_pages, guaranteed, num_pages, page_size)
    torch.ops.vllm_kvcompress.joint_page_counts(*arguments)
    return num_pages


def _results(
    scores: torch.Tensor, max_pages: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_requests, num_streams, _ = scores.shape
    sizes = ((num_requests, num_streams + 1), (num_requests, max_pages * page_size))
    page_offsets, indices = (
        torch.full(size, -1, dtype=torch.int32, device=scores.device) for size in sizes
    )
    return page_offsets, indices


def select_entries(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_pages: torch.Tensor,
    max_pages: int,
    page_size: int = 1,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.select_entries`; places that nobody writes are -1."""
    page_offsets, indices = _results(scores, max_pages, page_size)
    arguments = (scores, num_entries, num_pages, page_offsets, indices, page_size)
    torch.ops.vllm_kvcompress.select_entries(*arguments)
    return page_offsets, indices


def compact(
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    page_offsets: torch.Tensor,
    indices: torch.Tensor,
    *,
    max_region_blocks: int,
    granularity: str = "page",
    seed: int = 0,
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
    seed: int = 0,
    num_processors: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`select_entries`, then `compact`, in one launch. `num_processors` is the GPU's own."""
    results = _results(scores, max_pages, page_size)
    arguments = (scores, num_entries, num_pages, *results, pool, rows, block_table, None, None)
    torch.ops.vllm_kvcompress.select_and_compact(*arguments, max_region_blocks, page_size)
    return results
