"""The compiled ops of csrc/cuda on a GPU: building, loading, and calling them for timings."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.ops import native as compiled

CSRC = Path(__file__).parents[2] / "csrc"


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


@cache
def load_here(out_dir: Path) -> None:
    """Load the installed library; where there is none, one built for this GPU into a folder.

    Raises:
        RuntimeError: if it is not installed and there is no nvcc, or if a compiler fails.
    """
    if compiled.is_installed("cuda"):
        compiled.load("cuda")
        return
    major, minor = torch.cuda.get_device_capability()
    torch_root = Path(torch.__file__).parent
    library = build_cuda().build(out_dir, torch_root, [10 * major + minor])
    if library is None:
        raise RuntimeError("the compiled ops need nvcc in $CUDA_HOME, $PATH or /usr/local/cuda")
    compiled.load("cuda", library)


joint_page_counts = partial(ops.joint_page_counts, backend="native")
select_entries = partial(ops.select_entries, backend="native")


def compact(
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    page_offsets: torch.Tensor,
    indices: torch.Tensor,
    **options: Any,
) -> None:
    """`ops.compact` of plain tensors; which streams are a layer's does not matter."""
    streams = ops.Pool(pool, 1, page_offsets.shape[1] - 1)
    prompts = ops.Rows(rows, block_table)
    ops.compact(streams, prompts, page_offsets, indices, **options, backend="native")


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
    """`ops.select_and_compact`, called like `select_entries`."""
    assert max_pages == max_region_blocks * scores.shape[1]
    return ops.select_and_compact(
        scores,
        num_entries,
        num_pages,
        ops.Pool(pool, 1, scores.shape[1]),
        ops.Rows(rows, block_table),
        max_region_blocks=max_region_blocks,
        granularity="page" if page_size == 1 else "token",
        backend="native",
    )
