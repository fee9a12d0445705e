"""Our builder and impl on vLLM's real CPU kernels, step by step, against float64 attention.

No engine: rows, block tables and chunks are chosen here, so that every kind of step occurs.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compiled_ops import need_compiled_ops

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import CacheShape, RequestGeometry
from vllm_kvcompress.policies.base import Rotary

vllm = pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # noqa: E402

from vllm_kvcompress.vllm_integration.platforms.cpu.attention import (  # noqa: E402
    KVCompressCPUImpl,
    KVCompressCPUMetadataBuilder,
)
from vllm_kvcompress.vllm_integration.platforms.cpu.engine import CPUEngine  # noqa: E402
from vllm_kvcompress.vllm_integration.platforms.cpu.page_order import find_page_order  # noqa: E402
from vllm_kvcompress.vllm_integration.worker.engine import EngineParts  # noqa: E402
from vllm_kvcompress.vllm_integration.worker.metrics import CompressionStats  # noqa: E402
from vllm_kvcompress.vllm_integration.worker.pool import flat_pool  # noqa: E402

WINDOW = 8
MAX_ROWS = 8


@pytest.fixture(autouse=True, scope="module", params=["torch", "native"])
def ops_backend(request):
    if request.param == "native":
        need_compiled_ops()
    Rig.ops_backend = request.param
    yield
    Rig.ops_backend = "torch"


SCALE = 0.2


class Request:
    """A request's tokens, its row as vLLM's manager would lay it out, and its plain K/V."""

    def __init__(self, name: str, prompt_len: int, is_one_shot: bool = False):
        self.name = name
        self.prompt_len = prompt_len
        self.is_one_shot = is_one_shot
        self.num_computed = 0
        self.row: list[int] = []
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []


class Rig:
    """A one-worker stand-in for the model runner: pool, builder, impl, block allocation."""

    ops_backend = "torch"

    def __init__(
        self,
        shape: CacheShape,
        config: KVCompressConfig,
        dtype: torch.dtype,
        with_sinks: bool = False,
    ):
        self.shape, self.config, self.dtype = shape, config, dtype
        num_heads = shape.num_kv_heads * shape.num_queries_per_kv
        # Some that draw next to nothing, some that draw most of it.
        self.sinks = torch.linspace(-4, 6, num_heads).bfloat16() if with_sinks else None
        self.generator = torch.Generator().manual_seed(0)
        num_blocks = 120
        page = 2 * shape.block_size * shape.head_size
        self.buffer = torch.full((num_blocks * shape.pages_per_block * page,), torch.nan).to(dtype)
        views = self.buffer.view(
            num_blocks, shape.num_layers, shape.num_kv_heads, shape.block_size, 2 * shape.head_size
        )
        self.layer_views = {f"layers.{i}": views[:, i] for i in range(shape.num_layers)}
        self.free = torch.randperm(num_blocks - 1, generator=self.generator).add(1).tolist()
        isa = _get_attn_isa(dtype, shape.block_size, shape.head_size, "auto")
        self.names: tuple[list[str], np.ndarray] = ([], np.zeros(0, np.int32))
        self.stats = CompressionStats(log=False)
        self.order = find_page_order(isa, shape.block_size, shape.head_size, dtype)
        parts = EngineParts(
            config=config,
            shape=shape,
            layer_views=self.layer_views,
            layers=[self._layer_parameters() for _ in range(shape.num_layers)],
            row_names=lambda common: self.names,
            max_num_reqs=MAX_ROWS,
            stats=self.stats,
        )
        self.engine = CPUEngine(parts, self.order, Rig.ops_backend)
        builder = object.__new__(KVCompressCPUMetadataBuilder)
        vars(builder).update(
            num_heads=num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_size,
            dtype=dtype,
            window_size=-1,
            block_size=shape.block_size,
            kv_cache_dtype="auto",
            isa=isa,
            is_cross_attention=False,
            is_encoder_only_attention=False,
            engine=self.engine,
            _table_key=[],
            _page_tables=torch.empty(0),
        )
        self.builder = builder
        current = VllmConfig()
        # The stock impl looks at nothing but the model's dtype.
        current.model_config = SimpleNamespace(dtype=dtype)
        with set_current_vllm_config(current):
            self.impl = KVCompressCPUImpl(
                num_heads,
                shape.head_size,
                SCALE,
                shape.num_kv_heads,
                None,
                None,
                "auto",
                sinks=self.sinks,
            )
        self.layers = [
            SimpleNamespace(layer_name=name, isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
            for name in self.layer_views
        ]

    def _layer_parameters(self) -> LayerParameters:
        shape = self.shape
        weight_size = (shape.num_kv_heads, shape.num_queries_per_kv, shape.head_size, 24)
        angles = torch.arange(400)[:, None] / 1000 ** torch.linspace(0, 1, shape.head_size // 2)
        rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=-1))
        weight = self.random(*weight_size)
        sinks = None if self.sinks is None else self.sinks.float().view(weight_size[:2])
        return LayerParameters(SCALE, 0.0, weight, ops.output_root(weight), rotary, sinks)

    def geometry(self, request: Request) -> RequestGeometry:
        """Where the request's pages go."""
        return self.engine.requests.geometry.of(request.prompt_len)

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator).to(self.dtype)

    def token_sizes(self) -> list[tuple[int, ...]]:
        """Sizes of one token's keys, values and queries in all layers."""
        shape = self.shape
        kv = (shape.num_layers, shape.num_kv_heads, shape.head_size)
        return [kv, kv, (shape.num_layers, shape.num_kv_heads * shape.num_queries_per_kv, kv[2])]

    def step(
        self, chunks: list[tuple[Request, int]], given: list[torch.Tensor] | None = None
    ) -> None:
        """Compute the next tokens of each request in one step and check every layer's output.

        `given` are keys, values and queries of the first request's tokens; others are random.
        """
        shape = self.shape
        tables = np.zeros((len(chunks), 64), np.int32)
        starts, seq_lens, slots = [0], [], []
        for i, (request, count) in enumerate(chunks):
            geometry = self.geometry(request)
            end = request.num_computed + count
            if request.is_one_shot and not request.row:
                # Block 0 is nobody's and full of NaN.
                request.row += [0] * geometry.first_kept_block
            while len(request.row) < geometry.num_row_blocks(end):
                block = self.free.pop()
                index = len(request.row)
                region = geometry.boundary_block + geometry.num_region_blocks
                if not (geometry.is_compressed and geometry.boundary_block <= index < region):
                    # The kernel multiplies unwritten values by zero weights, so they must be
                    # finite. A region is always written whole and may start as NaN.
                    self.buffer.view(120, -1)[block] = 0
                request.row.append(block)
            tables[i, : len(request.row)] = request.row
            starts.append(starts[-1] + count)
            seq_lens.append(end)
            for position in range(request.num_computed, end):
                block = tables[i, position // shape.block_size]
                slots.append(int(block) * shape.block_size + position % shape.block_size)
        self.names = (
            [request.name for request, _ in chunks],
            np.array([r.prompt_len for r, _ in chunks]),
        )
        query_start_loc = torch.tensor(starts, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=query_start_loc,
            query_start_loc_cpu=query_start_loc,
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            num_reqs=len(chunks),
            num_actual_tokens=starts[-1],
            max_query_len=max(count for _, count in chunks),
            max_seq_len=max(seq_lens),
            block_table_tensor=torch.from_numpy(tables),
            slot_mapping=torch.tensor(slots),
        )
        compressed = [self.geometry(request).is_compressed for request, _ in chunks]
        compressed = [
            is_compressed and request.num_computed >= self.geometry(request).compact_len
            for is_compressed, (request, _) in zip(compressed, chunks, strict=True)
        ]
        one_shot = {r.name for r, _ in chunks if r.is_one_shot and not r.num_computed}
        with self.engine.scheduled_step(one_shot):
            metadata = self.builder.build(0, common)
        queries = []
        for i, (request, count) in enumerate(chunks):
            key, value, query = (
                x.transpose(0, 1)
                for x in (
                    given
                    if given is not None and i == 0
                    else [self.random(count, *size) for size in self.token_sizes()]
                )
            )
            request.keys.append(key)
            request.values.append(value)
            queries.append(query)
        for index, layer in enumerate(self.layers):
            query = torch.cat([x[index] for x in queries])
            key = torch.cat([request.keys[-1][index] for request, _ in chunks])
            value = torch.cat([request.values[-1][index] for request, _ in chunks])
            output = torch.full_like(query, torch.nan)
            self.impl.forward(
                layer, query, key, value, self.layer_views[layer.layer_name], metadata, output
            )
            for i, (request, _) in enumerate(chunks):
                self._check(
                    request,
                    index,
                    query[starts[i] : starts[i + 1]],
                    output[starts[i] : starts[i + 1]],
                    compressed[i],
                )
        for request, count in chunks:
            before = request.num_computed
            request.num_computed += count
            geometry = self.geometry(request)
            if geometry.is_compressed and before < geometry.compact_len <= request.num_computed:
                request.kept = self._read_kept(request)

    def _read_kept(self, request: Request) -> list[torch.Tensor]:
        """[S] positions that each stream's region holds, found by the keys."""
        shape, geometry = self.shape, self.geometry(request)
        slot = self.engine.requests.get(request.name).slot
        assert slot > 0
        counts = self.engine.page_offsets[slot].diff()
        first = geometry.boundary_block
        region = torch.tensor(request.row[first : first + geometry.num_region_blocks])
        ids = ops.region_page_ids(region, shape.pages_per_block)
        assert int(counts.sum()) == len(ids)
        pages = ops.unpack_pages(self.engine.pool.flatten(1), ids[:, None], self.order, "key")
        kept = []
        for stream, keys in enumerate(pages.split(counts.tolist())):
            layer, head = divmod(stream, shape.num_kv_heads)
            known = torch.cat([k[layer] for k in request.keys])[:, head]
            is_same = (keys.flatten(0, 1)[:, None] == known).all(dim=-1)
            assert (is_same.sum(dim=1) == 1).all()
            kept.append(is_same.int().argmax(dim=1))
        return kept

    def _check(
        self,
        request: Request,
        layer: int,
        query: torch.Tensor,
        output: torch.Tensor,
        compressed: bool,
    ) -> None:
        shape = self.shape
        keys = torch.cat([k[layer] for k in request.keys]).double()
        values = torch.cat([v[layer] for v in request.values]).double()
        num_new, num_tokens = len(query), len(keys)
        # Whether a head of a new token may look at a token.
        is_read = torch.ones(num_new, num_tokens, dtype=torch.bool)
        is_read = is_read.tril(num_tokens - num_new).repeat(shape.num_kv_heads, 1, 1)
        if compressed:
            tail = self.geometry(request).num_candidate_tokens
            for head, kept in enumerate(self.kept_tokens(request, layer)):
                evicted = torch.ones(tail, dtype=torch.bool)
                evicted[kept] = False
                is_read[head, :, :tail][:, evicted] = False
        heads = (num_new, shape.num_kv_heads, shape.num_queries_per_kv, shape.head_size)
        logits = torch.einsum("mhgd,nhd->hgmn", query.double().view(heads), keys) * SCALE
        logits = logits.masked_fill(~is_read[:, None], -torch.inf)
        if self.sinks is not None:
            column = self.sinks.double().view(shape.num_kv_heads, shape.num_queries_per_kv, 1, 1)
            logits = torch.cat([logits, column.expand(-1, -1, num_new, 1)], dim=-1)
        weights = logits.softmax(dim=-1)[..., :num_tokens]
        want = torch.einsum("hgmn,nhd->mhgd", weights, values)
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[self.dtype]
        torch.testing.assert_close(
            output.double().view(heads), want, atol=tolerance, rtol=tolerance
        )

    def kept_tokens(self, request: Request, layer: int) -> list[torch.Tensor]:
        """Positions each head of a layer keeps in the region."""
        heads = slice(layer * self.shape.num_kv_heads, (layer + 1) * self.shape.num_kv_heads)
        return request.kept[heads]


SHAPES = {
    "gqa_3_to_1": CacheShape(3, 2, 3, 64, 32),
    "mha": CacheShape(2, 2, 1, 64, 32),
    "gqa_8_to_1_small_blocks": CacheShape(2, 1, 8, 32, 16),
}


@pytest.fixture(params=["page", "token"])
def granularity(request):
    return request.param


@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_kinds_of_steps(
    name: str, dtype: torch.dtype, granularity: str, with_sinks: bool
) -> None:
    shape = SHAPES[name]
    block = shape.block_size
    config = KVCompressConfig(
        "ada-pyramidkv",
        budget=4 * block,
        window=WINDOW,
        options=(("granularity", granularity),),
    )
    rig = Rig(shape, config, dtype, with_sinks)
    long, even, short, late = (
        Request("long", 10 * block + 5),
        Request("even", 8 * block),
        Request("short", block + 3),
        Request("late", 9 * block + block - 1),
    )
    # Mixed prefill; the last chunk of `long` is shorter than the window and its boundary lies
    # in the chunk before.
    rig.step([(long, 6 * block), (short, block + 3)])
    rig.step([(long, 4 * block + 2), (short, 1), (even, 3 * block)])
    assert not long.kept
    rig.step([(short, 1), (long, 3), (even, 5 * block)])
    assert long.kept
    # Decode of two compressed and one dense row beside a prefill in one shot.
    rig.step([(long, 1), (short, 1), (even, 1), (late, late.prompt_len)])
    # Several tokens over a region (a resumed request), then tails that grow over blocks.
    rig.step([(even, 5), (late, 1), (long, 2)])
    for _ in range(block + 2):
        rig.step([(long, 1), (even, 1), (late, 1)])
    rig.step([(late, 1), (long, 1)])
    records = rig.stats.snapshot()["requests"]
    compressed = {r["request_id"]: r["compressed"] for r in records}
    assert compressed == {"short": False, "long": True, "even": True, "late": True}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_suffix_attends_to_what_was_kept(name: str, dtype: torch.dtype, granularity: str) -> None:
    shape = SHAPES[name]
    block = shape.block_size
    suffix = block + 5
    config = KVCompressConfig(
        "ada-snapkv",
        budget=4 * block,
        window=WINDOW,
        options=(("granularity", granularity), ("suffix_tokens", suffix)),
    )
    rig = Rig(shape, config, dtype)
    # Compacted in the middle of a block, at a block's end, and never.
    odd, even, short = (
        Request("odd", 9 * block + 3 + suffix),
        Request("even", 8 * block + suffix),
        Request("short", suffix + WINDOW),
    )
    rig.step([(odd, 9 * block + 3), (short, suffix)])
    # A suffix in one chunk beside a compaction, and one in two chunks beside decoding rows.
    rig.step([(short, WINDOW), (odd, suffix), (even, 8 * block)])
    rig.step([(odd, 1), (even, block), (short, 1)])
    rig.step([(even, 5), (odd, 1)])
    for _ in range(block + 2):
        rig.step([(odd, 1), (even, 1), (short, 1)])
    records = rig.stats.snapshot()["requests"]
    by_id = {r["request_id"]: r["compressed"] for r in records}
    assert by_id == {"odd": True, "short": False, "even": True}


@pytest.mark.parametrize("method", ["h2o", "expected-attention", "ada-criticalkv", "span"])
def test_chunks_of_a_prompt_select_what_a_single_step_does(method: str, granularity: str) -> None:
    shape = SHAPES["gqa_3_to_1"]
    config = KVCompressConfig(
        method, budget=128, window=WINDOW, options=(("granularity", granularity),)
    )
    selections = []
    for chunks in ((325,), (70, 33, 1, 217, 4)):
        rig = Rig(shape, config, torch.float32)
        # The same tokens, however they are cut.
        whole = [rig.random(325, *size) for size in rig.token_sizes()]
        request, start = Request("a", 325), 0
        for count in chunks:
            # Blocks are handed out differently, too.
            other = Request(f"other-{start}", 40)
            given = [x[start : start + count] for x in whole]
            rig.step([(request, count), (other, 40)], given)
            start += count
        rig.step([(request, 1)])
        selections.append(request.kept)
    for whole, chunked in zip(*selections, strict=True):
        assert torch.equal(whole, chunked)


@pytest.mark.parametrize("method", ["span", "ada-criticalkv"])
def test_new_weights_serve_a_prompt_that_has_begun(method: str) -> None:
    shape, config = SHAPES["gqa_3_to_1"], KVCompressConfig(method, budget=128, window=WINDOW)
    kept = []
    for weights in ("old", "new", "new in between"):
        rig = Rig(shape, config, torch.float32)
        whole = [rig.random(325, *size) for size in rig.token_sizes()]
        new = [rig._layer_parameters() for _ in range(shape.num_layers)]
        request = Request("a", 325)
        if weights == "new":
            rig.engine.configure(config, new)
        rig.step([(request, 200)], [x[:200] for x in whole])
        if weights == "new in between":
            rig.engine.use_parameters(new)
        rig.step([(request, 125)], [x[200:] for x in whole])
        kept.append(torch.cat(request.kept).tolist())
    assert kept[1] == kept[2]
    assert kept[0] != kept[1]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in SHAPES] + [("gqa_3_to_1", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("method", ["span", "ada-criticalkv", "h2o"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
def test_one_shot_prompts_keep_what_they_would_with_blocks(
    name: str, dtype: torch.dtype, method: str, granularity: str, with_sinks: bool
) -> None:
    shape = SHAPES[name]
    block = shape.block_size
    config = KVCompressConfig(
        method, budget=4 * block, window=WINDOW, options=(("granularity", granularity),)
    )
    length = 9 * block + 7
    kept = []
    for is_one_shot in (False, True):
        rig = Rig(shape, config, dtype, with_sinks)
        whole = [rig.random(length, *size) for size in rig.token_sizes()]
        request = Request("a", length, is_one_shot)
        short, other = Request("short", 20), Request("other", 8 * block, is_one_shot=True)
        decoding = Request("decoding", 7 * block + 1)
        rig.step([(decoding, decoding.prompt_len), (short, 10)])
        # All three kinds of rows in a step, two prompts in one shot.
        rig.step([(request, length), (decoding, 1), (short, 10), (other, 8 * block)], whole)
        for _ in range(block + 1):
            rig.step([(request, 1), (other, 1), (short, 1), (decoding, 1)])
        # Resumed, ahead of a decoding row; two tokens that were generated before follow.
        rig.engine.forget(["other"])
        again = Request("other", 8 * block, is_one_shot=True)
        rig.step([(again, 8 * block), (request, 1)])
        rig.step([(again, 2), (request, 1)])
        rig.step([(request, 1), (again, 1)])
        geometry = rig.geometry(request)
        first = geometry.boundary_block
        region = torch.tensor(request.row[first : first + geometry.num_region_blocks])
        pages = rig.engine.pool.flatten(1)[ops.region_page_ids(region, shape.pages_per_block)]
        kept.append((request.kept, pages))
        by_id = {r["request_id"]: r for r in rig.stats.snapshot()["requests"]}
        assert by_id["a"]["one_shot"] == is_one_shot
        spared = (0, geometry.first_kept_block) if is_one_shot else (geometry.first_kept_block, 0)
        assert (by_id["a"]["blocks_returned"], by_id["a"]["blocks_not_taken"]) == spared
        assert by_id["other"]["one_shot"] and not by_id["decoding"]["one_shot"]
    (expected, usual), (selection, pages) = kept
    for stream, other in zip(selection, expected, strict=True):
        assert torch.equal(stream, other)
    assert torch.equal(pages, usual)


def test_preempted_request_compacts_again_past_its_prompt_end(granularity: str) -> None:
    shape = SHAPES["gqa_3_to_1"]
    config = KVCompressConfig(
        "snapkv", budget=96, window=WINDOW, options=(("granularity", granularity),)
    )
    rig = Rig(shape, config, torch.float32)
    first = Request("a", 200)
    rig.step([(first, 200)])
    rig.step([(first, 1)])
    rig.engine.forget(["a"])
    again = Request("a", 200)
    rig.step([(again, 150)])
    # The chunk holds the rest of the prompt and three tokens that were generated before.
    rig.step([(again, 53)])
    rig.step([(again, 1)])
    snapshot = rig.stats.snapshot()
    assert [record["num_prefills"] for record in snapshot["requests"]] == [2]
    assert snapshot["totals"]["prompts"] == 1
    assert snapshot["totals"]["recomputed_prompts"] == 1
    rig.engine.forget(["a"])
    assert len(rig.engine.requests) == 0


def test_pool_views_that_are_no_slices_of_one_buffer_are_refused() -> None:
    shape = SHAPES["mha"]
    separate = [torch.zeros(4, 2, 32, 128) for _ in range(2)]
    with pytest.raises(RuntimeError, match="not a slice of one"):
        flat_pool(separate, shape)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
def test_page_order_reads_back_what_the_kernel_stored(block_size: int, head_size: int) -> None:
    from vllm import _custom_ops as vllm_ops

    dtype = torch.bfloat16
    isa = _get_attn_isa(dtype, block_size, head_size, "auto")
    order = find_page_order(isa, block_size, head_size, dtype)
    key, value = torch.randn(2, block_size, 1, head_size).to(dtype)
    page = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
    key_cache, value_cache = page.chunk(2, dim=2)
    vllm_ops.cpu_attn_reshape_and_cache(
        key, value, key_cache, value_cache, torch.arange(block_size), isa
    )
    assert torch.equal(page.flatten()[order.key_offsets], key[:, 0])
    assert torch.equal(page.flatten()[order.value_offsets], value[:, 0])
