"""`ops.token_slots` against its reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from paged_pool import Request, Shape, compressed, make_batch

from vllm_kvcompress import ops

BASE = Shape()


def step_rows(shape: Shape) -> list[Request]:
    """Prefill chunks and decodes, dense and behind a region, in any order."""
    b = shape.block_size
    return [
        Request(3 * b, query_len=3 * b),
        compressed(shape, 5 * b + 3, 2, 5 * b + 4),
        Request(4 * b + 1, query_len=0),
        compressed(shape, 5 * b, 1, 5 * b + 9, query_len=9),
        Request(4 * b + 1),
        compressed(shape, 6 * b + 1, 3, 6 * b + 1, query_len=b + 2),
    ]


@pytest.mark.parametrize("num_padding", [0, 7])
@pytest.mark.parametrize("block_size", [16, 32])
def test_token_slots(block_size, num_padding, device):
    batch = make_batch(
        Shape(block_size=block_size), step_rows(Shape(block_size=block_size)), device
    )
    num_tokens = int(batch.query_start_loc[-1]) + num_padding
    arguments = (batch.op_rows, num_tokens, block_size)
    slots = ops.token_slots(*arguments)
    assert torch.equal(slots, ops.token_slots(*arguments, backend="reference"))
    used = slots[: num_tokens - num_padding]
    assert (used >= 0).all()
    assert used.unique().numel() == used.numel()
    assert (slots[num_tokens - num_padding :] == -1).all()


def test_token_slots_of_many_rows(device):
    requests = [Request(20 + i, query_len=i % 3) for i in range(70)]
    batch = make_batch(BASE, requests, device)
    num_tokens = int(batch.query_start_loc[-1])
    arguments = (batch.op_rows, num_tokens, 16)
    assert torch.equal(
        ops.token_slots(*arguments), ops.token_slots(*arguments, backend="reference")
    )


def test_slots_are_where_attention_reads(device):
    """The slots and the reference agree on where a token behind a region is."""
    requests = [compressed(BASE, 5 * 16 + 3, 2, 5 * 16 + 4), Request(33)]
    batch = make_batch(BASE, requests, device)
    slots = ops.token_slots(batch.op_rows, 2, 16).tolist()
    for r, slot in enumerate(slots):
        for stream in range(BASE.num_streams):
            entries, _ = batch.stream_entries(r, stream)
            page = slot // 16 * BASE.num_streams + stream
            assert torch.equal(entries[-1], batch.pool[page, slot % 16])


def test_what_does_not_fit_is_refused(device):
    rows = make_batch(BASE, [Request(20)], device).op_rows
    out = torch.zeros(3, dtype=torch.int64, device=device)
    for rows_, out_, message in (
        (rows, out[:2], r"want out \[3\] int64"),
        (rows, out.int(), r"want out \[3\] int64"),
        (dataclasses.replace(rows, query_start_loc=None), out, "query starts"),
        (dataclasses.replace(rows, descriptors=rows.descriptors.long()), out, "row descriptors"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.token_slots(rows_, 3, 16, out_)
