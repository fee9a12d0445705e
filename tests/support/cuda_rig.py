"""A GPU worker's engine, builder and impl without vLLM's model runner around them.

Steps are made here, so that every kind occurs. Where there is no GPU the kernels run in Triton's
interpreter (or the references stand in), and plain attention stands in for FlashAttention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from paged_pool import DEVICE
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from vllm_kvcompress import ops
from vllm_kvcompress.compaction import CacheShape, LayerParameters
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import NULL_BLOCK
from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.base import ChunkInputs, Rotary, ScoreInputs
from vllm_kvcompress.policies.selection import Selection, select
from vllm_kvcompress.vllm_integration import backend_cuda
from vllm_kvcompress.vllm_integration.backend_cuda import (
    KVCompressCUDAImpl,
    KVCompressCUDAMetadataBuilder,
)
from vllm_kvcompress.vllm_integration.engine_cuda import CUDAEngine
from vllm_kvcompress.vllm_integration.metrics import CompressionStats

SCALE = 0.2
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


def store(impl: Any, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
    """Stands in for vLLM's store op, which CPU builds do not have for this layout."""
    block_size, head_size = kv_cache.shape[2], key.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            place = kv_cache[slot // block_size, :, slot % block_size]
            place[:, :head_size], place[:, head_size:] = key[token], value[token]


def attend(
    impl: Any,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: Any,
    output: torch.Tensor,
    **scales: None,
) -> torch.Tensor:
    """Stands in for FlashAttention: causal attention of each row over its blocks, in float64."""
    _attend_rows(impl, query, kv_cache, metadata, output)
    return output


def attend_with_lse(
    impl: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: Any,
    output: torch.Tensor,
) -> torch.Tensor:
    """Stands in for FlashAttention where its logarithms of sums are asked for too."""
    lses = _attend_rows(impl, query, kv_cache, metadata, output)
    return torch.cat(lses, dim=-1).flatten(0, 1).float()


def _attend_rows(
    impl: Any, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, output: torch.Tensor
) -> list[torch.Tensor]:
    """Writes the output; returns each row's [H, g, m] logarithms of sums, sinks not among them."""
    if metadata is None:
        # vLLM measures its memory.
        output.zero_()
        return []
    starts, head_size, lses = metadata.query_start_loc.tolist(), query.shape[2], []
    for row, seq_len in enumerate(metadata.seq_lens.tolist()):
        start, end = starts[row], starts[row + 1]
        num_blocks = -(-seq_len // kv_cache.shape[2])
        pages = kv_cache[metadata.block_table[row, :num_blocks].long()]
        # [n, H, 2 d]
        entries = pages.transpose(1, 2).flatten(0, 1)[:seq_len].double()
        keys, values = entries.split(head_size, dim=-1)
        is_read = torch.ones(end - start, seq_len, dtype=torch.bool).tril(seq_len - end + start)
        if impl.sliding_window[0] >= 0:
            is_read = is_read.triu(seq_len - end + start - impl.sliding_window[0])
        output[start:end], lse = _attention(
            query[start:end],
            keys,
            values,
            is_read[None],
            impl.scale,
            impl.logits_soft_cap,
            impl.sinks,
        )
        lses.append(lse)
    return lses


def reference_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    is_read: torch.Tensor,
    scale: float = SCALE,
) -> torch.Tensor:
    """[m, Hq, d] float64 attention of queries to [n, H, d] keys, where is_read [H or 1, m, n]."""
    return _attention(query, keys, values, is_read, scale)[0]


def _attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    is_read: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference_attention`, and [H, g, m] logarithms of the sums over keys."""
    heads = query.double().unflatten(1, (keys.shape[1], -1))
    logits = torch.einsum("mhgd,nhd->hgmn", heads, keys) * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    logits = logits.masked_fill(~is_read[:, None].to(logits.device), -torch.inf)
    lse = logits.logsumexp(dim=-1)
    total = lse
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.double().view(*heads.shape[1:3], 1))
    weights = (logits - total[..., None]).exp()
    # What nobody may read may be NaN.
    values = torch.where(is_read.any(dim=1).t()[..., None].to(values.device), values, 0.0)
    return torch.einsum("hgmn,nhd->mhgd", weights, values).flatten(1, 2), lse


def make_builder(engine: CUDAEngine) -> KVCompressCUDAMetadataBuilder:
    """A builder bound to an engine, without the rest of vLLM's configuration."""
    builder = object.__new__(KVCompressCUDAMetadataBuilder)
    vars(builder).update(
        aot_schedule=False,
        aot_sliding_window=(-1, -1),
        use_full_cuda_graph=False,
        max_cudagraph_size=None,
        dcp_world_size=1,
        rswa_window=None,
        mm_prefix_query_ranges_np=None,
        engine=engine,
    )
    return builder


def make_impl(shape: CacheShape, flash_attn_version: int = 3) -> KVCompressCUDAImpl:
    """The impl of layers of this shape."""
    impl = object.__new__(KVCompressCUDAImpl)
    vars(impl).update(
        scale=SCALE,
        num_heads=shape.num_kv_heads * shape.num_queries_per_kv,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        logits_soft_cap=0,
        sinks=None,
        sliding_window=(-1, -1),
        vllm_flash_attn_version=flash_attn_version,
    )
    return impl


@dataclass
class Request:
    """A request's tokens as [L, n, ...] tensors in parts, and its row as the manager has it."""

    name: str
    prompt_len: int
    num_computed: int = 0
    is_one_shot: bool = False
    row: list[int] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)
    selection: Selection | None = None


class Rig:
    """One worker: pool, engine, builder, impl, and block allocation."""

    def __init__(
        self,
        monkeypatch: Any,
        shape: CacheShape,
        config: KVCompressConfig,
        dtype: torch.dtype = torch.float32,
        backend: str = "triton",
        flash_attn_version: int = 3,
    ) -> None:
        self.shape, self.config, self.dtype = shape, config, dtype
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        if DEVICE.type != "cuda":
            monkeypatch.setattr(FlashAttentionImpl, "forward", attend)
            monkeypatch.setattr(FlashAttentionImpl, "do_kv_cache_update", store)
            monkeypatch.setattr(backend_cuda, "attend_with_lse", attend_with_lse)
        size = (
            NUM_BLOCKS,
            shape.num_layers,
            shape.num_kv_heads,
            shape.block_size,
            2 * shape.head_size,
        )
        self.buffer = torch.full(size, torch.nan, dtype=dtype, device=DEVICE)
        self.views = {f"layers.{i}": self.buffer[:, i] for i in range(shape.num_layers)}
        self.free = torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(1))
        self.free = self.free.add(1).tolist()
        self.parameters = [self._layer_parameters() for _ in range(shape.num_layers)]
        self.stats = CompressionStats(log=False)
        self.names: tuple[Sequence[str], np.ndarray] = ((), np.empty(0))
        self.engine = CUDAEngine(
            config,
            shape,
            self.views,
            self.parameters,
            lambda common: self.names,
            MAX_ROWS,
            self.stats,
            MAX_TOKENS,
            backend,
        )
        self.builder = make_builder(self.engine)
        self.impl = make_impl(shape, flash_attn_version)
        # Where vLLM keeps a step's inputs, always at the same addresses.
        self.starts = torch.zeros(MAX_ROWS + 1, dtype=torch.int32, device=DEVICE)
        self.seq_lens = torch.zeros(MAX_ROWS, dtype=torch.int32, device=DEVICE)
        self.table = torch.zeros(MAX_ROWS, ROW_WIDTH, dtype=torch.int32, device=DEVICE)
        self.slots = torch.full((MAX_TOKENS,), -1, dtype=torch.int64, device=DEVICE)

    def _layer_parameters(self) -> LayerParameters:
        shape = self.shape
        weight = self.random(shape.num_kv_heads, shape.num_queries_per_kv, shape.head_size, 24)
        angles = torch.arange(600)[:, None] / 1000 ** torch.linspace(0, 1, shape.head_size // 2)
        rotary = Rotary(torch.cat([angles.cos(), angles.sin()], dim=-1).to(DEVICE))
        return LayerParameters(SCALE, 0.0, weight, ops.output_root(weight), rotary)

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator, device=DEVICE).to(self.dtype)

    def geometry(self, request: Request) -> Any:
        return self.engine.requests.geometry.of(request.prompt_len)

    def metadata(
        self, chunks: Sequence[tuple[Request, int]], num_padded_rows: int = 0, is_step: bool = True
    ) -> Any:
        """What the builder makes of a step of (request, new tokens), as vLLM would hand it over."""
        num_rows = len(chunks) + num_padded_rows
        starts = np.cumsum([0, *(count for _, count in chunks)] + [0] * num_padded_rows)
        num_tokens = int(starts[-1])
        padded = num_tokens + num_padded_rows
        self.starts[: num_rows + 1] = torch.from_numpy(starts).to(self.starts)
        self.seq_lens.zero_()
        self.table.zero_()
        self.slots.fill_(-1)
        for i, (request, count) in enumerate(chunks):
            end = request.num_computed + count
            self._grow(request, end)
            self.table[i, : len(request.row)] = torch.tensor(request.row, dtype=torch.int32)
            self.seq_lens[i] = end
            # As vLLM computes them, knowing of no regions.
            for token, position in enumerate(range(request.num_computed, end), int(starts[i])):
                block = request.row[position // self.shape.block_size]
                offset = position % self.shape.block_size
                self.slots[token] = block * self.shape.block_size + offset
        self.names = (
            [request.name for request, _ in chunks],
            np.array([request.prompt_len for request, _ in chunks]),
        )
        seq_lens = self.seq_lens[:num_rows].cpu()
        common = CommonAttentionMetadata(
            query_start_loc=self.starts[: num_rows + 1],
            query_start_loc_cpu=torch.from_numpy(starts.astype(np.int32)),
            seq_lens=self.seq_lens[:num_rows],
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=num_rows,
            num_actual_tokens=padded,
            max_query_len=max((count for _, count in chunks), default=1),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=self.table[:num_rows],
            slot_mapping=self.slots[:padded],
        )
        if not is_step:
            return self.builder.build(0, common)
        one_shot = {r.name for r, _ in chunks if r.is_one_shot and not r.num_computed}
        with self.engine.scheduled_step(one_shot):
            return self.builder.build(0, common)

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

    def step(
        self,
        chunks: Sequence[tuple[Request, int]],
        captured: Any = None,
        given: dict[str, list[torch.Tensor]] | None = None,
    ) -> None:
        """Compute the next tokens of each request in one step and check every layer's output.

        Args:
            chunks: (request, new tokens); rows of one token first, as vLLM has them.
            captured: metadata of an earlier step to run the layers with, as a graph's replay does.
            given: per request name [L, n, ...] keys, values and queries; others are random.
        """
        num_padded = 0 if captured is None else captured.step.num_single - len(chunks)
        metadata = self.metadata(chunks, num_padded)
        if captured is not None:
            assert not metadata.runs
            metadata = captured
        compacted = [r.num_computed >= self.geometry(r).compact_len for r, _ in chunks]
        for request, count in chunks:
            own = (given or {}).get(request.name) or self._tokens(count)
            for parts, new in zip(
                (request.keys, request.values, request.queries), own, strict=True
            ):
                parts.append(new)
        for index, (name, view) in enumerate(self.views.items()):
            key, value, query = (
                torch.cat([parts[index] for parts in tensors])
                for tensors in (
                    [r.keys[-1] for r, _ in chunks],
                    [r.values[-1] for r, _ in chunks],
                    [r.queries[-1] for r, _ in chunks],
                )
            )
            if num_padded:
                key, value, query = (
                    torch.cat([x, torch.full_like(x[:1], torch.nan).repeat(num_padded, 1, 1)])
                    for x in (key, value, query)
                )
            output = torch.full_like(query, torch.nan)
            layer = SimpleNamespace(layer_name=name)
            self.impl.forward(layer, query, key, value, view, metadata, output)
            start = 0
            for (request, count), is_compacted in zip(chunks, compacted, strict=True):
                self._check(request, index, output[start : start + count], is_compacted)
                start += count
        for request, count in chunks:
            request.num_computed += count
            self._check_compaction(request, count)

    def _tokens(self, count: int) -> list[torch.Tensor]:
        shape = self.shape
        sizes = (shape.num_kv_heads, shape.num_kv_heads)
        sizes += (shape.num_kv_heads * shape.num_queries_per_kv,)
        return [self.random(shape.num_layers, count, heads, shape.head_size) for heads in sizes]

    def _check(
        self, request: Request, layer: int, output: torch.Tensor, is_compacted: bool
    ) -> None:
        """One row's output against attention to all tokens, or to those kept and the tail."""
        keys, values = (
            torch.cat([part[layer] for part in parts]).double()
            for parts in (request.keys, request.values)
        )
        num_new, num_tokens = len(output), len(keys)
        is_read = torch.ones(num_new, num_tokens, dtype=torch.bool).tril(num_tokens - num_new)
        is_read = is_read.repeat(self.shape.num_kv_heads, 1, 1)
        if is_compacted and request.selection is not None:
            tail = self.geometry(request).num_candidate_tokens
            for head, kept in enumerate(self.kept_tokens(request, layer)):
                evicted = torch.ones(tail, dtype=torch.bool)
                evicted[kept] = False
                is_read[head, :, :tail][:, evicted] = False
        want = reference_attention(request.queries[-1][layer], keys, values, is_read)
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[self.dtype]
        torch.testing.assert_close(output.double(), want, atol=tolerance, rtol=tolerance)

    def kept_tokens(self, request: Request, layer: int) -> list[torch.Tensor]:
        """Positions that each head of a layer should keep in the region."""
        selection, size = request.selection, self.shape.block_size
        assert selection is not None
        unit = 1 if selection.granularity == "page" else size
        parts = selection.indices.split((selection.num_pages.flatten() * unit).tolist())
        heads = parts[layer * self.shape.num_kv_heads : (layer + 1) * self.shape.num_kv_heads]
        if unit == 1:
            return [(p[:, None] * size + torch.arange(size)).flatten() for p in heads]
        return list(heads)

    def _check_compaction(self, request: Request, count: int) -> None:
        """Region and offsets of a prompt that has just ended against the policies' choice."""
        geometry = self.geometry(request)
        before = request.num_computed - count
        if not geometry.is_compressed or not before < geometry.compact_len <= request.num_computed:
            return
        request.selection = self._expected_selection(request)
        state = self.engine.requests.get_or_create(request.name, request.prompt_len)
        offsets = self.engine._page_offsets[state.slot].cpu()
        assert torch.equal(offsets.long(), request.selection.page_offsets)
        boundary = geometry.boundary_block
        region = request.row[boundary : boundary + geometry.num_region_blocks]
        pages = self.buffer[region].flatten(0, 2)
        page = 0
        for layer in range(self.shape.num_layers):
            for head, kept in enumerate(self.kept_tokens(request, layer)):
                num_pages = len(kept) // self.shape.block_size
                found = pages[page : page + num_pages].flatten(0, 1)
                both = [
                    torch.cat([part[layer] for part in parts])[kept.to(found.device), head]
                    for parts in (request.keys, request.values)
                ]
                assert torch.equal(found, torch.cat(both, dim=-1))
                page += num_pages

    def _expected_selection(self, request: Request) -> Selection:
        geometry, shape = self.geometry(request), self.shape
        num_tokens, window = geometry.compact_len, self.config.window
        scorer, scores = make_scorer(self.config), []
        for layer, parameters in enumerate(self.parameters):
            keys, values, queries = (
                torch.cat([part[layer] for part in parts])[:num_tokens].transpose(0, 1)
                for parts in (request.keys, request.values, request.queries)
            )
            queries = queries.unflatten(0, (shape.num_kv_heads, -1))
            common = {"scale": SCALE, "logits_soft_cap": 0.0, "rotary": parameters.rotary}
            observed = None
            if "all_queries" in scorer.needs:
                chunk = ChunkInputs(query=queries, key=keys, first=0, **common)
                observed = scorer.observe(chunk, None)
            inputs = ScoreInputs(
                key=keys,
                num_candidates=geometry.num_candidate_tokens,
                budget_tokens=geometry.num_region_blocks * shape.block_size,
                layer=layer,
                earlier_scores=scores,
                window_query=queries[:, :, num_tokens - window :],
                value=values,
                output_weight=parameters.output_weight,
                output_root=parameters.output_root,
                observed=observed,
                **common,
            )
            scores.append(scorer.score(inputs))
        return select(
            scores,
            self.config,
            geometry.num_region_blocks,
            shape.block_size,
            geometry.num_tail_tokens,
        )
