"""`ops.ragged_decode` against the float64 reference, and against stray reads."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from closeness import assert_close
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from paged_pool import DEVICE, PagedBatch, Request, Shape, compressed, make_batch

from vllm_kvcompress import ops, triton_kernels
from vllm_kvcompress.ops import dispatch

# The package has a function of this name.
WORK_MODULE = sys.modules[triton_kernels.decode_work.__module__]
BASE = Shape()


def ragged_requests(shape: Shape, query_len: int = 1) -> list[Request]:
    """A dense row, ragged regions, a stream with no page, lengths around a block's edge."""
    b, streams = shape.block_size, shape.num_streams
    one_has_all = [0] * (streams - 1) + [2 * streams]
    return [
        Request(seq_len=3 * b + 5, query_len=query_len),
        compressed(shape, 8 * b + 3, 3, 8 * b + 3 + query_len, query_len=query_len, seed=1),
        compressed(shape, 6 * b, 2, 6 * b + query_len, query_len=query_len, pages=one_has_all),
        compressed(shape, 7 * b - 1, 1, 9 * b, query_len=query_len, pages=[1] * streams),
        compressed(shape, 5 * b + 1, 2, 7 * b + 1, query_len=query_len, window=b + 2, seed=4),
    ]


def in_same_dtype(batch: PagedBatch, layer: int, **options) -> torch.Tensor:
    """What torch makes of it in the query's type, stream by stream."""
    shape, d = batch.shape, batch.shape.head_size
    scale = options["scale"]
    sinks = options.get("sinks")
    out = torch.zeros_like(batch.query)
    starts = batch.query_start_loc.tolist()
    for r in range(len(batch.requests)):
        for head in range(shape.num_kv_heads):
            stream = layer * shape.num_kv_heads + head
            entries, _ = batch.stream_entries(r, stream)
            entries = entries.to(shape.dtype)
            key, value = entries[:, :d], entries[:, d:]
            if options.get("key_scale") is not None:
                key = key * options["key_scale"][stream].to(shape.dtype)
                value = value * options["value_scale"][stream].to(shape.dtype)
            for token in range(starts[r], starts[r + 1]):
                limit = len(entries) - (starts[r + 1] - 1 - token)
                hidden = torch.arange(len(entries), device=key.device) >= limit
                heads = slice(head * shape.group, (head + 1) * shape.group)
                logits = batch.query[token, heads] @ key.T * scale
                if cap := options.get("logits_soft_cap", 0.0):
                    logits = cap * torch.tanh(logits / cap)
                logits = logits.masked_fill(hidden, float("-inf")).float()
                if sinks is not None:
                    logits = torch.cat([logits, sinks[heads, None]], dim=1)
                weights = logits.softmax(dim=1)[:, : len(entries)].to(shape.dtype)
                out[token, heads] = weights @ value
    return out


def decode(
    batch: PagedBatch,
    *,
    layer: int,
    scale: float = 0.125,
    logits_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    query: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """`ops.ragged_decode` of a batch."""
    return ops.ragged_decode(
        batch.query if query is None else query,
        batch.paged(key_scale=key_scale, value_scale=value_scale),
        batch.op_rows,
        layer,
        ops.Logits(scale, logits_soft_cap, sinks),
        **options,
    )


def make_work(batch: PagedBatch, num_programs: int | None, num_rows: int = 0) -> ops.DecodeWork:
    """Room for a batch's work, cut as small as it can be, so that short streams are shared."""
    shape = batch.shape
    work = ops.new_decode_work(
        num_rows or len(batch.requests),
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        group=shape.group,
        head_size=shape.head_size,
        pool_dtype=batch.pool.dtype,
        device=batch.pool.device,
        max_query_len=max(1, *(request.query_len for request in batch.requests)),
        num_programs=num_programs,
    )
    # Of rows without a query nothing may be left behind either.
    work.pieces.fill_(torch.nan)
    return dataclasses.replace(work, tiles=dataclasses.replace(work.tiles, least_tiles=1))


def share_out(batch: PagedBatch, work: ops.DecodeWork, backend: str = "triton") -> ops.DecodeWork:
    return ops.decode_work(
        batch.op_rows,
        num_kv_heads=batch.shape.num_kv_heads,
        block_size=batch.shape.block_size,
        out=work,
        backend=backend,
    )


def assert_matches_reference(
    batch: PagedBatch, layer: int, num_programs: int | None = 7, **options
) -> None:
    """The kernel and the reference agree, as far as attention in the batch's dtype would."""
    options = {"scale": batch.shape.head_size**-0.5, **options}
    max_query_len = max(request.query_len for request in batch.requests)
    arguments = {
        "layer": layer,
        "max_query_len": max(1, max_query_len),
        "work": share_out(batch, make_work(batch, num_programs)),
    }
    outs = {
        backend: decode(
            batch,
            **arguments,
            **options,
            out=torch.full_like(batch.query, float("nan")),
            backend=backend,
        )
        for backend in ("triton", "reference")
    }
    assert outs["triton"].isfinite().all()
    assert not arguments["work"].tickets.any(), "tickets are left for the next layer"
    assert_close(
        outs["triton"],
        outs["reference"],
        in_same_dtype(batch, layer, **options),
        batch.shape.dtype,
        # A weight is the exponential of a logit of up to about 5, whose roundings count that often.
        ulps=8,
    )


SHAPES = {
    "float32": Shape(dtype=torch.float32),
    "bfloat16": Shape(dtype=torch.bfloat16),
    "float16": Shape(dtype=torch.float16),
    "head size 80": Shape(head_size=80, dtype=torch.bfloat16),
    "head size 96": Shape(head_size=96, dtype=torch.float16),
    "head size 128": Shape(head_size=128, num_layers=1, dtype=torch.bfloat16),
    "head size 256": Shape(head_size=256, num_kv_heads=1, dtype=torch.bfloat16),
    "block size 32": Shape(block_size=32, num_layers=1),
    "block size 64": Shape(block_size=64, num_layers=1),
    "block size 128": Shape(block_size=128, num_layers=1, num_kv_heads=1),
    "group 1": Shape(group=1, num_kv_heads=3),
    "group 3": Shape(group=3, num_kv_heads=3),
    "group 8": Shape(group=8),
    "group 16": Shape(group=16, num_kv_heads=1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_reference(shape, device):
    batch = make_batch(shape, ragged_requests(shape), device)
    assert_matches_reference(batch, layer=shape.num_layers - 1)


@pytest.mark.parametrize("query_len", [2, 3, 8])
def test_several_queries_per_row_are_causal(query_len, device):
    shape = Shape(group=3)
    assert_matches_reference(make_batch(shape, ragged_requests(shape, query_len), device), layer=0)


def test_rows_of_different_query_lengths(device):
    requests = [
        dataclasses.replace(request, query_len=query_len)
        for request, query_len in zip(ragged_requests(BASE), (1, 2, 0, 1, 4), strict=True)
    ]
    batch = make_batch(BASE, requests, device)
    assert_matches_reference(batch, layer=1)


def test_a_row_without_queries_is_left_alone(device):
    shape = BASE
    batch = make_batch(shape, [Request(20), Request(0, query_len=0)], device)
    out = decode(batch, layer=0)
    assert out.shape[0] == 1
    assert out.isfinite().all()


@pytest.mark.parametrize("num_programs", [1, 2, 3, 16, 64])
def test_any_number_of_programs(num_programs, device):
    shape = Shape(num_layers=1, num_kv_heads=2)
    requests = [
        Request(seq_len=700),
        compressed(shape, 900, 20, 901, pages=[1, 39]),
        Request(seq_len=1),
    ]
    batch = make_batch(shape, requests, device)
    assert_matches_reference(batch, layer=0, num_programs=num_programs)


def test_shares_are_equal_and_cover_every_tile_once(device):
    shape = Shape(num_layers=3, num_kv_heads=2)
    requests = [*ragged_requests(shape), Request(0, query_len=0), Request(501)]
    batch = make_batch(shape, requests, device)
    for num_programs in (1, 4, 9, 500):
        work = share_out(batch, make_work(batch, num_programs, num_rows=20))
        want = share_out(batch, make_work(batch, num_programs, num_rows=20), "reference")
        num_streams = len(requests) * shape.num_kv_heads
        assert torch.equal(
            work.tile_starts[:, : num_streams + 1], want.tile_starts[:, : num_streams + 1]
        )
        assert torch.equal(work.num_tiles, want.num_tiles)
        for layer in range(shape.num_layers):
            working = min(num_programs, int(work.num_tiles[layer]))
            assert torch.equal(
                work.first_streams[layer, :working], want.first_streams[layer, :working]
            )


def test_more_streams_than_are_looked_at_together(monkeypatch, device):
    monkeypatch.setattr(WORK_MODULE, "_TILE_STREAMS", 4)
    shape = Shape(num_layers=2, num_kv_heads=3)
    batch = make_batch(shape, [*ragged_requests(shape), Request(300)], device)
    work, want = (share_out(batch, make_work(batch, 11), name) for name in ("triton", "reference"))
    assert torch.equal(work.tile_starts, want.tile_starts)
    assert torch.equal(work.first_streams, want.first_streams)


@pytest.mark.parametrize(
    ("seq_len", "working"), [(1, 1), (32, 1), (128, 1), (129, 2), (512, 4), (513, 5), (9000, 6)]
)
def test_small_batches_are_not_cut_into_crumbs(seq_len, working, device):
    shape = Shape(num_layers=1, num_kv_heads=1, group=1)
    batch = make_batch(shape, [Request(seq_len)], device)
    work = make_work(batch, 6)
    work = dataclasses.replace(work, tiles=dataclasses.replace(work.tiles, least_tiles=4))
    share_out(batch, work)
    decode(batch, layer=0, work=work)
    # The one stream's pieces: of its start, and of each that goes on; none if it is not shared.
    pieces = int((~work.pieces[:, 0, 0].isnan()).sum())
    assert (pieces or 1) == working


def test_work_of_a_captured_graph_serves_other_rows(device):
    """As a replay has it: the same tensors, launches and sizes; rows as they now are."""
    shape = Shape(num_layers=2, num_kv_heads=2)
    few = make_batch(shape, [Request(40), Request(33)], device)
    many = make_batch(shape, [*ragged_requests(shape), Request(200)], device)
    work = make_work(many, 9)
    options = {"layer": 1, "work": work}
    want = decode(many, **{**options, "work": None})
    share_out(few, work)
    decode(few, **options)
    # A graph of six rows launches what it launched, though the lists were made for two.
    padded = dataclasses.replace(
        many, query_start_loc=torch.tensor([0, 1, 2, 2, 2, 2, 2], dtype=torch.int32, device=device)
    )
    small = PagedBatch(
        shape,
        many.requests[:2],
        many.pool,
        many.rows[:2],
        many.page_offsets[:2],
        many.block_table[:2],
        many.query_start_loc[:3],
        many.query,
    )
    share_out(small, work)
    out = torch.full_like(many.query, torch.nan)
    decode(padded, **options, out=out)
    torch.testing.assert_close(out[:2], want[:2], atol=1e-5, rtol=1e-5)
    assert out[2:].isnan().all()
    share_out(many, work)
    again = decode(many, **options)
    torch.testing.assert_close(again, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"logits_soft_cap": 2.0},
        {"logits_soft_cap": 3.0, "num_programs": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("query_len", [1, 3])
def test_options_of_the_softmax(options, query_len, device):
    assert_matches_reference(
        make_batch(BASE, ragged_requests(BASE, query_len), device), layer=1, **options
    )


@pytest.mark.parametrize(
    ("num_programs", "dtype"),
    [(1, torch.float32), (6, torch.float32), (6, torch.bfloat16)],
    ids=str,
)
def test_attention_sinks(num_programs, dtype, device):
    shape = dataclasses.replace(BASE, dtype=torch.bfloat16)
    batch = make_batch(shape, [*ragged_requests(shape), Request(400)], device)
    sinks = torch.linspace(-3, 5, shape.num_heads, dtype=dtype, device=device)
    assert_matches_reference(batch, layer=1, sinks=sinks, num_programs=num_programs)


@pytest.mark.parametrize("pool_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp8_pool_with_scales(pool_dtype, dtype, device):
    shape = Shape(dtype=dtype, pool_dtype=pool_dtype)
    batch = make_batch(shape, ragged_requests(shape), device)
    scales = torch.linspace(0.25, 2.0, shape.num_streams, device=device)
    assert_matches_reference(batch, layer=1, key_scale=scales, value_scale=scales.flip(0))


def test_non_contiguous_query_and_out(device):
    batch = make_batch(BASE, ragged_requests(BASE), device)
    num_tokens, num_heads, d = batch.query.shape
    fused = torch.full((num_tokens, 3 * num_heads, d + 16), float("nan"), device=device)
    fused = fused.to(BASE.dtype)
    query, out = fused[:, :num_heads, :d], fused[:, num_heads : 2 * num_heads, :d]
    query.copy_(batch.query)
    want = decode(batch, layer=0)
    decode(batch, layer=0, query=query, out=out)
    assert torch.equal(out, want)
    assert fused[:, 2 * num_heads :].isnan().all()


def test_same_result_each_time(device):
    batch = make_batch(BASE, [*ragged_requests(BASE), Request(900)], device)
    first = decode(batch, layer=0)
    assert torch.equal(first, decode(batch, layer=0))


@hypothesis_settings(max_examples=15)
@given(data=st.data())
def test_any_ragged_layout(data):
    shape = Shape(
        num_layers=data.draw(st.integers(1, 3)),
        num_kv_heads=data.draw(st.integers(1, 3)),
        group=data.draw(st.integers(1, 5)),
    )
    requests = []
    for seed in range(data.draw(st.integers(1, 4))):
        prompt_len = data.draw(st.integers(1, 150))
        generated = data.draw(st.integers(1, 40))
        query_len = data.draw(st.integers(1, min(4, generated)))
        window = data.draw(st.integers(1, 20))
        num_region_blocks = data.draw(st.integers(0, 4))
        seq_len = prompt_len + generated
        if num_region_blocks == 0 or prompt_len <= window:
            requests.append(Request(seq_len, query_len))
            continue
        requests.append(
            compressed(
                shape,
                prompt_len,
                num_region_blocks,
                seq_len,
                query_len=query_len,
                window=window,
                seed=seed,
            )
        )
    batch = make_batch(shape, requests, DEVICE, seed=data.draw(st.integers(0, 99)))
    num_programs = data.draw(st.sampled_from([None, 1, 2, 5, 13, 40]))
    assert_matches_reference(batch, layer=shape.num_layers - 1, num_programs=num_programs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 2}, "layer 2 is not among 2"),
        ({"max_query_len": 9}, "1 to 8 queries"),
        ({"sinks": torch.zeros(3)}, "want sinks"),
        ({"key_scale": torch.ones(3)}, "4 float32 scales"),
        ({"logits_soft_cap": -1.0}, "must not be negative"),
        ({"backend": "cuda"}, "unknown ops backend 'cuda'; known: triton, reference"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, message, device):
    batch = make_batch(BASE, ragged_requests(BASE), device)
    with pytest.raises(ValueError, match=message):
        decode(batch, **{"layer": 0, **change})


def test_shapes_that_do_not_fit_are_refused(device):
    batch = make_batch(BASE, ragged_requests(BASE), device)
    for name, wrong, message in (
        ("query", batch.query[..., :32], "head size 32"),
        ("query", batch.query.half(), "does not fit"),
        ("pool", batch.pool[:, :, :96], "contiguous pool"),
        ("pool", batch.pool[:-1], "not whole blocks"),
        ("shape", dataclasses.replace(BASE, num_kv_heads=3), "query heads"),
        ("rows", batch.rows[:, :3], "row descriptors"),
        ("page_offsets", batch.page_offsets.long(), "page offsets"),
        ("page_offsets", None, "page offsets"),
        ("block_table", batch.block_table[1:], "block table"),
        ("query_start_loc", batch.query_start_loc[1:], "query starts"),
        ("query_start_loc", None, "query starts"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(dataclasses.replace(batch, **{name: wrong}), layer=0)


@pytest.mark.parametrize(
    ("capability", "is_refused"), [((8, 0), True), ((8, 9), False), ((9, 0), False)]
)
def test_fp8_e4m3_is_refused_where_the_gpu_has_no_such_type(monkeypatch, capability, is_refused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    pool = SimpleNamespace(is_cuda=True, dtype=torch.float8_e4m3fn, device="cuda:0")
    other = SimpleNamespace(is_cuda=True, dtype=torch.float8_e5m2, device="cuda:0")
    dispatch.triton_kernels(other)
    if is_refused:
        with pytest.raises(RuntimeError, match=r"need compute capability 8.9, this GPU has 8.0"):
            dispatch.triton_kernels(other, pool)
    else:
        dispatch.triton_kernels(other, pool)
