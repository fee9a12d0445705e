"""Scores of prompts: queries are collected, layers scored by fused ops or by the scorer itself.

L is the number of layers, H of KV heads on this rank, g of query heads per KV head, R of prompts,
S = L * H of streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.parameters import LayerParameters, StackedParameters
from vllm_kvcompress.compaction.prompts import LayerPages, PromptCompaction
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import CacheShape, RequestGeometry, cdiv
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.base import ChunkInputs, LayerScores, ScoreInputs
from vllm_kvcompress.policies.entries import entry_scores


@dataclass(frozen=True)
class Backends:
    """Which implementation of the ops computes what.

    Attributes:
        score: of scores: 'triton' and 'reference' score several layers at once, 'native' (compiled,
            for a CPU) one; 'torch' leaves scores to the scorer.
        select: of selection and what it copies: 'triton', 'native', 'torch' or 'reference'.
        move: of what moves between the buffer of one-shot prompts and the pool: 'triton', 'torch',
            'reference' or, on a CPU, 'native'.
    """

    score: str
    select: str
    move: str

    @classmethod
    def all(cls, name: str) -> Backends:
        """One for everything."""
        return cls(name, name, name)


class Scoring:
    """Collects queries of prompts and scores them.

    Args:
        config: validated setting.
        shape: of the paged cache.
        pool: [num_pages, b, 2 d], of all layers.
        order: element order of its pages.
        layers: one per layer; what the method's scorer needs must be there, on the pool's device.
        backend: see `Backends.score`.

    Raises:
        ValueError: if what the scorer needs is not there.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        shape: CacheShape,
        pool: torch.Tensor,
        order: PageOrder,
        layers: Sequence[LayerParameters],
        backend: str,
    ) -> None:
        self.config = config
        self.shape = shape
        self.order = order
        self.backend = backend
        self.scorer = make_scorer(config)
        plan = None if backend == "torch" else self.scorer.window_plan()
        self.plan = plan if plan is not None and plan.fits_ops else None
        self._pool = pool
        self.use_parameters(layers)

    @property
    def is_fused(self) -> bool:
        """Whether ops make this method's scores from pages; else the scorer does."""
        return self.plan is not None

    @property
    def takes_several_layers(self) -> bool:
        """Whether the ops score more than one layer at once."""
        return self.is_fused and self.backend != "native"

    def use_parameters(self, layers: Sequence[LayerParameters]) -> None:
        """Score with these from now on.

        Raises:
            ValueError: if what the scorer needs is not there.
        """
        for need in ("output_weight", "output_root", "rotary"):
            if need in self.scorer.needs and any(getattr(x, need) is None for x in layers):
                raise ValueError(f"method {self.config.method!r} needs every layer's {need}")
        if self.takes_several_layers:
            self._stacked = StackedParameters.of(layers, self._pool)
            if self._stacked.output_root is not None:
                # The layers' own, in float32, are not needed any more.
                roots = self._stacked.output_root
                layers = [replace(x, output_root=roots[i]) for i, x in enumerate(layers)]
        elif self.is_fused:
            layers = [
                x if x.output_root is None else replace(x, output_root=x.output_root.contiguous())
                for x in layers
            ]
        self.layers = layers

    def num_rated(self, geometry: RequestGeometry) -> int:
        """Tokens that fused ops rate, of a prompt; 0 if none do."""
        if self.plan is None:
            return 0
        return self.plan.num_rated(
            geometry.compact_len, geometry.num_candidate_tokens, self.config.window
        )

    def collect(
        self,
        prompt: PromptCompaction,
        layer: int,
        query: torch.Tensor,
        first: int,
        pages: LayerPages,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Take in the queries of one chunk, whose keys are in their pages.

        Args:
            prompt: the prompt they belong to; written to.
            layer: 0-based index among the compressed layers.
            query: [m, H * g, d], consecutive tokens, not kept by reference.
            first: position of the first of them in the prompt.
            pages: the prompt's, at least to the chunk's last token.
            lse: [m, H * g] float32 of these queries, all of the window; of all of a prompt's chunks
                or of none.
        """
        num_tokens = query.shape[0]
        window_start = prompt.geometry.compact_len - self.config.window
        if "window_query" in self.scorer.needs:
            skipped = max(0, window_start - first)
            if skipped < num_tokens:
                in_window = self._grouped(query[skipped:])
                self._save_window_queries(prompt, layer, in_window, first + skipped - window_start)
        if "all_queries" in self.scorer.needs:
            self._observe(prompt, layer, self._grouped(query), first, pages)
        if lse is not None:
            if prompt.window_lse is None:
                size = (self.shape.num_layers, self.config.window, lse.shape[1])
                prompt.window_lse = lse.new_empty(size)
            start = first - window_start
            prompt.window_lse[layer, start : start + len(lse)] = lse

    def _grouped(self, query: torch.Tensor) -> torch.Tensor:
        """[m, H * g, d] queries as [H, g, m, d]."""
        shape = self.shape
        size = (len(query), shape.num_kv_heads, shape.num_queries_per_kv, shape.head_size)
        return query.view(size).permute(1, 2, 0, 3)

    def _save_window_queries(
        self, prompt: PromptCompaction, layer: int, query: torch.Tensor, first: int
    ) -> None:
        """Keep [H, g, m, d] queries from index `first` of the window on."""
        if prompt.window_query is None:
            num_heads, group, _, head_size = query.shape
            size = (self.shape.num_layers, num_heads, group, self.config.window, head_size)
            prompt.window_query = query.new_empty(size)
        if first == 0:
            prompt.num_window_queries[layer] = 0
        assert prompt.num_window_queries[layer] == first, (
            f"window queries of layer {layer} arrive at {first}, "
            f"expected {prompt.num_window_queries[layer]}"
        )
        end = first + query.shape[2]
        prompt.window_query[layer, :, :, first:end] = query
        prompt.num_window_queries[layer] = end

    def _observe(
        self,
        prompt: PromptCompaction,
        layer: int,
        query: torch.Tensor,
        first: int,
        pages: LayerPages,
    ) -> None:
        """Show [H, g, m, d] queries from position `first` on to the scorer."""
        if first == 0:
            prompt.observed[layer], prompt.num_observed[layer] = None, 0
        assert prompt.num_observed[layer] == first, (
            f"queries of layer {layer} arrive at {first}, expected {prompt.num_observed[layer]}"
        )
        end = first + query.shape[2]
        pages = replace(pages, blocks=pages.blocks[: cdiv(end, self.shape.block_size)])
        parameters = self.layers[layer]
        chunk = ChunkInputs(
            query=query,
            key=self._read(pages, "key")[:, :end],
            first=first,
            scale=parameters.scale,
            logits_soft_cap=parameters.logits_soft_cap,
            sinks=parameters.sinks,
            rotary=parameters.rotary,
        )
        prompt.observed[layer] = self.scorer.observe(chunk, prompt.observed[layer])
        prompt.num_observed[layer] = end

    def _read(self, pages: LayerPages, part: str) -> torch.Tensor:
        """[H, len(blocks) * block_size, d] of one layer; part 'key' or 'value'."""
        heads = torch.arange(self.shape.num_kv_heads, device=pages.blocks.device)[:, None]
        ids = pages.page_ids(pages.blocks, heads)
        return ops.unpack_pages(pages.pool, ids, self.order, part)

    def by_scorer(self, prompt: PromptCompaction, layer: int, pages: LayerPages) -> LayerScores:
        """Scores of a layer's entries by the scorer itself; layers in order.

        Args:
            prompt: all of whose keys are in their pages; written to.
            layer: 0-based index among the compressed layers.
            pages: the prompt's, ceil(compact_len / block_size) blocks.
        """
        assert layer == len(prompt.layer_scores), (
            f"layer {layer} is scored after {len(prompt.layer_scores)} others"
        )
        geometry, needs, parameters = prompt.geometry, self.scorer.needs, self.layers[layer]
        num_tokens = geometry.compact_len
        window_query = value = None
        if "window_query" in needs:
            assert prompt.window_query is not None
            assert prompt.num_window_queries[layer] == self.config.window
            window_query = prompt.window_query[layer]
        if "all_queries" in needs:
            assert prompt.num_observed[layer] == num_tokens
        if "value" in needs:
            value = self._read(pages, "value")[:, :num_tokens]
        scores = self.scorer.score(
            ScoreInputs(
                key=self._read(pages, "key")[:, :num_tokens],
                num_candidates=geometry.num_candidate_tokens,
                budget_tokens=geometry.num_region_blocks * geometry.block_size,
                scale=parameters.scale,
                logits_soft_cap=parameters.logits_soft_cap,
                sinks=parameters.sinks,
                layer=layer,
                earlier_scores=prompt.layer_scores,
                window_query=window_query,
                value=value,
                output_weight=parameters.output_weight,
                output_root=parameters.output_root,
                observed=prompt.observed[layer],
                rotary=parameters.rotary,
            )
        )
        prompt.observed[layer] = None
        prompt.layer_scores.append(scores)
        return entry_scores(scores, self.config, self.shape.block_size)

    def by_ops(
        self,
        pool: ops.Pool,
        prompts: ops.Prompts,
        query: torch.Tensor,
        lse: torch.Tensor | None,
        first: int,
        out: torch.Tensor,
    ) -> None:
        """Scores of some layers' entries by fused ops, straight from pages.

        Args:
            pool: of all layers, or of the first of these alone.
            prompts: in it.
            query: [R, n, w, H * g, d] queries of their windows in n layers one after another.
            lse: [R, n, w, H * g] float32 of these queries, if attention has told it.
            first: 0-based index of the first layer.
            out: [R, n * H, entries] float32, written up to each prompt's own entries.
        """
        assert self.plan is not None
        layer = first if pool.num_layers == self.shape.num_layers else 0
        by_page = self.config.granularity == "page"
        if self.takes_several_layers:
            ops.planned_scores(
                self.plan,
                query,
                pool,
                prompts,
                layer,
                lse=lse,
                **self._stacked.options(first, query.shape[1]),
                page_reduce=self.config.option("page_reduce") if by_page else None,
                out=out,
                backend=self.backend,
            )
            return
        parameters = self.layers[first]
        sinks = None if parameters.sinks is None else parameters.sinks.flatten()
        scores = ops.planned_scores(
            self.plan,
            query[:, 0],
            pool,
            prompts,
            layer,
            ops.Logits(parameters.scale, parameters.logits_soft_cap, sinks),
            output_root=parameters.output_root,
            page_reduce=None,
            backend=self.backend,
        )
        # Entries past a prompt's own mean nothing.
        out.copy_(entry_scores(LayerScores(scores), self.config, self.shape.block_size).first)
