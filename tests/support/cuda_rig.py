"""A GPU worker's engine, builder and impl without vLLM's model runner around them.

Steps are made here, so that every kind occurs. Where there is no GPU the kernels run in Triton's
interpreter (or the references stand in), plain torch stands in for vLLM's compiled ops, and the
device is a labelled part of the host's memory. `plain_flash_attention` and `device_labels` tell
more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from cuda_stand_ins import (
    SCALE,
    make_builder,
    make_layers,
    make_vllm_config,
    need_flash_attention,
)
from device_labels import no_waiting
from paged_pool import DEVICE
from plain_flash_attention import chosen_attention, use_plain_attention
from rig_checks import Request, check_output, check_region, expected_selection
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import NULL_BLOCK, CacheShape
from vllm_kvcompress.policies.base import Rotary
from vllm_kvcompress.vllm_integration.platforms.cuda.attention import (
    KVCompressCUDAImpl,
    KVCompressCUDAMetadata,
)
from vllm_kvcompress.vllm_integration.platforms.cuda.engine import CUDAEngine
from vllm_kvcompress.vllm_integration.worker.engine import EngineParts
from vllm_kvcompress.vllm_integration.worker.metrics import CompressionStats

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
MAX_ROWS, MAX_TOKENS, ROW_WIDTH, NUM_BLOCKS = 6, 1024, 64, 160

# New tokens of one layer: [T, H, d] keys and values, [T, H * g, d] queries.
Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class CapturedStep:
    """A step of single tokens whose layers run again and again: on a GPU a CUDA graph of them.

    Args:
        rig: whose layers.
        metadata: of a step without runs, which lies at the addresses of later steps.

    Attributes:
        num_rows: tokens of the step, padding included.
    """

    def __init__(self, rig: Rig, metadata: KVCompressCUDAMetadata) -> None:
        assert metadata.step is not None and not metadata.runs
        self.num_rows = metadata.step.num_single
        self._inputs = [
            tuple(torch.zeros_like(x) for x in layer) for layer in rig.random_tokens(self.num_rows)
        ]
        self._outputs = [torch.zeros_like(query) for _, _, query in self._inputs]
        self._replay = captured(
            lambda: rig.run_layers(metadata, self._inputs, self._outputs), DEVICE
        )

    def replay(self, tokens: Sequence[Tokens]) -> list[torch.Tensor]:
        """Each layer's [T, H * g, d] output for the tokens of fewer rows, or as many."""
        for inputs, output, new in zip(self._inputs, self._outputs, tokens, strict=True):
            output.fill_(torch.nan)
            for own, values in zip(inputs, new, strict=True):
                # Nobody may look at the padding.
                own.fill_(torch.nan)
                own[: len(values)] = values
        self._replay()
        return [output.clone() for output in self._outputs]


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """What does the same again: a replayed CUDA graph; without a GPU, the call itself."""
    if device.type != "cuda":
        return run
    # Kernels are compiled outside of the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Rig:
    """One worker: pool, engine, builder, layers, and block allocation.

    Args:
        monkeypatch: undoes what stands in.
        shape, config: of the engine.
        dtype: of keys, values and queries.
        backend: of the ops.
        flash_attn_version: skips the test where vLLM's ops are chosen and lack it.
        attention: 'vllm' or 'torch', see `chosen_attention`.
        may_wait: whether steps may make the host wait for the device.
    """

    def __init__(
        self,
        monkeypatch: Any,
        shape: CacheShape,
        config: KVCompressConfig,
        dtype: torch.dtype = torch.float32,
        backend: str = "triton",
        flash_attn_version: int = 3,
        attention: str | None = None,
        may_wait: bool = True,
    ) -> None:
        self.shape, self.config, self.dtype = shape, config, dtype
        self._may_wait = may_wait
        attention = chosen_attention(attention)
        need_flash_attention(flash_attn_version, attention)
        if attention == "torch":
            use_plain_attention(monkeypatch, flash_attn_version)
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        size = (
            NUM_BLOCKS,
            shape.num_layers,
            shape.num_kv_heads,
            shape.block_size,
            2 * shape.head_size,
        )
        self.buffer = torch.full(size, torch.nan, dtype=dtype, device=DEVICE)
        self.views = {f"layers.{i}": self.buffer[:, i] for i in range(shape.num_layers)}
        free = torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(1))
        self.free: list[int] = free.add(1).tolist()
        self.parameters = [self.random_parameters() for _ in range(shape.num_layers)]
        self.stats = CompressionStats(log=False)
        self.names: tuple[Sequence[str], np.ndarray] = ((), np.empty(0))
        parts = EngineParts(
            config=config,
            shape=shape,
            layer_views=self.views,
            layers=self.parameters,
            row_names=lambda common: self.names,
            max_num_reqs=MAX_ROWS,
            stats=self.stats,
            one_shot_tokens=MAX_TOKENS,
        )
        vllm_config = make_vllm_config(dtype, flash_attn_version)
        self.layers = make_layers(vllm_config, shape, list(self.views), DEVICE)
        self.engine = CUDAEngine(parts, backend, tells_lse=self.impl.tells_lse)
        self.builder = make_builder(vllm_config, shape, self.engine, DEVICE)
        # Where vLLM keeps a step's inputs, always at the same addresses.
        self.starts = torch.zeros(MAX_ROWS + 1, dtype=torch.int32, device=DEVICE)
        self.seq_lens = torch.zeros(MAX_ROWS, dtype=torch.int32, device=DEVICE)
        self.table = torch.zeros(MAX_ROWS, ROW_WIDTH, dtype=torch.int32, device=DEVICE)
        self.slots = torch.full((MAX_TOKENS,), -1, dtype=torch.int64, device=DEVICE)

    @property
    def impl(self) -> KVCompressCUDAImpl:
        """Of the first layer; the others' are alike."""
        return next(iter(self.layers.values())).impl

    def random_parameters(self) -> LayerParameters:
        """What scoring must know of a layer, on the device."""
        shape = self.shape
        weight = self.random(shape.num_kv_heads, shape.num_queries_per_kv, shape.head_size, 24)
        angles = torch.arange(600)[:, None] / 1000 ** torch.linspace(0, 1, shape.head_size // 2)
        rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=-1).to(DEVICE))
        return LayerParameters(SCALE, 0.0, weight, ops.output_root(weight), rotary)

    def random(self, *size: int) -> torch.Tensor:
        """Normal numbers on the device."""
        return torch.randn(size, generator=self.generator, device=DEVICE).to(self.dtype)

    def random_tokens(self, count: int) -> list[Tokens]:
        """Keys, values and queries of so many tokens, layer by layer."""
        shape = self.shape
        heads = (shape.num_kv_heads, shape.num_kv_heads)
        heads += (shape.num_kv_heads * shape.num_queries_per_kv,)
        parts = [self.random(shape.num_layers, count, n, shape.head_size) for n in heads]
        return list(zip(*parts, strict=True))

    def geometry(self, request: Request) -> Any:
        """Where the request's pages go."""
        return self.engine.requests.geometry.of(request.prompt_len)

    def metadata(
        self, chunks: Sequence[tuple[Request, int]], num_padded_rows: int = 0, is_step: bool = True
    ) -> KVCompressCUDAMetadata:
        """What the builder makes of a step of (request, new tokens), as vLLM would hand it over."""
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
        self.starts[: num_rows + 1] = torch.from_numpy(starts)
        self.seq_lens.zero_()
        self.seq_lens[:num_rows] = torch.from_numpy(seq_lens)
        self.table.copy_(torch.from_numpy(table))
        self.slots.copy_(torch.from_numpy(slots))
        self.names = (
            [request.name for request, _ in chunks],
            np.array([request.prompt_len for request, _ in chunks]),
        )
        common = CommonAttentionMetadata(
            query_start_loc=self.starts[: num_rows + 1],
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=self.seq_lens[:num_rows],
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
            num_reqs=num_rows,
            num_actual_tokens=padded,
            max_query_len=max(counts, default=1),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=self.table[:num_rows],
            slot_mapping=self.slots[:padded],
        )
        one_shot = {r.name for r, _ in chunks if r.is_one_shot and not r.num_computed}
        with self.engine.scheduled_step(one_shot) if is_step else nullcontext(), self._watched():
            return self.builder.build(0, common)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Around what a worker does in a step."""
        with nullcontext() if self._may_wait else no_waiting(DEVICE):
            yield

    def _grow(self, request: Request, num_tokens: int) -> None:
        """Give a row the blocks that its tokens and its region need."""
        geometry = self.geometry(request)
        if request.is_one_shot and not request.row:
            request.row = [NULL_BLOCK] * geometry.first_kept_block
        while len(request.row) < geometry.num_row_blocks(num_tokens):
            index, block = len(request.row), self.free.pop()
            region = geometry.boundary_block + geometry.num_region_blocks
            if not (geometry.is_compressed and geometry.boundary_block <= index < region):
                # FlashAttention multiplies unwritten values by zero weights.
                self.buffer[block] = 0
            request.row.append(block)

    def capture(self, num_rows: int) -> CapturedStep:
        """A step of single tokens of so many rows, as vLLM captures it before there are any."""
        return CapturedStep(self, self.metadata([], num_rows, is_step=False))

    def run_layers(
        self,
        metadata: KVCompressCUDAMetadata,
        tokens: Iterable[Tokens],
        outputs: Iterable[torch.Tensor],
    ) -> None:
        """Every layer's forward; writes the [T, H * g, d] outputs."""
        names = self.views.items()
        for (name, view), (key, value, query), output in zip(names, tokens, outputs, strict=True):
            layer = self.layers[name]
            layer.impl.forward(layer, query, key, value, view, metadata, output)

    def step(
        self,
        chunks: Sequence[tuple[Request, int]],
        captured: CapturedStep | None = None,
        given: dict[str, list[Tokens]] | None = None,
    ) -> None:
        """Compute the next tokens of each request in one step and check every layer's output.

        Args:
            chunks: (request, new tokens); rows of one token first, as vLLM has them.
            captured: an earlier step whose layers are replayed.
            given: per request name its tokens, layer by layer; others are random.
        """
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
            assert not metadata.runs
            outputs = captured.replay(tokens)
        for (request, _), layers in zip(chunks, own, strict=True):
            for index, parts in enumerate((request.keys, request.values, request.queries)):
                parts.append(torch.stack([layer[index] for layer in layers]).cpu())
        for index, output in enumerate(outputs):
            rows = output.cpu().split([*(n for _, n in chunks), *[1] * num_padded])
            for (request, _), row, is_compacted in zip(chunks, rows, compacted, strict=False):
                geometry = self.geometry(request)
                check_output(request, self.shape, geometry, index, row, is_compacted)
        for request, count in chunks:
            request.num_computed += count
            self._check_compaction(request, count)

    def _check_compaction(self, request: Request, count: int) -> None:
        """Region and offsets of a prompt that has just ended against the policies' choice."""
        geometry = self.geometry(request)
        before = request.num_computed - count
        if not geometry.is_compressed or not before < geometry.compact_len <= request.num_computed:
            return
        request.selection = expected_selection(
            request, self.config, self.shape, geometry, self.parameters
        )
        state = self.engine.requests.get_or_create(request.name, request.prompt_len)
        offsets = self.engine.page_offsets[state.slot]
        boundary = geometry.boundary_block
        region = request.row[boundary : boundary + geometry.num_region_blocks]
        pages = self.buffer[region].flatten(0, 2)
        check_region(request, self.shape, offsets.cpu(), pages.cpu())
