"""A worker's engine, builder and layers without vLLM's model runner around them, on any platform.

Steps are made here, so that every kind occurs: rows, block tables and chunks are the test's choice.
What a platform has of its own is its `rig_side.Side`. Every layer's output is checked against
attention in float64, every region and every page offset against what policies choose of plain
tensors (`rig_checks`).
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from cache_shapes import with_dtype
from device_labels import no_waiting
from plain_selection import Selection
from rig_checks import SCALE, Request, check_region, expected_output, expected_selection
from rig_side import Side
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import CacheShape, RequestGeometry
from vllm_kvcompress.policies.base import Rotary
from vllm_kvcompress.vllm_integration.worker.engine import EngineParts
from vllm_kvcompress.vllm_integration.worker.metrics import CompressionStats

if TYPE_CHECKING:
    from cuda_side import CapturedStep

# Which score and share budgets in different ways.
METHODS = (
    "span",
    "snapkv",
    "pyramidkv",
    "ada-pyramidkv",
    "kvc",
    "tova",
    "h2o",
    "ada-criticalkv",
    "layer-defensivekv",
    "keydiff",
    "expected-attention",
    "streamingllm",
    "chunkkv",
    "random",
)
# vLLM's, for what a row has no block for.
NULL_BLOCK = 0
MAX_ROWS, MAX_TOKENS, ROW_WIDTH, NUM_BLOCKS = 6, 1024, 64, 160

# New tokens of one layer: [T, H, d] keys and values, [T, H * g, d] queries.
Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# A step: requests and how many new tokens each has.
Chunks = Sequence[tuple[Request, int]]


class Rig:
    """One worker: pool, engine, builder, layers, and block allocation.

    Args:
        patch: a pytest MonkeyPatch, which undoes what stands in.
        side: the platform.
        shape, config: of the engine.
        dtype: of keys, values and queries; None = the side's.
        with_sinks: whether layers have attention sinks.
        may_wait: whether steps may make the host wait for the device.
    """

    def __init__(
        self,
        patch: Any,
        side: Side,
        shape: CacheShape,
        config: KVCompressConfig,
        dtype: torch.dtype | None = None,
        with_sinks: bool = False,
        may_wait: bool = True,
    ) -> None:
        side.prepare(patch)
        self.dtype = dtype = dtype or side.dtype
        self.side, self.shape, self.config = side, with_dtype(shape, dtype), config
        shape = self.shape
        self._may_wait = may_wait
        device = side.device
        self._generator = None
        if device.type != "meta":
            self._generator = torch.Generator(device).manual_seed(0)
        # Some that draw next to nothing, some that draw most of it.
        sinks = torch.linspace(-4, 6, self.num_heads, device=device).to(dtype)
        self._sinks = sinks if with_sinks else None
        size = (NUM_BLOCKS, shape.num_layers, shape.num_kv_heads, shape.block_size)
        size += (2 * shape.head_size,)
        self.buffer = torch.full(size, torch.nan, dtype=dtype, device=device)
        self.views = {f"layers.{i}": self.buffer[:, i] for i in range(shape.num_layers)}
        free = torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(1))
        self.free: list[int] = free.add(1).tolist()
        self.parameters = [self.random_parameters() for _ in range(shape.num_layers)]
        self.stats = CompressionStats(log=False)
        self._names: tuple[Sequence[str], np.ndarray] = ((), np.empty(0))
        self._make_worker()
        # Where vLLM keeps a step's inputs, always at the same addresses.
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self._starts = torch.zeros(MAX_ROWS + 1, **ints)
        self._seq_lens = torch.zeros(MAX_ROWS, **ints)
        self._table = torch.zeros(MAX_ROWS, ROW_WIDTH, **ints)
        self._slots = torch.full((MAX_TOKENS,), -1, dtype=torch.int64, device=device)

    def _make_worker(self) -> None:
        """Layers, builder and engine, in a worker's order, by their own constructors."""
        side, shape = self.side, self.shape
        vllm_config = make_vllm_config(self.dtype, **side.attention_config)
        spec = FullAttentionSpec(
            block_size=shape.block_size,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            dtype=self.dtype,
        )
        sinks = {} if self._sinks is None else {"sinks": self._sinks}
        names: list[Any] = list(self.views)
        with set_current_vllm_config(vllm_config):
            with torch.device(side.device):
                self.layers = {
                    name: Attention(
                        self.num_heads,
                        shape.head_size,
                        SCALE,
                        shape.num_kv_heads,
                        prefix=name,
                        attn_backend=side.attention,
                        **sinks,
                    )
                    for name in names
                }
            make_builder: Any = side.attention.get_builder_cls()
            self.builder = make_builder(spec, names, vllm_config, side.device)
        self._order = side.page_order(self.layers[names[0]], shape, self.dtype)
        parts = EngineParts(
            config=self.config,
            shape=shape,
            layer_views=self.views,
            layers=self.parameters,
            row_names=lambda common: self._names,
            max_num_reqs=MAX_ROWS,
            stats=self.stats,
            one_shot_tokens=MAX_TOKENS if side.counts_memory else None,
        )
        self.engine = side.make_engine(parts, self._order, self.impl)
        self.builder.bind(self.engine)

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.shape.num_kv_heads * self.shape.num_queries_per_kv

    @property
    def impl(self) -> Any:
        """Of the first layer; the others' are alike."""
        return next(iter(self.layers.values())).impl

    def random_parameters(self) -> LayerParameters:
        """What scoring must know of a layer, on the device."""
        shape = self.shape
        weight = self.random(shape.num_kv_heads, shape.num_queries_per_kv, shape.head_size, 24)
        angles = torch.arange(600)[:, None] / 1000 ** torch.linspace(0, 1, shape.head_size // 2)
        rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.side.device))
        sinks = None if self._sinks is None else self._sinks.float().view(weight.shape[:2])
        return LayerParameters(SCALE, 0.0, weight, ops.output_root(weight), rotary, sinks)

    def random(self, *size: int) -> torch.Tensor:
        """Normal numbers on the device."""
        numbers = torch.randn(size, generator=self._generator, device=self.side.device)
        return numbers.to(self.dtype)

    def random_tokens(self, count: int) -> list[Tokens]:
        """Keys, values and queries of so many tokens, layer by layer."""
        shape = self.shape
        heads = (shape.num_kv_heads, shape.num_kv_heads, self.num_heads)
        parts = [self.random(shape.num_layers, count, n, shape.head_size) for n in heads]
        return list(zip(*parts, strict=True))

    def geometry(self, request: Request) -> RequestGeometry:
        """Where the request's pages go."""
        return self.engine.requests.geometry.of(request.prompt_len)

    def metadata(self, chunks: Chunks, num_padded_rows: int = 0, is_step: bool = True) -> Any:
        """What the builder makes of a step, as vLLM would hand it over.

        Args:
            chunks: in the order of their rows.
            num_padded_rows: of one token each, behind them.
            is_step: whether it is one of the scheduler's.
        """
        num_rows, counts = len(chunks) + num_padded_rows, [count for _, count in chunks]
        starts = np.cumsum([0, *counts] + [0] * num_padded_rows).astype(np.int32)
        seq_lens = np.zeros(num_rows, np.int32)
        table = np.zeros((MAX_ROWS, ROW_WIDTH), np.int32)
        padded = int(starts[-1]) + num_padded_rows
        slots = np.full(MAX_TOKENS, -1)
        for i, (request, count) in enumerate(chunks):
            seq_lens[i] = request.num_computed + count
            self._grow(request, int(seq_lens[i]))
            table[i, : len(request.row)] = request.row
            # As vLLM computes them, knowing of no regions.
            positions = np.arange(request.num_computed, seq_lens[i])
            blocks = np.array(request.row)[positions // self.shape.block_size]
            places = blocks * self.shape.block_size + positions % self.shape.block_size
            slots[starts[i] : starts[i + 1]] = places
        self._starts[: num_rows + 1] = torch.from_numpy(starts)
        self._seq_lens.zero_()
        self._seq_lens[:num_rows] = torch.from_numpy(seq_lens)
        self._table.copy_(torch.from_numpy(table))
        self._slots.copy_(torch.from_numpy(slots))
        self._names = (
            [request.name for request, _ in chunks],
            np.array([request.prompt_len for request, _ in chunks]),
        )
        common = CommonAttentionMetadata(
            query_start_loc=self._starts[: num_rows + 1],
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=self._seq_lens[:num_rows],
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
            num_reqs=num_rows,
            num_actual_tokens=padded,
            max_query_len=max(counts, default=1),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=self._table[:num_rows],
            slot_mapping=self._slots[:padded],
        )
        one_shot = {r.name for r, _ in chunks if r.is_one_shot and not r.num_computed}
        with self.engine.scheduled_step(one_shot) if is_step else nullcontext(), self._watched():
            return self.builder.build(0, common)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Around what a worker does in a step."""
        with nullcontext() if self._may_wait else no_waiting(self.side.device):
            yield

    def _grow(self, request: Request, num_tokens: int) -> None:
        """Give a row the blocks that its tokens and its region need."""
        geometry = self.geometry(request)
        if request.is_one_shot and not request.row:
            # Nobody's block, and full of NaN.
            request.row = [NULL_BLOCK] * geometry.first_kept_block
        while len(request.row) < geometry.num_row_blocks(num_tokens):
            index, block = len(request.row), self.free.pop()
            region = geometry.boundary_block + geometry.num_region_blocks
            if not (geometry.is_compressed and geometry.boundary_block <= index < region):
                # Attention multiplies unwritten values by zero weights, so they must be finite. A
                # region is always written whole.
                self.buffer[block] = 0
            request.row.append(block)

    def run_layers(
        self, metadata: Any, tokens: Iterable[Tokens], outputs: Iterable[torch.Tensor]
    ) -> None:
        """Every layer's forward; writes the [T, H * g, d] outputs."""
        names = self.views.items()
        for (name, view), (key, value, query), output in zip(names, tokens, outputs, strict=True):
            layer = self.layers[name]
            layer.impl.forward(layer, query, key, value, view, metadata, output)

    def run(self, chunks: Chunks) -> None:
        """Compute the next tokens of each request in one step, whatever comes out."""
        metadata = self.metadata(chunks)
        tokens = self.random_tokens(sum(count for _, count in chunks))
        self.run_layers(metadata, tokens, [torch.empty_like(query) for _, _, query in tokens])
        for request, count in chunks:
            request.num_computed += count

    def step(
        self,
        chunks: Chunks,
        captured: CapturedStep | None = None,
        given: dict[str, list[Tokens]] | None = None,
    ) -> None:
        """Compute the next tokens of each request in one step and check all that comes out.

        Args:
            chunks: in any order. Those that the builder wants at the front are put there, as
                vLLM's model runner does.
            captured: an earlier step whose layers are replayed.
            given: per request name its tokens, layer by layer; others are random.
        """
        threshold = self.builder.reorder_batch_threshold
        if threshold is not None:
            chunks = sorted(chunks, key=lambda chunk: chunk[1] > threshold)
        num_padded = 0 if captured is None else captured.num_rows - len(chunks)
        metadata = self.metadata(chunks, num_padded)
        compacted = [r.num_computed >= self.geometry(r).compact_len for r, _ in chunks]
        own = [(given or {}).get(r.name) or self.random_tokens(count) for r, count in chunks]
        tokens = [
            tuple(torch.cat(parts) for parts in zip(*layer, strict=True))
            for layer in zip(*own, strict=True)
        ]
        if captured is None:
            outputs = [torch.full_like(query, torch.nan) for _, _, query in tokens]
            with self._watched():
                self.run_layers(metadata, tokens, outputs)
        else:
            outputs = captured.replay(metadata, tokens)
        for (request, _), layers in zip(chunks, own, strict=True):
            for index, parts in enumerate((request.keys, request.values, request.queries)):
                parts.append(torch.stack([layer[index] for layer in layers]).cpu())
        for index, output in enumerate(outputs):
            rows = output.cpu().split([*(n for _, n in chunks), *[1] * num_padded])
            sinks = None if self._sinks is None else self._sinks.cpu()
            for (request, _), row, is_compacted in zip(chunks, rows, compacted, strict=False):
                want = expected_output(
                    request, self.shape, self.geometry(request), index, is_compacted, sinks
                )
                tolerance = self.side.tolerances[self.dtype]
                torch.testing.assert_close(row.double(), want, atol=tolerance, rtol=tolerance)
        for request, count in chunks:
            before = request.num_computed
            request.num_computed += count
            geometry = self.geometry(request)
            if geometry.is_compressed and before < geometry.compact_len <= request.num_computed:
                self._check_compaction(request)

    def _check_compaction(self, request: Request) -> None:
        """Region and offsets of a prompt that has just ended against the policies' choice."""
        request.selection = self.expected_selection(request, self.parameters)
        state = self.engine.row_state(request.name)
        assert state.layout == self.geometry(request).layout
        offsets = torch.tensor([0, *itertools.accumulate(state.page_counts)])
        pages = self.region_pages(request)
        keys, values = pages[:, self._order.key_offsets], pages[:, self._order.value_offsets]
        check_region(request, self.shape, offsets, keys, values)

    def expected_selection(
        self, request: Request, parameters: Sequence[LayerParameters]
    ) -> Selection:
        """What is to be kept of a prompt whose tokens have all been computed."""
        geometry = self.geometry(request)
        return expected_selection(request, self.config, self.shape, geometry, parameters)

    def region_pages(self, request: Request) -> torch.Tensor:
        """[pages, b * 2 d] of a request's region, on the host, elements in the side's order."""
        geometry = self.geometry(request)
        first = geometry.boundary_block
        region = request.row[first : first + geometry.num_region_blocks]
        return self.buffer[region].cpu().flatten(3).flatten(0, 2)


@functools.cache
def _default_config() -> VllmConfig:
    return VllmConfig()


def make_vllm_config(dtype: torch.dtype, **attention_config: Any) -> VllmConfig:
    """vLLM's defaults, with what a plain decoder's model says where it is asked.

    A model and its configuration are all that stands in. An attribute that vLLM's classes read is
    therefore there, since they set it themselves.

    Args:
        dtype: of the model.
        attention_config: entries of its `AttentionConfig`.
    """
    config = copy.copy(_default_config())
    for name in ("attention_config", "compilation_config"):
        setattr(config, name, copy.copy(getattr(config, name)))
    for name, value in attention_config.items():
        setattr(config.attention_config, name, value)
    config.compilation_config.static_forward_context = {}
    config.model_config = SimpleNamespace(
        dtype=dtype,
        is_mm_prefix_lm=False,
        is_diffusion=False,
        rswa_window=None,
        hf_config=SimpleNamespace(model_type="llama"),
        hf_text_config=SimpleNamespace(),
    )
    return config
