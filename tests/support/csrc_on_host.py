"""The CUDA kernels of csrc/cuda, compiled as C++ and run on the CPU; called as `gpu.native`'s."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from ctypes import POINTER, Structure, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
EMULATION = Path(__file__).parent / "csrc"
COMPILER = shutil.which("g++")
_FLAGS = ("-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-Werror")


class _Scores(Structure):
    """`kvcompress::Scores`; so are the others named, and all fields."""

    _fields_ = (
        ("bits", c_void_p),
        ("num_entries", c_void_p),
        ("request_stride", c_int64),
        ("stream_stride", c_int64),
        ("num_requests", c_int),
        ("num_streams", c_int),
        ("max_entries", c_int),
        ("page_size", c_int),
    )


class _JointCounts(Structure):
    _fields_ = (
        ("scores", _Scores),
        ("total_pages", c_void_p),
        ("guaranteed", c_void_p),
        ("num_pages", c_void_p),
        ("num_groups", c_int),
        ("workspace", c_void_p),
    )


class _Selection(Structure):
    _fields_ = (
        ("scores", _Scores),
        ("num_pages", c_void_p),
        ("page_offsets", c_void_p),
        ("indices", c_void_p),
        ("indices_stride", c_int64),
    )


class _Pages(Structure):
    _fields_ = (
        ("pool", c_void_p),
        ("rows", c_void_p),
        ("block_table", c_void_p),
        ("table_stride", c_int64),
        ("num_requests", c_int),
        ("num_streams", c_int),
        ("block_size", c_int),
        ("token_bytes", c_int),
        ("entries_per_page", c_int),
        ("max_region_blocks", c_int),
    )


class _Compaction(Structure):
    _fields_ = (
        ("pages", _Pages),
        ("page_offsets", c_void_p),
        ("indices", c_void_p),
        ("indices_stride", c_int64),
    )


class _SelectionWithCompaction(Structure):
    _fields_ = (("selection", _Selection), ("pages", _Pages))


@cache
def _library() -> ctypes.CDLL:
    assert COMPILER is not None
    with TemporaryDirectory() as folder:
        out = Path(folder) / "launch_on_host.so"
        command = [COMPILER, *_FLAGS, "-DKVC_ON_HOST", f"-I{EMULATION}", f"-I{SOURCES}"]
        command += ["-fPIC", "-shared", str(EMULATION / "launch_on_host.cpp"), "-o", str(out)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        library = ctypes.CDLL(str(out))
    library.set_machine.argtypes = (c_uint64, c_int)
    library.key_of.argtypes = (c_uint32,)
    library.key_of.restype = c_uint32
    library.workspace_bytes.restype = c_size_t
    for name, params in (
        ("joint_page_counts", _JointCounts),
        ("select_entries", _Selection),
        ("compact", _Compaction),
        ("select_and_compact", _SelectionWithCompaction),
    ):
        getattr(library, f"run_{name}").argtypes = (POINTER(params),)
    return library


def set_machine(seed: int, num_processors: int) -> None:
    """Draw the order of threads and blocks from a seed; more processors make parts smaller."""
    _library().set_machine(seed, num_processors)


def _run(name: str, params: Structure) -> None:
    assert getattr(_library(), f"run_{name}")(ctypes.byref(params)) == 0


def _scores(scores: torch.Tensor, num_entries: torch.Tensor, page_size: int) -> _Scores:
    return _Scores(
        scores.data_ptr(),
        num_entries.data_ptr(),
        scores.stride(0),
        scores.stride(1),
        *scores.shape,
        page_size,
    )


def _pages(
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    num_streams: int,
    entries_per_page: int,
    max_region_blocks: int,
) -> _Pages:
    return _Pages(
        pool.data_ptr(),
        rows.data_ptr(),
        block_table.data_ptr(),
        block_table.stride(0),
        rows.shape[0],
        num_streams,
        pool.shape[1],
        pool.shape[2] * pool.element_size(),
        entries_per_page,
        max_region_blocks,
    )


def order_key(bits: int) -> int:
    """Sortable uint32 of a float32's bits."""
    return _library().key_of(bits)


def joint_page_counts(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    total_pages: torch.Tensor,
    guaranteed: torch.Tensor,
    page_size: int = 1,
) -> torch.Tensor:
    """See `ops.joint_page_counts`."""
    num_requests, num_streams, _ = scores.shape
    num_groups = total_pages.shape[1]
    num_pages = torch.full((num_requests, num_streams), -1, dtype=torch.int32)
    num_bytes = _library().workspace_bytes(num_requests, num_streams, num_groups)
    workspace = torch.full((num_bytes,), 0xA5, dtype=torch.uint8)
    params = _JointCounts(
        _scores(scores, num_entries, page_size),
        total_pages.data_ptr(),
        guaranteed.data_ptr(),
        num_pages.data_ptr(),
        num_groups,
        workspace.data_ptr(),
    )
    _run("joint_page_counts", params)
    return num_pages


def _selection(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_pages: torch.Tensor,
    max_pages: int,
    page_size: int,
) -> tuple[_Selection, torch.Tensor, torch.Tensor]:
    num_requests, num_streams, _ = scores.shape
    page_offsets = torch.full((num_requests, num_streams + 1), -1, dtype=torch.int32)
    indices = torch.full((num_requests, max_pages * page_size), -1, dtype=torch.int32)
    params = _Selection(
        _scores(scores, num_entries, page_size),
        num_pages.data_ptr(),
        page_offsets.data_ptr(),
        indices.data_ptr(),
        indices.stride(0),
    )
    return params, page_offsets, indices


def select_entries(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_pages: torch.Tensor,
    max_pages: int,
    page_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.select_entries`; places that nobody writes are -1."""
    params, *results = _selection(scores, num_entries, num_pages, max_pages, page_size)
    _run("select_entries", params)
    return results[0], results[1]


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
    num_streams = page_offsets.shape[1] - 1
    params = _Compaction(
        _pages(pool, rows, block_table, num_streams, entries_per_page, max_region_blocks),
        page_offsets.data_ptr(),
        indices.data_ptr(),
        indices.stride(0),
    )
    _run("compact", params)


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
    selection, *results = _selection(scores, num_entries, num_pages, max_pages, page_size)
    num_streams = scores.shape[1]
    pages = _pages(pool, rows, block_table, num_streams, page_size, max_region_blocks)
    params = _SelectionWithCompaction(selection, pages)
    _run("select_and_compact", params)
    return results[0], results[1]
