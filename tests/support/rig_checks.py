"""What a rig's requests must have come to: attention in float64 and the policies' choice.

All of it is computed on the host, from copies of what the rig has on its device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from plain_selection import Selection, select

from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import CacheShape, RequestGeometry
from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.base import ChunkInputs, LayerScores, ScoreInputs

# Of every layer's logits.
SCALE = 0.2


@dataclass
class Request:
    """A request's tokens, and its row as the manager has it.

    Attributes:
        name: its id.
        prompt_len: tokens.
        num_computed: tokens that the rig's steps have computed.
        is_one_shot: whether it begins with no blocks for what it evicts.
        row: block ids.
        keys, values, queries: per step [L, n, heads, d] on the host.
        selection: what is kept of it, once that is known.
    """

    name: str
    prompt_len: int
    num_computed: int = 0
    is_one_shot: bool = False
    row: list[int] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)
    selection: Selection | None = None

    def entries(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, H, d] keys and values of one layer so far."""
        keys, values = (
            torch.cat([part[layer] for part in parts]) for parts in (self.keys, self.values)
        )
        return keys, values


def reference_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    is_read: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[m, Hq, d] float64 attention of queries to [n, H, d] keys, where is_read [H, m, n].

    Args:
        query: [m, Hq, d].
        keys, values: [n, H, d].
        is_read: which tokens each KV head reads.
        sinks: [Hq] logits that take part in the softmax and have no value; None = none.
    """
    num_new, num_tokens = is_read.shape[1:]
    heads = query.double().unflatten(1, (keys.shape[1], -1))
    logits = torch.einsum("mhgd,nhd->hgmn", heads, keys.double()) * SCALE
    logits = logits.masked_fill(~is_read[:, None], -torch.inf)
    if sinks is not None:
        column = sinks.double().view(keys.shape[1], -1, 1, 1).expand(-1, -1, num_new, 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(dim=-1)[..., :num_tokens]
    return torch.einsum("hgmn,nhd->mhgd", weights, values.double()).flatten(1, 2)


def kept_tokens(selection: Selection, shape: CacheShape, layer: int) -> list[torch.Tensor]:
    """Positions that each head of a layer keeps in the region."""
    size = shape.block_size
    unit = 1 if selection.granularity == "page" else size
    parts = selection.indices.split((selection.num_pages.flatten() * unit).tolist())
    heads = parts[layer * shape.num_kv_heads : (layer + 1) * shape.num_kv_heads]
    if unit == 1:
        slots = torch.arange(size, device=selection.indices.device)
        return [(pages[:, None] * size + slots).flatten() for pages in heads]
    return list(heads)


def expected_output(
    request: Request,
    shape: CacheShape,
    geometry: RequestGeometry,
    layer: int,
    is_compacted: bool,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[m, Hq, d] float64 attention of the newest tokens to all others, or to kept ones and tail."""
    keys, values = request.entries(layer)
    query = request.queries[-1][layer]
    num_new, num_tokens = len(query), len(keys)
    is_read = torch.ones(num_new, num_tokens, dtype=torch.bool).tril(num_tokens - num_new)
    is_read = is_read.repeat(shape.num_kv_heads, 1, 1)
    if is_compacted and geometry.is_compressed:
        assert request.selection is not None
        tail = geometry.num_candidate_tokens
        for head, kept in enumerate(kept_tokens(request.selection, shape, layer)):
            is_evicted = torch.ones(tail, dtype=torch.bool)
            is_evicted[kept] = False
            is_read[head, :, :tail] &= ~is_evicted
    return reference_attention(query, keys, values, is_read, sinks)


def check_region(
    request: Request,
    shape: CacheShape,
    page_offsets: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """A region that has just been filled against `request.selection`.

    Args:
        request: with its selection.
        shape: of the cache.
        page_offsets: [S + 1] int64 of its streams.
        keys, values: [n, b, d] of the region's pages, tokens in order.
    """
    assert request.selection is not None
    assert torch.equal(page_offsets, request.selection.page_offsets)
    page = 0
    for layer in range(shape.num_layers):
        entries = request.entries(layer)
        for head, kept in enumerate(kept_tokens(request.selection, shape, layer)):
            end = page + len(kept) // shape.block_size
            for found, expected in zip((keys, values), entries, strict=True):
                assert torch.equal(found[page:end].flatten(0, 1), expected[kept, head])
            page = end
    assert page == len(keys)


def _on_host(parameters: LayerParameters) -> LayerParameters:
    moved = {
        name: value.cpu() for name, value in vars(parameters).items() if torch.is_tensor(value)
    }
    if parameters.rotary is not None:
        rotary = parameters.rotary
        moved["rotary"] = replace(rotary, cos_sin=rotary.cos_sin.cpu())
    return replace(parameters, **moved)


def expected_selection(
    request: Request,
    config: KVCompressConfig,
    shape: CacheShape,
    geometry: RequestGeometry,
    layers: Sequence[LayerParameters],
) -> Selection:
    """What the policy keeps of a prompt's plain tensors, without pool or kernels."""
    num_tokens, window = geometry.compact_len, config.window
    scorer, scores = make_scorer(config), list[LayerScores]()
    for layer, parameters in enumerate(map(_on_host, layers)):
        keys, values, queries = (
            torch.cat([part[layer] for part in parts])[:num_tokens].transpose(0, 1)
            for parts in (request.keys, request.values, request.queries)
        )
        queries = queries.unflatten(0, (shape.num_kv_heads, -1))
        common = {"scale": SCALE, "sinks": parameters.sinks, "rotary": parameters.rotary}
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
        scores, config, geometry.num_region_blocks, shape.block_size, geometry.num_tail_tokens
    )
