"""Where a step's new tokens go behind a region."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.decode import reference
from vllm_kvcompress.ops.dispatch import by_triton, choose
from vllm_kvcompress.ops.limits import check_query_starts, check_rows
from vllm_kvcompress.ops.structs import Rows

_SLOTS = {"triton": by_triton("token_slots"), "reference": reference.token_slots}


def token_slots(
    rows: Rows,
    num_tokens: int,
    block_size: int,
    out: torch.Tensor | None = None,
    backend: str = "triton",
) -> torch.Tensor:
    """Slot of each new token of a step, `block id * b + place in the block`.

    The slot mapping that vLLM computes does not know that blocks after a region are further
    right in the row. This one does; it is computed once per step and serves every layer.

    Args:
        rows: with query starts; any number of queries.
        num_tokens: T, length of the result; tokens past the last row's get -1.
        block_size: b.
        out: [T] int64, written; None = a new tensor.
        backend: 'triton' or 'reference'.

    Returns:
        [T] int64, `out` if given. No host sync, graph-safe, deterministic.

    Raises:
        ValueError: on shapes or types that do not fit.
        RuntimeError: if the backend cannot run here.
    """
    check_rows(rows)
    check_query_starts(rows)
    if out is None:
        out = torch.empty(num_tokens, dtype=torch.int64, device=rows.descriptors.device)
    check(
        out.shape == (num_tokens,) and out.dtype == torch.int64 and out.is_contiguous(),
        f"want out [{num_tokens}] int64, got {tuple(out.shape)} {out.dtype}",
    )
    slots = choose(_SLOTS, backend)
    slots(rows.descriptors, rows.block_table, rows.query_start_loc, out, block_size=block_size)
    return out
