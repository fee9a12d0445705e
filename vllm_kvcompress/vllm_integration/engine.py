"""What a worker keeps between steps: the pool, the requests, and the compactor."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvcompress.candidates import LayerPages
from vllm_kvcompress.compaction import CacheShape, Compactor, LayerParameters
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import Geometry
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.vllm_integration.batch import (
    PrefillRow,
    RequestStates,
    StepRows,
    classify_rows,
)
from vllm_kvcompress.vllm_integration.metrics import CompressionStats


class WorkerEngine:
    """One worker's side of the compression, bound to its KV cache.

    Args:
        config: validated setting.
        shape: of the cache on this rank.
        layer_views: layer name to its [block, H, block_size, 2 * d] view of the one pool, in
            layer order.
        order: element order of a page.
        layers: what scoring must know of each layer, in layer order.
        input_batch: the model runner's batch (V1), read at every step.
        stats: where finished prompts are recorded.
        backend: of the ops, 'torch' or 'native'.
        why_torch: what to tell people about a backend 'torch' that is none of their choice.

    Raises:
        RuntimeError: if the views are not slices of one [block, layer, head, ...] buffer.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        shape: CacheShape,
        layer_views: dict[str, torch.Tensor],
        order: PageOrder,
        layers: list[LayerParameters],
        input_batch: Any,
        stats: CompressionStats,
        backend: str = "torch",
        why_torch: str | None = None,
    ) -> None:
        self.shape = shape
        self._backend = backend
        self._why_torch = why_torch
        self.layer_index = {name: i for i, name in enumerate(layer_views)}
        self.pool = flat_pool(list(layer_views.values()), shape)
        pages = self.pool.view(-1, 1, 2 * shape.block_size, shape.head_size)
        self.kernel_pages = pages.chunk(2, dim=2)
        self.stats = stats
        self._order = order
        self._input_batch = input_batch
        self._scratch = self.pool.new_empty(0)
        self.configure(config, layers)

    def add_readers(self, readers: dict[str, str]) -> None:
        """Tell of layers without a cache of their own.

        Args:
            readers: name of each, and of the layer whose cache it reads.
        """
        self.layer_index |= {name: self.layer_index[owner] for name, owner in readers.items()}

    def configure(self, config: KVCompressConfig, layers: list[LayerParameters]) -> None:
        """Use a setting from now on; no request of an earlier one may go on."""
        # First what may refuse the setting.
        self.compactor = Compactor(config, self.shape, self._order, layers, self._backend)
        self.has_sinks = any(layer.sinks is not None for layer in layers)
        self.config = config
        self.states = RequestStates(Geometry(config, self.shape.block_size), self.shape.num_layers)

    def use_parameters(self, layers: list[LayerParameters]) -> None:
        """Score with other weights from now on; requests go on."""
        self.compactor.use_parameters(layers)

    @property
    def ops_name(self) -> str:
        """What computes, for the start-up message."""
        name = self.compactor.ops_name
        return name if self._why_torch is None else f"{name} ({self._why_torch})"

    def classify(self, common: Any) -> StepRows:
        """Tell the rows of a step apart; `common` is vLLM's CommonAttentionMetadata."""
        num_reqs = common.num_reqs
        rows = classify_rows(
            self.states,
            self.config.window,
            self._input_batch.req_ids[:num_reqs],
            self._input_batch.num_prompt_tokens[:num_reqs],
            common.query_start_loc_cpu.numpy(),
            common.seq_lens.numpy(),
            common.block_table_tensor,
            common.slot_mapping,
            collect_all="all_queries" in self.compactor.scorer.needs,
        )
        for request_id, geometry in rows.finished_prompts:
            if not geometry.is_compressed:
                self.stats.record_dense(request_id, geometry.prompt_len)
        return rows

    def scratch(self, num_blocks: int) -> torch.Tensor:
        """[num_blocks, H, block_size, 2 * d] of one layer, for prompts that have no blocks.

        Every layer with a cache of its own writes it anew in each step. It grows to the largest
        step so far.
        """
        shape = self.shape
        size = (num_blocks, shape.num_kv_heads, shape.block_size, 2 * shape.head_size)
        if self._scratch.shape[0] < num_blocks:
            self._scratch = self.pool.new_zeros(size)
        return self._scratch[:num_blocks]

    def collect(self, row: PrefillRow, layer: int, query: torch.Tensor) -> None:
        """Take one layer's queries; at a prompt's last layer, compact it.

        Args:
            row: a prefill row of this step.
            layer: 0-based index among the compressed layers.
            query: [m, H * g, d] of the row's tokens to collect.
        """
        prompt = row.state.prompt
        if row.is_one_shot:
            scratch = self._scratch.view(-1, self.pool.shape[1])
            pages = LayerPages(scratch, row.prompt_blocks, self.shape.num_kv_heads, 0)
        else:
            pages = self.shape.layer_pages(self.pool, layer, row.prompt_blocks)
        self.compactor.collect(prompt, layer, query, row.first, pages)
        if not row.finishes:
            return
        self.compactor.score_layer(prompt, layer, pages)
        if row.is_one_shot:
            self.compactor.hold(prompt, pages)
        if prompt.is_scored:
            row.state.selection = self.compactor.compact(
                prompt, self.pool, row.prompt_blocks, row.region_blocks
            )
            self.stats.record_compressed(
                [row.request_id],
                [prompt.geometry],
                row.state.selection.num_pages[None],
                is_one_shot=row.is_one_shot,
            )

    def keep_whole(self, request_ids: Any) -> None:
        """Say which requests of the next step are never compressed."""
        self.states.whole_ids = request_ids

    def forget(self, request_ids: Any) -> None:
        """Drop requests that have finished or were preempted."""
        for request_id in request_ids:
            self.states.forget(request_id)


def flat_pool(layer_views: list[torch.Tensor], shape: CacheShape) -> torch.Tensor:
    """The pool behind the layers' views as [num_pages, page_elements].

    Page `(block * L + layer) * H + head` is contiguous.

    Raises:
        RuntimeError: if the views are laid out otherwise.
    """
    first = layer_views[0]
    page = 2 * shape.block_size * shape.head_size
    num_blocks = first.shape[0]
    want_shape = (num_blocks, shape.num_kv_heads, shape.block_size, 2 * shape.head_size)
    want_strides = (shape.pages_per_block * page, page, 2 * shape.head_size, 1)
    base = first.storage_offset()
    for layer, view in enumerate(layer_views):
        offset = base + layer * shape.num_kv_heads * page
        if (
            tuple(view.shape) != want_shape
            or view.stride() != want_strides
            or view.storage_offset() != offset
            or view.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            raise RuntimeError(
                f"KV cache of layer {layer} is not a slice of one [block, layer, head] pool: "
                f"shape {tuple(view.shape)}, strides {view.stride()}, offset "
                f"{view.storage_offset()}; expected {want_shape}, {want_strides}, {offset}"
            )
    num_pages = num_blocks * shape.pages_per_block
    if num_pages >= 2**31:
        raise RuntimeError(f"{num_pages} pages do not fit 32-bit page ids; use larger blocks")
    return first.as_strided((num_pages, page), (page, 1), base)
