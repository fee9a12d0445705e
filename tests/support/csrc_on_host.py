"""The CUDA kernels of csrc/cuda, compiled as C++ and run on the CPU; called as `gpu.native`'s.

Two builds: a fast one, and one in which every access to memory is seen and its order checked.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from ctypes import (
    Structure,
    c_bool,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
EMULATION = Path(__file__).parent / "csrc"
COMPILER = shutil.which("g++")
_FLAGS = (
    *("-std=c++17", "-fPIC", "-U_FORTIFY_SOURCE", "-fno-gnu-unique", "-g1"),
    *("-Wall", "-Wno-unknown-pragmas", "-Werror", "-DKVC_ON_HOST"),
)
# gcc calls a function of access_hooks.cpp before every plain access.
_SEEN = ("-O1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")
_EMULATOR = ("schedule", "happens_before", "access_hooks")


class OrderError(AssertionError):
    """The kernels did what CUDA does not allow, or gives no order to."""


@dataclass(frozen=True)
class Place:
    """A line of csrc/cuda."""

    file: str
    line: int


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
def _folder() -> TemporaryDirectory:
    """Holds the builds until the process ends: faults are looked up in their line numbers."""
    return TemporaryDirectory()


def _compile(source: str, flags: tuple[str, ...], out: Path) -> Path:
    command = [str(COMPILER), *_FLAGS, *flags, f"-I{EMULATION}", f"-I{SOURCES}"]
    command += ["-c", str(EMULATION / f"{source}.cpp"), "-o", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


@cache
def _emulator() -> tuple[Path, ...]:
    folder = Path(_folder().name)
    return tuple(_compile(source, ("-O2",), folder / f"{source}.o") for source in _EMULATOR)


@cache
def _library(is_checked: bool) -> ctypes.CDLL:
    assert COMPILER is not None
    out = Path(_folder().name) / f"kernels_{is_checked}.so"
    flags = _SEEN if is_checked else ("-O2",)
    sources = ("launch_on_host", "order_examples") if is_checked else ("launch_on_host",)
    kernels = [_compile(source, flags, out.with_name(f"{source}.o")) for source in sources]
    # Not linked with -fsanitize: the compiler's own runtime is not wanted.
    command = [COMPILER, "-shared", *_emulator(), *kernels, "-o", out]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    library = ctypes.CDLL(str(out))
    library.set_machine.argtypes = (c_uint64, c_int, c_bool, c_char_p, c_int)
    library.allow_memory.argtypes = (c_void_p, c_size_t)
    library.last_fault.restype = c_char_p
    library.key_of.argtypes = (c_uint32,)
    library.key_of.restype = c_uint32
    library.workspace_bytes.restype = c_size_t
    return library


class _Machine:
    """Which build runs from now on."""

    is_checked = False

    def library(self) -> ctypes.CDLL:
        return _library(self.is_checked)


_machine = _Machine()


def set_machine(
    seed: int,
    num_processors: int,
    *,
    is_checked: bool = False,
    without: Place | None = None,
) -> None:
    """Set how kernels run from now on.

    Args:
        seed: of the order in which threads and blocks have their turns.
        num_processors: that the machine has; more make parts smaller.
        is_checked: every access to memory must be ordered with those that it is in conflict with,
            and lie in memory that the op was given. Else `OrderError`.
        without: a barrier or a fence that is left out, or an atomic that is none.
    """
    _machine.is_checked = is_checked
    file, line = (without.file, without.line) if without else ("", 0)
    _machine.library().set_machine(seed, num_processors, is_checked, file.encode(), line)


def _line_of(address: re.Match) -> str:
    """Line of csrc/cuda that the code at an address comes from."""
    command = ["addr2line", "-i", "-s", "-e", _machine.library()._name, address.group(1)]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    lines = [line.split(" ")[0] for line in lines if not line.startswith("cuda_on_host")]
    return lines[0]


def run(function: str, *arguments: object, memory: tuple[torch.Tensor, ...]) -> None:
    """Call a function of the library, whose kernels may touch these tensors only.

    Raises:
        OrderError: if they did not do right.
    """
    library = _machine.library()
    library.forget_memory()
    for tensor in memory:
        storage = tensor.untyped_storage()
        library.allow_memory(storage.data_ptr(), storage.nbytes())
    if getattr(library, function)(*arguments):
        fault = library.last_fault().decode()
        raise OrderError(re.sub(r"code\+(0x[0-9a-f]+)", _line_of, fault))


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
    return _library(is_checked=False).key_of(bits)


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
    num_bytes = _machine.library().workspace_bytes(num_requests, num_streams, num_groups)
    workspace = torch.full((num_bytes,), 0xA5, dtype=torch.uint8)
    params = _JointCounts(
        _scores(scores, num_entries, page_size),
        total_pages.data_ptr(),
        guaranteed.data_ptr(),
        num_pages.data_ptr(),
        num_groups,
        workspace.data_ptr(),
    )
    memory = (scores, num_entries, total_pages, guaranteed, num_pages, workspace)
    run("run_joint_page_counts", ctypes.byref(params), memory=memory)
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
    memory = (scores, num_entries, num_pages, *results)
    run("run_select_entries", ctypes.byref(params), memory=memory)
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
    memory = (pool, rows, block_table, page_offsets, indices)
    run("run_compact", ctypes.byref(params), memory=memory)


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
    memory = (scores, num_entries, num_pages, pool, rows, block_table, *results)
    run("run_select_and_compact", ctypes.byref(params), memory=memory)
    return results[0], results[1]
