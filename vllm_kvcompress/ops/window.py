"""Window scores on the paged pool, for many prompts of different lengths at once.

The steps of `scoring.py` in the order in which the kernels fuse them: attention of the window to
all keys, reduced over the window (`window_scores`); what values do (`paged_value_effect`); pooling,
the group's query heads, weights and pages (`join_scores`). 'triton' is for a GPU and takes several
layers at once, 'native' is for a CPU, whose pages may have any element order and any size. n is the
number of layers that are scored; without the dimension it is one.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from vllm_kvcompress.ops import reference_paged as reference
from vllm_kvcompress.ops.checks import check, check_backend
from vllm_kvcompress.ops.native import native_ops
from vllm_kvcompress.ops.pool_checks import (
    BLOCK_SIZES,
    QUERY_DTYPES,
    check_pool,
    check_rows,
    stream_scales,
    triton_kernels,
)
from vllm_kvcompress.ops.scoring import PAGE_REDUCTIONS

WINDOW_REDUCTIONS = ("mean", "sum", "max", "defensive")
GROUP_REDUCTIONS = ("mean", "sum", "max")
POOL_KINDS = ("max", "avg")
MAX_WINDOW = 128
MAX_POOL_KERNEL = 31


def window_scores(
    query: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    num_rated: torch.Tensor,
    max_rated: int,
    *,
    layer: int,
    num_layers: int,
    num_kv_heads: int,
    scale: float | torch.Tensor,
    logits_soft_cap: float | torch.Tensor = 0.0,
    reduce: str = "mean",
    power: int = 1,
    near_tokens: int = 0,
    pool_kernel: int = 5,
    lse: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    part_sums: torch.Tensor | None = None,
    key_offsets: torch.Tensor | None = None,
    backend: str = "triton",
) -> torch.Tensor:
    """Attention weights of each prompt's last queries, joined over the window.

    `exp(q . k * scale - lse)`, causal inside the window, float32. 'mean', 'sum' and 'max' join the
    window's queries, per query head. 'defensive' (DefensiveKV, arXiv 2510.13334, algorithm 1) pools
    each query's weights by a mean over `pool_kernel` rated keys, brings them back to their old sum
    and takes the maximum over the window (and over query heads, see the result).

    Args:
        query: [R, n, w, Hq, d] or [R, w, Hq, d] queries of the last w tokens, w at most the prompt
            and, but for 'native', at most 128. Any strides but the last.
        pool: [num_pages, b, 2 d] as in `ragged_decode`.
        rows: [R, ROW_FIELDS] int32; seq_len is the prompt's length, first_kept_block is not read:
            the prompt is still dense, though its row may hold its region already.
        block_table: [R, W] int32.
        num_rated: [R] int32, the first keys of each prompt that get a score, at most seq_len.
        max_rated: greatest number of them.
        layer: index of the first of the n layers among the num_layers that share the pool.
        num_kv_heads: H.
        scale: factor on the products; a number, or [n] float32 (but for 'native').
        logits_soft_cap: squash logits into (-cap, cap) by tanh; 0 = not. A number or [n] float32.
        reduce: see above.
        power: exponent of the weights before they are joined, 1 or 2; 1 for 'defensive'.
        near_tokens: keys up to a query's own that count as 0 for it.
        pool_kernel: odd width of the pooling; 'defensive' only.
        lse: float32, like query without d, natural logarithm of each query's sum over the keys it
            sees, as prefill attention leaves it (the sink included); None = computed, which reads
            the keys twice.
        key_scale: [L * H] float32; None = 1.
        sinks: [n, Hq] or [Hq] float32, a logit per head that no key belongs to, -inf in a layer
            that has none; None = no layer has any.
        part_sums: [R, n * H, `num_score_parts`] float32, written: sums of a stream's scores by
            parts of its rated tokens, for `join_scores`; 'defensive' only, not for 'native'.
        key_offsets: [b, d] int64 of a `PageOrder`, 'native' only; None = plain pages.
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
    _check_pool(pool, query[0, 0], num_kv_heads, key_offsets, backend)
    _check_prompts(rows, block_table, num_rated, num_requests)
    check(
        window >= 1 and (window <= MAX_WINDOW or backend == "native"),
        f"a window has 1 to {MAX_WINDOW} queries, not {window}",
    )
    _check_layers(layer, num_scored, num_layers, backend)
    check(reduce in WINDOW_REDUCTIONS, f"unknown window reduction {reduce!r}")
    check(
        power == 1 or (power == 2 and reduce != "defensive"),
        f"power {power} does not go with {reduce!r}",
    )
    _check_kernel(pool_kernel)
    check(near_tokens >= 0, f"near_tokens must not be negative, got {near_tokens}")
    check(
        lse is None or lse.stride()[-2:] == (num_heads, 1),
        "want lse with whole rows [w, heads]",
    )
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
    for name, numbers in (("scale", scale), ("logits_soft_cap", logits_soft_cap)):
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
    num_streams = num_scored * num_kv_heads
    check(
        part_sums is None
        or (
            backend != "native"
            and reduce == "defensive"
            and part_sums.dim() == 3
            and part_sums.shape[:2] == (num_requests, num_streams)
            and part_sums.dtype == torch.float32
            and part_sums.is_contiguous()
        ),
        f"want part_sums [{num_requests}, {num_streams}, parts] float32 of 'defensive'",
    )
    key_scale = stream_scales(key_scale, num_layers * num_kv_heads, pool)
    options: dict[str, Any] = {
        "layer": layer,
        "num_layers": num_layers,
        "num_kv_heads": num_kv_heads,
        "reduce": reduce,
        "power": power,
        "near_tokens": near_tokens,
        "pool_kernel": pool_kernel,
        "lse": lse,
        "sinks": sinks if sinks is None else sinks.view(num_scored, num_heads),
        "part_sums": part_sums,
    }
    prompts = (pool, rows, block_table, num_rated)
    if check_backend(backend, "triton", "native") == "native":
        assert not isinstance(scale, torch.Tensor)
        assert not isinstance(logits_soft_cap, torch.Tensor)
        group = num_heads // num_kv_heads
        scores = query.new_empty(
            (num_requests, num_kv_heads, group, max_rated), dtype=torch.float32
        )
        own_lse = None if lse is None else lse[:, 0].contiguous()
        own_sinks = None if sinks is None else sinks.view(-1)
        tensors = (query[:, 0], *prompts, key_offsets, key_scale, own_lse, own_sinks)
        native_ops(*tensors, only="cpu").window_scores(
            *tensors,
            scores,
            layer,
            num_layers,
            num_kv_heads,
            scale,
            logits_soft_cap,
            WINDOW_REDUCTIONS.index(reduce),
            power,
            near_tokens,
            pool_kernel,
        )
        return scores
    options["scale"] = _layer_numbers(scale, num_scored, pool)
    options["logits_soft_cap"] = None
    if isinstance(logits_soft_cap, torch.Tensor) or logits_soft_cap > 0:
        options["logits_soft_cap"] = _layer_numbers(logits_soft_cap, num_scored, pool)
    if backend == "reference":
        return reference.window_scores(query, *prompts, max_rated, key_scale, **options)
    kernels = triton_kernels(query, *prompts)
    check(
        part_sums is None or part_sums.shape[2] == kernels.num_score_parts(max_rated, pool_kernel),
        f"part_sums of {max_rated} scores have {num_score_parts(max_rated, pool_kernel)} parts",
    )
    num_groups = kernels.num_score_groups(num_heads // num_kv_heads, reduce)
    size = (num_requests, num_streams, num_groups, max_rated)
    scores = _empty_scores(*size, device=query.device, backend=backend)
    kernels.window_scores(query, *prompts, key_scale, scores, **options)
    return scores


def num_score_parts(max_rated: int, pool_kernel: int) -> int:
    """Parts that `window_scores` sums a stream's scores by, where kernels of a GPU do it."""
    kernels = importlib.import_module("vllm_kvcompress.triton_kernels")
    return kernels.num_score_parts(max_rated, pool_kernel)


def paged_value_effect(
    pool: torch.Tensor,
    output_root: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    num_rated: torch.Tensor,
    max_rated: int,
    *,
    layer: int,
    num_layers: int,
    value_scale: torch.Tensor | None = None,
    value_offsets: torch.Tensor | None = None,
    backend: str = "triton",
) -> torch.Tensor:
    """`scoring.value_effect` of every rated token's value, read from pages.

    Args:
        pool, rows, block_table, num_rated, max_rated, layer, num_layers: as in `window_scores`.
        output_root: [n, H, d, d] or [H, d, d] of `output_root`, in the type to multiply in: bf16,
            fp16 or fp32. 'native' multiplies in float32, whatever its type.
        value_scale: [L * H] float32; None = 1.
        value_offsets: [b, d] int64 of a `PageOrder`, 'native' only; None = plain pages.
        backend: 'triton', 'native' (compiled, CPU) or 'reference'.

    Returns:
        [R, n * H, max_rated] float32, entries past num_rated undefined. No host sync, graph-safe,
        deterministic.

    Raises:
        ValueError: on shapes or types that do not fit.
        RuntimeError: if the backend cannot run here.
    """
    check(
        output_root.dim() in (3, 4)
        and output_root.shape[-2] == output_root.shape[-1]
        and output_root.is_contiguous(),
        f"want a contiguous output root [n, H, d, d], got {tuple(output_root.shape)}",
    )
    if output_root.dim() == 3:
        output_root = output_root[None]
    num_scored, num_kv_heads, head_size, _ = output_root.shape
    _check_pool(pool, output_root[0], head_size, value_offsets, backend)
    _check_prompts(rows, block_table, num_rated, rows.shape[0])
    _check_layers(layer, num_scored, num_layers, backend)
    value_scale = stream_scales(value_scale, num_layers * num_kv_heads, pool)
    size = (rows.shape[0], num_scored * num_kv_heads, max_rated)
    effect = _empty_scores(*size, device=pool.device, backend=backend)
    arguments = (pool, output_root, rows, block_table, num_rated, value_scale, effect)
    options: dict[str, Any] = {"layer": layer, "num_layers": num_layers}
    if check_backend(backend, "triton", "native") == "reference":
        reference.value_effect(*arguments, **options)
    elif backend == "native":
        tensors = (pool, output_root[0], *arguments[2:5], value_offsets, value_scale, effect)
        native_ops(*tensors, only="cpu").paged_value_effect(*tensors, layer, num_layers)
    else:
        triton_kernels(*arguments).value_effect(*arguments, **options)
    return effect


def join_scores(
    scores: torch.Tensor,
    num_rated: torch.Tensor,
    num_candidates: torch.Tensor,
    max_candidates: int,
    *,
    group_reduce: str = "mean",
    pool_kernel: int = 1,
    pool_kind: str = "max",
    pool_first: bool = True,
    floor_at_mean: bool = False,
    effect: torch.Tensor | None = None,
    span_kernel: int = 1,
    page_reduce: str | None = None,
    page_size: int = 16,
    num_kv_heads: int | None = None,
    part_sums: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str = "triton",
) -> torch.Tensor:
    """One score per KV head and token or page, from what `window_scores` returns.

    In this order: pooling along the rated tokens and joining the group (or the other way round),
    not below the head's mean, times each head's share of the values' effect, maximum over
    `span_kernel` tokens, one score per page.

    Args:
        scores: [R, n * H, G, N] float32.
        num_rated, num_candidates: [R] int32, tokens with a score, and those that get one here:
            whole pages of them if pages are asked for, never more than are rated.
        max_candidates: greatest number of them, at most N.
        group_reduce: 'mean', 'sum' or 'max' over G.
        pool_kernel: odd width, stride 1, same length; 1 = none.
        pool_kind: 'max' or 'avg' (tokens outside count as 0).
        pool_first: pool each of G, then join them.
        floor_at_mean: raise each head's scores to their mean over the rated tokens.
        effect: [R, n * H, N] float32 of `paged_value_effect`.
        span_kernel: odd width of the last pooling; 1 = none.
        page_reduce: 'max', 'mean' or 'rms' of a page's tokens; None = a score per token.
        page_size: tokens per page, 16 to 128; any number for 'native'.
        num_kv_heads: H, heads of a layer, among which effects are shared; None = n is 1.
        part_sums: [R, n * H, parts] float32 of `window_scores`: what 'triton' makes means of, for
            one group that is not pooled. The others need none.
        out: like the result, written; rows whole. None = a new tensor. Not for 'native'.
        backend: 'triton', 'native' (compiled, CPU) or 'reference'.

    Returns:
        [R, n * H, max_candidates or max_candidates / page_size] float32, entries past the
        candidates undefined. No host sync, graph-safe, deterministic.

    Raises:
        ValueError: on shapes, types or options that do not fit.
        RuntimeError: if the backend cannot run here.
    """
    check(
        scores.dim() == 4 and scores.dtype == torch.float32 and scores.stride(3) == 1,
        f"want scores [R, H, G, N] float32, got {tuple(scores.shape)} {scores.dtype}",
    )
    num_requests, num_streams, num_groups, max_rated = scores.shape
    num_kv_heads = num_streams if num_kv_heads is None else num_kv_heads
    check(
        num_kv_heads > 0
        and num_streams % num_kv_heads == 0
        and (num_streams == num_kv_heads or backend != "native"),
        f"{num_streams} streams are not whole layers of {num_kv_heads} heads (one, for 'native')",
    )
    for name, lens in (("num_rated", num_rated), ("num_candidates", num_candidates)):
        check(
            lens.shape == (num_requests,) and lens.dtype == torch.int32,
            f"want {name} [{num_requests}] int32, got {tuple(lens.shape)} {lens.dtype}",
        )
    check(group_reduce in GROUP_REDUCTIONS, f"unknown group reduction {group_reduce!r}")
    check(pool_kind in POOL_KINDS, f"pool kind must be 'max' or 'avg', got {pool_kind!r}")
    check(page_reduce in (None, *PAGE_REDUCTIONS), f"unknown page reduction {page_reduce!r}")
    check(
        page_size in BLOCK_SIZES or (backend == "native" and page_size > 0),
        f"pages of {page_size} tokens are not supported",
    )
    for kernel in (pool_kernel, span_kernel):
        _check_kernel(kernel)
    check(
        0 <= max_candidates <= max_rated
        and (page_reduce is None or max_candidates % page_size == 0),
        f"{max_candidates} candidates do not fit {max_rated} scores and pages of {page_size}",
    )
    check(
        effect is None
        or (effect.shape == (num_requests, num_streams, max_rated) and effect.stride(2) == 1),
        f"want effect [{num_requests}, {num_streams}, {max_rated}]",
    )
    width = max_candidates if page_reduce is None else max_candidates // page_size
    size = (num_requests, num_streams, width)
    check(
        out is None
        or (
            backend != "native"
            and out.shape == size
            and out.dtype == torch.float32
            and out.stride(2) == 1
        ),
        f"want out {size} float32",
    )
    if out is None:
        out = _empty_scores(*size, device=scores.device, backend=backend)
    arguments = (scores, num_rated, num_candidates, effect, out)
    options: dict[str, Any] = {
        "group_reduce": group_reduce,
        "pool_kernel": pool_kernel,
        "pool_kind": pool_kind,
        "pool_first": pool_first,
        "floor_at_mean": floor_at_mean,
        "span_kernel": span_kernel,
        "page_reduce": page_reduce or "token",
        "page_size": page_size,
    }
    if check_backend(backend, "triton", "native") == "reference":
        reference.join_scores(*arguments, num_kv_heads=num_kv_heads, **options)
    elif backend == "native":
        native_ops(*arguments, only="cpu").join_scores(
            *arguments,
            GROUP_REDUCTIONS.index(group_reduce),
            pool_kernel,
            POOL_KINDS.index(pool_kind),
            pool_first,
            floor_at_mean,
            span_kernel,
            0 if page_reduce is None else 1 + PAGE_REDUCTIONS.index(page_reduce),
            page_size,
        )
    else:
        check(
            not floor_at_mean
            or (
                num_groups == pool_kernel == 1
                and part_sums is not None
                and part_sums.shape[:2] == (num_requests, num_streams)
                and part_sums.dtype == torch.float32
                and part_sums.is_contiguous()
            ),
            f"a mean needs part_sums [{num_requests}, {num_streams}, parts] float32 of one group "
            "that is not pooled",
        )
        triton_kernels(scores, num_rated, num_candidates).join_scores(
            *arguments,
            max_candidates=max_candidates,
            num_kv_heads=num_kv_heads,
            part_sums=part_sums,
            **options,
        )
    return out


def score_width(num_entries: int) -> int:
    """Room for a row of scores: a multiple of 16, since Triton compiles a kernel for each kind."""
    return -(-num_entries // 16) * 16


def token_score_bytes(
    num_rated: int,
    *,
    window: int,
    group: int,
    reduce: str,
    has_effect: bool,
    span_kernel: int,
) -> int:
    """Most bytes that 'triton' takes for one stream on the way to a prompt's scores.

    Args:
        num_rated: tokens with a score, as many as the longest prompt of the batch has.
        window, group, reduce, span_kernel: as in `window_scores` and `join_scores`.
        has_effect: whether there are value effects.
    """
    is_defensive = reduce == "defensive"
    numbers = score_width(num_rated) * ((1 if is_defensive else group) + int(has_effect))
    if span_kernel > 1:
        # Tiles of 256 with what lies beside them.
        numbers += -(-num_rated // 256) * (256 + 32)
    if is_defensive:
        # Parts of 34 tokens at least.
        numbers += -(-num_rated // 34)
    # Four sums of each query row in 16 pieces of the keys; rows are filled up to powers of two.
    rows = max(16, _next_power_of_2(window)) * _next_power_of_2(group)
    return 4 * (numbers + 16 * 4 * rows)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _empty_scores(*size: int, device: torch.device, backend: str) -> torch.Tensor:
    """float32; rows have `score_width` of room for Triton."""
    if backend != "triton":
        return torch.empty(size, dtype=torch.float32, device=device)
    room = torch.empty(*size[:-1], score_width(size[-1]), dtype=torch.float32, device=device)
    return room[..., : size[-1]]


def _check_pool(
    pool: torch.Tensor,
    query: torch.Tensor,
    num_kv_heads: int,
    offsets: torch.Tensor | None,
    backend: str,
) -> None:
    """As `check_pool`, but 'native' takes pages of any size and order, and of any query type."""
    if backend != "native":
        check(offsets is None, f"backend {backend!r} reads plain pages only")
        check_pool(pool, query, num_kv_heads)
        return
    num_heads, head_size = query.shape[1:]
    check(
        query.stride(2) == 1 and query.dtype in QUERY_DTYPES,
        f"want dense rows of bf16, fp16 or fp32, got {query.dtype} of stride {query.stride(2)}",
    )
    check(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        f"{num_heads} query heads are not groups of {num_kv_heads} KV heads",
    )
    check(
        pool.dim() == 3
        and pool.is_contiguous()
        and pool.shape[2] == 2 * head_size
        and pool.dtype in QUERY_DTYPES,
        f"want a contiguous pool [pages, block size, {2 * head_size}] of bf16, fp16 or fp32, "
        f"got {tuple(pool.shape)} {pool.dtype}",
    )
    check(
        offsets is None
        or (
            offsets.shape == (pool.shape[1], head_size)
            and offsets.dtype == torch.int64
            and offsets.is_contiguous()
        ),
        f"want offsets [{pool.shape[1]}, {head_size}] int64",
    )


def _check_layers(layer: int, num_scored: int, num_layers: int, backend: str) -> None:
    last = layer + num_scored - 1
    check(
        0 <= layer <= last < num_layers,
        f"layer {layer if num_scored == 1 else f'{layer} to {last}'} is not among {num_layers}",
    )
    check(num_scored == 1 or backend != "native", "'native' scores one layer at a time")


def _layer_numbers(
    numbers: float | torch.Tensor, num_scored: int, pool: torch.Tensor
) -> torch.Tensor:
    """[num_scored] float32 on the pool's device."""
    if isinstance(numbers, torch.Tensor):
        return numbers
    return torch.full((num_scored,), numbers, dtype=torch.float32, device=pool.device)


def _check_kernel(kernel: int) -> None:
    check(
        1 <= kernel <= MAX_POOL_KERNEL and kernel % 2 == 1,
        f"a pool kernel must be odd, 1 to {MAX_POOL_KERNEL}, got {kernel}",
    )


def _check_prompts(
    rows: torch.Tensor, block_table: torch.Tensor, num_rated: torch.Tensor, num_requests: int
) -> None:
    check(
        rows.shape[0] == num_requests,
        f"want {num_requests} row descriptors, got {rows.shape[0]}",
    )
    check_rows(rows, block_table)
    check(
        num_rated.shape == (num_requests,) and num_rated.dtype == torch.int32,
        f"want num_rated [{num_requests}] int32, got {tuple(num_rated.shape)} {num_rated.dtype}",
    )
