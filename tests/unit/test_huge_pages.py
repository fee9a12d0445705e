"""Huge pages for the KV cache of a CPU."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from vllm_kvcompress.vllm_integration.platforms.cpu.huge_pages import use_huge_pages

MIB = 1 << 20
HAS_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()
needs_huge_pages = pytest.mark.skipif(not HAS_HUGE_PAGES, reason="this kernel has no huge pages")


def mapped(num_bytes: int) -> torch.Tensor:
    """A buffer [num_bytes] of ones, int8, in a mapping of its own."""
    return torch.frombuffer(mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE), dtype=torch.int8).fill_(1)


def flags_at(address: int) -> list[str]:
    """Linux' flags of the mapping around an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()
        if not head[0].endswith(":"):
            low, high = (int(part, 16) for part in head[0].split("-"))
            inside = low <= address < high
        elif inside and head[0] == "VmFlags:":
            return head[1:]
    raise AssertionError(f"nothing is mapped at {address:#x}")


@needs_huge_pages
@pytest.mark.parametrize("skip", [0, 4096, 64])
def test_whole_buffer_is_zeroed_and_its_middle_advised(skip: int) -> None:
    """At any alignment: `hg` is the kernel's word for advised memory, nothing else has it."""
    whole = mapped(16 * MIB)
    buffer = whole[skip : 12 * MIB + skip]
    middle, after = buffer.data_ptr() + 6 * MIB, buffer.data_ptr() + 15 * MIB
    assert "hg" not in flags_at(middle)

    assert use_huge_pages(buffer)

    assert "hg" in flags_at(middle)
    assert "hg" not in flags_at(after)
    assert not buffer.any()
    assert whole[:skip].all()
    assert whole[12 * MIB + skip :].all()


@pytest.mark.parametrize("num_bytes", [0, 4096, 2 * MIB - 1])
def test_buffers_without_room_for_one_are_left_alone(num_bytes: int) -> None:
    buffer = mapped(4 * MIB)[1 : num_bytes + 1]

    assert not use_huge_pages(buffer)

    assert buffer.all()


def test_refused_advice_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a kernel that has no huge pages."""
    buffer = mapped(8 * MIB)
    kernel = Mock()
    kernel.madvise.return_value = -1
    monkeypatch.setattr(ctypes, "CDLL", lambda name: kernel)

    assert not use_huge_pages(buffer)

    assert buffer.all()
    kernel.madvise.assert_called_once()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = mapped(8 * MIB)
    monkeypatch.setattr(sys, "platform", "darwin")

    assert not use_huge_pages(buffer)

    assert buffer.all()
