"""Huge pages for the KV cache of a CPU.

The cache is one buffer in which a block has all layers side by side, so one layer's attention jumps
through all of it: many pages of 4 KiB, few of 2 MiB.
"""

from __future__ import annotations

import ctypes
import sys

import torch

_HUGE_PAGE_BYTES = 2 << 20
# Advice of Linux' madvise(2).
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14


def use_huge_pages(buffer: torch.Tensor) -> bool:
    """Put a buffer into transparent huge pages, where Linux grants them on request.

    Args:
        buffer: contiguous CPU tensor in private memory of its own. Its contents are lost: it is all
            zeros if huge pages were taken, and as it was if not.

    Returns:
        Whether the kernel took the advice. It is one: how much of the buffer then lies in huge
        pages depends on free memory, and with the policy `never` none of it does.
    """
    start = -(-buffer.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    end = (buffer.data_ptr() + buffer.nbytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if not sys.platform.startswith("linux") or end <= start:
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if madvise(start, end - start, _MADV_HUGEPAGE) != 0:
        return False
    # Small pages that are there stay small. Given back, the next write brings a huge one.
    madvise(start, end - start, _MADV_DONTNEED)
    buffer.zero_()
    return True
