"""`ops.token_slots` and `ops.store_tokens` against their references."""

from __future__ import annotations

import pytest
import torch
from paged_pool import Request, Shape, compressed, make_batch, nan_pool, random_like

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
    arguments = (batch.rows, batch.block_table, batch.query_start_loc, num_tokens, block_size)
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
    arguments = (batch.rows, batch.block_table, batch.query_start_loc, num_tokens, 16)
    assert torch.equal(
        ops.token_slots(*arguments), ops.token_slots(*arguments, backend="reference")
    )


@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.bfloat16, torch.float8_e5m2),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_size", [64, 80])
def test_store_tokens(dtype, pool_dtype, head_size, device):
    shape = Shape(num_kv_heads=3, group=1, head_size=head_size, dtype=dtype, pool_dtype=pool_dtype)
    generator = torch.Generator(device).manual_seed(1)
    # One value past an fp8 type's range.
    key = random_like((5, 3, head_size), dtype, generator)
    key[1, 0, 0] = 30_000.0
    value = random_like((5, 3, 2 * head_size), dtype, generator)[:, :, head_size:]
    slots = torch.tensor([35, -1, 3, 16, 79], device=device)
    scales = torch.linspace(0.5, 2.0, shape.num_streams, device=device)
    pools = {}
    for backend in ("triton", "reference"):
        pools[backend] = nan_pool(shape, 5, device)
        for layer in (1, 0):
            ops.store_tokens(
                key + layer,
                value - layer,
                pools[backend],
                slots,
                layer=layer,
                num_layers=2,
                key_scale=scales,
                value_scale=scales.flip(0),
                backend=backend,
            )
    got, want = pools["triton"].float(), pools["reference"].float()
    assert torch.equal(got.isnan(), want.isnan())
    if device.type == "cpu" and pool_dtype is not None:
        # Triton's interpreter does not round fp8's subnormal numbers to nearest.
        tiny = torch.finfo(pool_dtype).smallest_normal
        step = tiny * torch.finfo(pool_dtype).eps
        is_tiny = want.abs() <= tiny
        assert ((got - want).abs() <= step)[is_tiny].all()
        got = torch.where(is_tiny, want, got)
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert int(want.isfinite().sum()) == 4 * shape.num_streams * 2 * head_size


def test_stored_tokens_are_attended_to(device):
    """The slots and the attention kernel agree on where a token behind a region is."""
    requests = [compressed(BASE, 5 * 16 + 3, 2, 5 * 16 + 4), Request(33)]
    batch = make_batch(BASE, requests, device)
    slots = ops.token_slots(batch.rows, batch.block_table, batch.query_start_loc, 2, 16)
    generator = torch.Generator(device).manual_seed(2)
    key = random_like((2, 2, 64), BASE.dtype, generator)
    value = random_like((2, 2, 64), BASE.dtype, generator)
    ops.store_tokens(key, value, batch.pool, slots, layer=1, num_layers=2)
    for r in range(2):
        for head in range(2):
            entries, _ = batch.stream_entries(r, 2 + head)
            assert torch.equal(entries[-1], torch.cat([key[r, head], value[r, head]]))


def test_what_does_not_fit_is_refused(device):
    pool = nan_pool(BASE, 2, device)
    key = torch.zeros(3, 2, 64, dtype=BASE.dtype, device=device)
    slots = torch.zeros(3, dtype=torch.int64, device=device)
    options = {"layer": 0, "num_layers": 2}
    for arguments, message in (
        ((key, key[:2], pool, slots), "want value like key"),
        ((key, key, pool, slots.int()), "int64 slots"),
        ((key, key, pool, slots[:2]), "3 int64 slots"),
        ((key.double(), key, pool, slots), "bf16, fp16 or fp32"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.store_tokens(*arguments, **options)
    with pytest.raises(ValueError, match="layer 2 is not among 2"):
        ops.store_tokens(key, key, pool, slots, layer=2, num_layers=2)
