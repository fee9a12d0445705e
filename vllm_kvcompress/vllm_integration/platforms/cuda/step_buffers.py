"""Tensors of a GPU worker that captured graphs read, and how much memory they take."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.memory import CacheShape


class StepBuffers:
    """What a step's layers read, and captured graphs with them, at fixed addresses.

    Args:
        shape: of the cache on this rank.
        max_num_reqs: rows of the largest step.
        dtype: of the pool.
        device: of the pool; 'meta' to know sizes.
        num_sms: multiprocessors of the GPU; None = asked of `device`.

    Attributes:
        page_offsets: [max_num_reqs + 1, S + 1] int32, one row per request that has been compacted,
            and an empty one.
        rows: [max_num_reqs, ROW_FIELDS] int32 descriptors of a step's rows.
        row_offsets: [max_num_reqs, S + 1] int32 page offsets of a step's rows.
        work: the decode kernel's, for rows of one token.
        extended_work: likewise, for pieces of rows of several.
    """

    def __init__(
        self,
        shape: CacheShape,
        max_num_reqs: int,
        dtype: torch.dtype,
        device: torch.device,
        num_sms: int | None = None,
    ) -> None:
        width = shape.pages_per_block + 1
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.page_offsets = torch.zeros(max_num_reqs + 1, width, **ints)
        self.rows = torch.zeros(max_num_reqs, len(ops.ROW_FIELDS), **ints)
        self.row_offsets = torch.zeros(max_num_reqs, width, **ints)
        # Pieces of longer rows get lists of their own in every step.
        self.work, self.extended_work = (
            ops.new_decode_work(
                num_rows,
                num_layers=shape.num_layers,
                num_kv_heads=shape.num_kv_heads,
                group=shape.num_queries_per_kv,
                head_size=shape.head_size,
                pool_dtype=dtype,
                device=device,
                max_query_len=max_query_len,
                num_sms=num_sms,
            )
            for num_rows, max_query_len in ((max_num_reqs, 1), (1, ops.MAX_QUERY_LEN))
        )

    @property
    def num_bytes(self) -> int:
        """Memory of all of them."""
        tensors = (self.page_offsets, self.rows, self.row_offsets)
        own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return own + self.work.num_bytes + self.extended_work.num_bytes
