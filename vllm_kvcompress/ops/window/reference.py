"""Plain references of the scores on the paged pool: loops in float64 over tokens."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvcompress.ops.rows_reference import descriptors, prompt_entries
from vllm_kvcompress.ops.scoring.reference import page_scores, pool_scores
from vllm_kvcompress.ops.structs import Logits, Pool, Prompts
from vllm_kvcompress.ops.window.plan import WindowPlan


def window_scores(
    query: torch.Tensor,
    pool: Pool,
    prompts: Prompts,
    layer: int,
    logits: Logits,
    plan: WindowPlan,
    lse: torch.Tensor | None = None,
    part_sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ops.window_scores`; a given lse is not believed but computed."""
    num_requests, num_scored, window, num_heads, head_size = query.shape
    num_kv_heads = pool.num_kv_heads
    group = num_heads // num_kv_heads
    num_groups = 1 if plan.reduce == "defensive" else group
    size = (num_requests, num_scored * num_kv_heads, num_groups, prompts.max_rated)
    scores = torch.full(size, float("nan"), dtype=torch.float64, device=query.device)
    if part_sums is not None:
        part_sums.zero_()
    rows, tables = descriptors(prompts.rows.descriptors), prompts.rows.block_table.tolist()
    for r, (row, table) in enumerate(zip(rows, tables, strict=True)):
        rated = int(prompts.num_rated[r])
        for scored_stream in range(num_scored * num_kv_heads):
            index, head = divmod(scored_stream, num_kv_heads)
            stream = layer * num_kv_heads + scored_stream
            keys = prompt_entries(pool.pages, row, table, stream, pool.num_streams)[:, :head_size]
            if pool.key_scale is not None:
                keys = keys * pool.key_scale[stream].double()
            worst = torch.zeros(rated, dtype=torch.float64, device=query.device)
            for g in range(group):
                query_head = head * group + g
                weights = _weights(query[r, index, :, query_head], keys, logits, index, query_head)
                age = _ages(window, len(keys), query.device)
                weights = weights.masked_fill(age < plan.near_tokens, 0.0)[:, :rated] ** plan.power
                if plan.reduce == "defensive":
                    worst = worst.maximum(_defensive(weights, plan.mean_kernel))
                elif plan.reduce == "max":
                    scores[r, scored_stream, g, :rated] = weights.amax(dim=0)
                else:
                    joined = weights.mean(dim=0) if plan.reduce == "mean" else weights.sum(dim=0)
                    scores[r, scored_stream, g, :rated] = joined
            if plan.reduce == "defensive":
                scores[r, scored_stream, 0, :rated] = worst
                if part_sums is not None:
                    part_sums[r, scored_stream, 0] = worst.sum()
    return scores.float()


def _ages(window: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """[w, n] how far each key is before each query."""
    positions = torch.arange(num_keys - window, num_keys, device=device)
    return positions[:, None] - torch.arange(num_keys, device=device)


def _weights(
    query: torch.Tensor, keys: torch.Tensor, logits: Logits, layer: int, head: int
) -> torch.Tensor:
    """[w, n] attention weights of one head's window."""
    products = query.double() @ keys.T * _of_layer(logits.scale, layer)
    cap = _of_layer(logits.soft_cap, layer)
    if cap > 0:
        products = cap * torch.tanh(products / cap)
    seen = products.masked_fill(_ages(len(query), len(keys), keys.device) < 0, float("-inf"))
    sink = seen.new_full((len(query), 1), float("-inf"))
    if logits.sinks is not None:
        sink.fill_(logits.sinks.view(-1, logits.sinks.shape[-1])[layer, head])
    return torch.cat([seen, sink], dim=1).softmax(dim=-1)[:, :-1]


def _of_layer(numbers: float | torch.Tensor, layer: int) -> Any:
    """A number as the kernels have it, in float32."""
    if isinstance(numbers, torch.Tensor):
        return numbers[layer].double()
    return torch.tensor(numbers, dtype=torch.float32).double().item()


def _defensive(weights: torch.Tensor, pool_kernel: int) -> torch.Tensor:
    """Largest of [w, n] weights, each row mean-pooled and brought back to its old sum."""
    half = pool_kernel // 2
    pooled = torch.zeros_like(weights)
    for shift in range(-half, half + 1):
        source = weights[:, max(0, -shift) : weights.shape[1] - max(0, shift)]
        pooled[:, max(0, shift) : weights.shape[1] - max(0, -shift)] += source / pool_kernel
    old_sum = weights.sum(dim=1, keepdim=True)
    new_sum = pooled.sum(dim=1, keepdim=True)
    return torch.where(new_sum > 0, pooled / new_sum * old_sum, 0.0).amax(dim=0)


def value_effect(
    output_root: torch.Tensor, pool: Pool, prompts: Prompts, layer: int, effect: torch.Tensor
) -> None:
    """See `ops.paged_value_effect`."""
    num_scored, num_kv_heads, head_size, _ = output_root.shape
    roots = output_root.flatten(0, 1).double()
    rows, tables = descriptors(prompts.rows.descriptors), prompts.rows.block_table.tolist()
    for r, (row, table) in enumerate(zip(rows, tables, strict=True)):
        for scored_stream in range(num_scored * num_kv_heads):
            stream = layer * num_kv_heads + scored_stream
            entries = prompt_entries(pool.pages, row, table, stream, pool.num_streams)
            values = entries[: int(prompts.num_rated[r]), head_size:]
            if pool.value_scale is not None:
                values = values * pool.value_scale[stream].double()
            moved = values @ roots[scored_stream]
            effect[r, scored_stream, : len(moved)] = moved.norm(dim=1).float()


def join_scores(
    scores: torch.Tensor,
    num_rated: torch.Tensor,
    num_candidates: torch.Tensor,
    effect: torch.Tensor | None,
    out: torch.Tensor,
    *,
    plan: WindowPlan,
    page_reduce: str,
    page_size: int,
    num_kv_heads: int,
    part_sums: torch.Tensor | None,
) -> None:
    """See `ops.join_scores`."""
    joins: dict[str, Any] = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}
    join, kernel, kind = joins[plan.group_reduce], plan.pool_kernel, plan.pool_kind
    for r, (rated, candidates) in enumerate(
        zip(num_rated.tolist(), num_candidates.tolist(), strict=True)
    ):
        joined = scores[r, :, :, :rated].double()
        if plan.pool_first:
            joined = join(pool_scores(joined, kernel, kind).double(), dim=1)
        else:
            joined = pool_scores(join(joined, dim=1), kernel, kind).double()
        if plan.floor_at_mean:
            joined = joined.maximum(joined.mean(dim=1, keepdim=True))
        if effect is not None:
            own = effect[r, :, :rated].double().unflatten(0, (-1, num_kv_heads))
            total = own.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            joined = joined * (own / total).flatten(0, 1)
        joined = pool_scores(joined, plan.span_kernel, "max")[:, :candidates]
        if page_reduce != "token":
            joined = page_scores(joined, page_size, page_reduce)
        out[r, :, : joined.shape[1]] = joined
