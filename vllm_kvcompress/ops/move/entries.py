"""Copies of entries from anywhere to anywhere."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.dispatch import by_native, by_triton, choose
from vllm_kvcompress.ops.move import by_torch, reference

_MOVE = {
    "triton": by_triton("move_entries"),
    "native": by_native("move_entries", only="cpu"),
    "torch": by_torch.move_entries,
    "reference": reference.move_entries,
}


def move_entries(
    source: torch.Tensor,
    source_index: torch.Tensor,
    target: torch.Tensor,
    target_index: torch.Tensor,
    backend: str = "triton",
) -> None:
    """Copy entries (pages, or tokens) from anywhere to anywhere.

    Args:
        source: [n, e], contiguous.
        source_index: [m] int64; a negative one moves nothing.
        target: [k, e] of the same type, contiguous, written; may be `source`.
        target_index: [m] int64, likewise; no entry twice, none that is a source of `source` itself.
        backend: 'triton', 'native' (compiled, CPU), 'torch' or 'reference'.

    Deterministic; no host sync and graph-safe, but for 'torch'.

    Raises:
        ValueError: on shapes or types that do not fit. Values are not looked at.
        RuntimeError: if the backend cannot run here.
    """
    for name, entries in (("source", source), ("target", target)):
        check(
            entries.dim() == 2
            and entries.is_contiguous()
            and entries.shape[1] == source.shape[1]
            and entries.dtype == source.dtype,
            f"want a contiguous {name} [entries, elements], "
            f"got {tuple(entries.shape)} {entries.dtype}",
        )
    for name, index in (("source", source_index), ("target", target_index)):
        check(
            index.shape == (source_index.numel(),)
            and index.dtype == torch.int64
            and index.is_contiguous(),
            f"want {name} index [{source_index.numel()}] int64, "
            f"got {tuple(index.shape)} {index.dtype}",
        )
    choose(_MOVE, backend)(source, source_index, target, target_index)
