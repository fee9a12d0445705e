"""Attention weights of prompts' last queries, joined over the window."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.dispatch import by_native, choose, triton_kernels
from vllm_kvcompress.ops.limits import check_scales
from vllm_kvcompress.ops.structs import Logits, Pool, Prompts
from vllm_kvcompress.ops.window import reference
from vllm_kvcompress.ops.window.checks import check_layers, check_prompt_pool, check_prompts
from vllm_kvcompress.ops.window.memory import empty_scores
from vllm_kvcompress.ops.window.plan import WINDOW_REDUCTIONS, WindowPlan

MAX_WINDOW = 128


def window_scores(
    query: torch.Tensor,
    pool: Pool,
    prompts: Prompts,
    layer: int,
    logits: Logits,
    plan: WindowPlan,
    *,
    lse: torch.Tensor | None = None,
    part_sums: torch.Tensor | None = None,
    backend: str = "triton",
) -> torch.Tensor:
    """Attention weights of each prompt's last queries, joined over the window.

    `exp(q . k * scale - lse)`, causal inside the window, float32.

    Args:
        query: [R, n, w, Hq, d] or [R, w, Hq, d] queries of the last w tokens, w at most the prompt
            and, but for 'native', at most 128. Any strides but the last.
        pool: an order of elements is for 'native'.
        prompts: R of them.
        layer: index of the first of the n layers among those that share the pool.
        logits: numbers alone for 'native'; sinks float32.
        plan: how the window's queries are joined.
        lse: float32, like query without d, natural logarithm of each query's sum over the keys it
            sees, as prefill attention leaves it (the sink included); None = computed, which reads
            the keys twice.
        part_sums: [R, n * H, `num_score_parts`] float32, written: sums of a stream's scores by
            parts of its rated tokens, for `join_scores`; 'defensive' only, not for 'native'.
        backend: 'triton', 'native' (compiled, CPU) or 'reference'.

    Returns:
        [R, n * H, G, max_rated] float32, entries past num_rated undefined. G = g; for 'defensive'
        any number of which the maximum is meant (1 for 'triton'). What a layer gets does not depend
        on which others are scored with it. No host sync, graph-safe, deterministic.

    Raises:
        ValueError: on shapes, types or options that do not fit.
        RuntimeError: if the backend cannot run here.
    """
    check(
        query.dim() in (4, 5) and query.shape[0] > 0 and query.shape[-4] > 0,
        f"want window queries [R, n, w, heads, d], got {tuple(query.shape)}",
    )
    check(
        lse is None or (lse.shape == query.shape[:-1] and lse.dtype == torch.float32),
        f"want lse {tuple(query.shape[:-1])} float32, got {None if lse is None else lse.shape}",
    )
    if query.dim() == 4:
        query, lse = query[:, None], None if lse is None else lse[:, None]
    num_requests, num_scored, window, num_heads, _ = query.shape
    order = pool.order
    check_prompt_pool(pool, query[0, 0], None if order is None else order.key_offsets, backend)
    check_prompts(prompts, num_requests)
    check(
        window >= 1 and (window <= MAX_WINDOW or backend == "native"),
        f"a window has 1 to {MAX_WINDOW} queries, not {window}",
    )
    check_layers(layer, num_scored, pool.num_layers, backend)
    plan.check_window()
    check(
        lse is None or lse.stride()[-2:] == (num_heads, 1),
        "want lse with whole rows [w, heads]",
    )
    _check_logits(logits, num_scored, num_heads, backend)
    size = (num_requests, num_scored * pool.num_kv_heads)
    is_told = backend != "native" and plan.reduce == "defensive"
    check(
        part_sums is None or (is_told and _is_part_sums(part_sums, size)),
        f"want part_sums [{size[0]}, {size[1]}, parts] float32 of 'defensive'",
    )
    check_scales(pool.key_scale, pool.num_streams)
    score = choose(_SCORE, backend)
    return score(query, pool, prompts, layer, logits, plan, lse, part_sums)


def num_score_parts(max_rated: int, mean_kernel: int) -> int:
    """Parts that `window_scores` sums a stream's scores by, where kernels of a GPU do it."""
    return triton_kernels().num_score_parts(max_rated, mean_kernel)


def _is_part_sums(part_sums: torch.Tensor, size: tuple[int, int]) -> bool:
    """Whether these are sums of so many requests' streams."""
    return (
        part_sums.dim() == 3
        and part_sums.shape[:2] == size
        and part_sums.dtype == torch.float32
        and part_sums.is_contiguous()
    )


def _check_logits(logits: Logits, num_scored: int, num_heads: int, backend: str) -> None:
    sinks = logits.sinks
    check(
        sinks is None
        or (
            sinks.shape in ((num_scored, num_heads), (num_heads,))
            and (sinks.dim() == 2 or num_scored == 1)
            and sinks.dtype == torch.float32
            and sinks.is_contiguous()
        ),
        f"want sinks [{num_scored}, {num_heads}] float32",
    )
    for name, numbers in (("scale", logits.scale), ("soft_cap", logits.soft_cap)):
        check(
            not isinstance(numbers, torch.Tensor)
            or (
                backend != "native"
                and numbers.shape == (num_scored,)
                and numbers.dtype == torch.float32
                and numbers.is_contiguous()
            ),
            f"want {name} as a number or, but for 'native', [{num_scored}] float32",
        )


def _by_native(
    query: torch.Tensor,
    pool: Pool,
    prompts: Prompts,
    layer: int,
    logits: Logits,
    plan: WindowPlan,
    lse: torch.Tensor | None,
    part_sums: torch.Tensor | None,
) -> torch.Tensor:
    num_requests, _, _, num_heads, _ = query.shape
    size = (num_requests, pool.num_kv_heads, num_heads // pool.num_kv_heads, prompts.max_rated)
    scores = query.new_empty(size, dtype=torch.float32)
    by_native("window_scores", only="cpu")(
        query[:, 0],
        pool.pages,
        prompts.rows.descriptors,
        prompts.rows.block_table,
        prompts.num_rated,
        None if pool.order is None else pool.order.key_offsets,
        pool.key_scale,
        None if lse is None else lse[:, 0].contiguous(),
        None if logits.sinks is None else logits.sinks.view(-1),
        scores,
        layer=layer,
        num_layers=pool.num_layers,
        num_kv_heads=pool.num_kv_heads,
        scale=logits.scale,
        logits_soft_cap=logits.soft_cap,
        reduce=WINDOW_REDUCTIONS.index(plan.reduce),
        power=plan.power,
        near_tokens=plan.near_tokens,
        pool_kernel=plan.mean_kernel,
    )
    return scores


def _by_triton(
    query: torch.Tensor,
    pool: Pool,
    prompts: Prompts,
    layer: int,
    logits: Logits,
    plan: WindowPlan,
    lse: torch.Tensor | None,
    part_sums: torch.Tensor | None,
) -> torch.Tensor:
    num_requests, num_scored, _, num_heads, _ = query.shape
    rows, max_rated = prompts.rows, prompts.max_rated
    tensors = (query, pool.pages, rows.descriptors, rows.block_table, prompts.num_rated)
    kernels = triton_kernels(*tensors)
    num_parts = kernels.num_score_parts(max_rated, plan.mean_kernel)
    check(
        part_sums is None or part_sums.shape[2] == num_parts,
        f"part_sums of {max_rated} scores have {num_parts} parts",
    )
    group = kernels.num_score_groups(num_heads // pool.num_kv_heads, plan.reduce)
    size = (num_requests, num_scored * pool.num_kv_heads, group, max_rated)
    scores = empty_scores(*size, device=query.device, backend="triton")
    sinks = logits.sinks
    kernels.window_scores(
        *tensors,
        pool.key_scale,
        scores,
        layer=layer,
        num_layers=pool.num_layers,
        num_kv_heads=pool.num_kv_heads,
        scale=layer_numbers(logits.scale, num_scored, query.device),
        logits_soft_cap=soft_caps(logits, num_scored, query.device),
        reduce=plan.reduce,
        power=plan.power,
        near_tokens=plan.near_tokens,
        pool_kernel=plan.mean_kernel,
        lse=lse,
        sinks=None if sinks is None else sinks.view(num_scored, num_heads),
        part_sums=part_sums,
    )
    return scores


_SCORE = {"triton": _by_triton, "native": _by_native, "reference": reference.window_scores}


def layer_numbers(
    numbers: float | torch.Tensor, num_scored: int, device: torch.device
) -> torch.Tensor:
    """[num_scored] float32 on the device."""
    if isinstance(numbers, torch.Tensor):
        return numbers
    return torch.full((num_scored,), numbers, dtype=torch.float32, device=device)


def soft_caps(logits: Logits, num_scored: int, device: torch.device) -> torch.Tensor | None:
    """[num_scored] float32 on the device; None where no layer has one."""
    if isinstance(logits.soft_cap, torch.Tensor) or logits.soft_cap > 0:
        return layer_numbers(logits.soft_cap, num_scored, device)
    return None
