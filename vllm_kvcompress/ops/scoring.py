"""Scoring and selection. None of these ops writes to its arguments; all are deterministic."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm_kvcompress.ops import reference
from vllm_kvcompress.ops.checks import check, check_backend
from vllm_kvcompress.ops.selection import joint_page_counts, select_entries

PAGE_REDUCTIONS = ("max", "mean", "rms")
# Tokens whose projected values are held at once: on a CPU, what its caches hold; else many, in few
# launches: a quarter of a gigabyte in the 8B shape.
_TOKENS_AT_ONCE_ON_CPU, _TOKENS_AT_ONCE = 256, 4096


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    logits_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    backend: str = "torch",
) -> torch.Tensor:
    """Attention weights of a prompt's last queries over all its keys (SnapKV's window).

    Args:
        query: [H, g, w, d] queries of the last w of n tokens, any float dtype.
        key: [H, n, d], n >= w.
        scale: factor on the products.
        logits_soft_cap: squash logits into (-cap, cap) by tanh; 0 = not.
        sinks: [H, g] float32, a logit per query head that no key belongs to and that is not
            squashed; None = none.
        backend: 'torch' or 'reference'.

    Returns:
        [H, g, w, n] float32; each row and its sink's weight sum to 1; causal inside the window.
        No host sync.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check(
        query.dim() == 4 and key.dim() == 3 and query.shape[0] == key.shape[0],
        f"want query [H, g, w, d] and key [H, n, d], got {tuple(query.shape)}, {tuple(key.shape)}",
    )
    check(
        query.shape[3] == key.shape[2] and query.shape[2] <= key.shape[1],
        f"window {query.shape[2]} of head size {query.shape[3]} does not fit "
        f"{key.shape[1]} keys of head size {key.shape[2]}",
    )
    check(
        sinks is None or (sinks.shape == query.shape[:2] and sinks.dtype == torch.float32),
        f"want sinks {tuple(query.shape[:2])} float32, got "
        f"{sinks if sinks is None else (tuple(sinks.shape), sinks.dtype)}",
    )
    if check_backend(backend, "torch") == "reference":
        return reference.window_attention(query, key, scale, logits_soft_cap, sinks)
    num_heads, group, window, head_size = query.shape
    num_keys = key.shape[1]
    rows = query.float().reshape(num_heads, group * window, head_size)
    logits = torch.bmm(rows, key.float().transpose(1, 2)).mul_(scale)
    if logits_soft_cap > 0:
        logits = torch.tanh(logits / logits_soft_cap) * logits_soft_cap
    logits = logits.view(num_heads, group, window, num_keys)
    future = torch.ones(window, window, dtype=torch.bool, device=key.device).triu(1)
    logits[..., num_keys - window :].masked_fill_(future, float("-inf"))
    if sinks is None:
        return logits.softmax(dim=-1)
    sink = sinks[:, :, None, None]
    greatest = torch.maximum(logits.amax(dim=-1, keepdim=True), sink)
    # In place: an extra column would copy what may be the largest tensor around.
    weights = logits.sub_(greatest).exp_()
    return weights.div_(weights.sum(dim=-1, keepdim=True) + (sink - greatest).exp())


def pool_scores(
    scores: torch.Tensor, kernel: int, kind: str, backend: str = "torch"
) -> torch.Tensor:
    """Pool along the last axis, stride 1, same length.

    Args:
        scores: [..., n] float32.
        kernel: odd width; 1 returns the scores unchanged.
        kind: 'max', or 'avg' (positions outside count as 0, as in the SnapKV code).
        backend: 'torch' or 'reference'.

    Returns:
        Like `scores`.

    Raises:
        ValueError: on an even kernel or an unknown kind.
    """
    check(kernel >= 1 and kernel % 2 == 1, f"pool kernel must be odd and positive, got {kernel}")
    check(kind in ("max", "avg"), f"pool kind must be 'max' or 'avg', got {kind!r}")
    if check_backend(backend, "torch") == "reference":
        return reference.pool_scores(scores, kernel, kind)
    if kernel == 1 or scores.shape[-1] == 0:
        return scores
    if kind == "max":
        flat = scores.reshape(-1, 1, scores.shape[-1])
        return F.max_pool1d(flat, kernel, stride=1, padding=kernel // 2).view(scores.shape)
    # Faster on a CPU than torch's average pooling, and the same to the bit.
    padded = F.pad(scores, (kernel // 2, kernel // 2))
    first, *others = padded.unfold(-1, scores.shape[-1], 1).unbind(-2)
    total = first.clone()
    for other in others:
        total += other
    return total / kernel


def projected_value_norm(
    value: torch.Tensor, output_weight: torch.Tensor, backend: str = "torch"
) -> torch.Tensor:
    """How much each token's value moves a layer's output: ||Wo v||_1, mean over query heads.

    Source: CriticalKV, arXiv 2502.03805, eq. 6. Costs as much as the output projection itself.

    Args:
        value: [H, n, d], any float dtype.
        output_weight: [H, g, d, m], the output projection's columns of each query head.
        backend: 'torch' or 'reference'.

    Returns:
        [H, n] float32. No host sync.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check(
        value.dim() == 3
        and output_weight.dim() == 4
        and (value.shape[0], value.shape[2]) == (output_weight.shape[0], output_weight.shape[2]),
        f"want value [H, n, d] and output weight [H, g, d, m], got {tuple(value.shape)}, "
        f"{tuple(output_weight.shape)}",
    )
    if check_backend(backend, "torch") == "reference":
        return reference.projected_value_norm(value, output_weight)
    num_heads, group, head_size, _ = output_weight.shape
    norms = torch.empty(value.shape[:2], dtype=torch.float32, device=value.device)
    num_tokens = _TOKENS_AT_ONCE_ON_CPU if value.device.type == "cpu" else _TOKENS_AT_ONCE
    for head in range(num_heads):
        # [d, g * m]: all query heads in one product.
        weight = output_weight[head].float().transpose(0, 1).reshape(head_size, -1)
        for part, out in zip(
            value[head].split(num_tokens), norms[head].split(num_tokens), strict=True
        ):
            torch.sum((part.float() @ weight).abs_(), dim=-1, out=out)
    return norms / group


def output_root(output_weight: torch.Tensor) -> torch.Tensor:
    """What `value_effect` needs of an output projection, computed once per layer.

    Args:
        output_weight: [H, g, d, m], the output projection's columns of each query head.

    Returns:
        [H, d, d] float32 R with `R @ R.T` = mean over g of `W @ W.T`, W [d, m].

    Raises:
        ValueError: on another number of dimensions.
    """
    check(
        output_weight.dim() == 4,
        f"want output weight [H, g, d, m], got {tuple(output_weight.shape)}",
    )
    weight = output_weight.float()
    squares = torch.einsum("hgdm,hgem->hde", weight, weight) / weight.shape[1]
    values, vectors = torch.linalg.eigh(squares)
    return vectors * values.clamp(min=0).sqrt()[:, None, :]


def value_effect(
    value: torch.Tensor, output_root: torch.Tensor, backend: str = "torch"
) -> torch.Tensor:
    """How much each token's value moves a layer's output: ||Wo v||_2, root mean square over g.

    Source: ours, in place of `projected_value_norm`, at d / (g m) of its cost.

    Args:
        value: [H, n, d], any float dtype.
        output_root: [H, d, d] float32, of `output_root`.
        backend: 'torch' or 'reference'.

    Returns:
        [H, n] float32. No host sync.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check(
        value.dim() == 3 and output_root.shape == (value.shape[0], value.shape[2], value.shape[2]),
        f"want value [H, n, d] and output root [H, d, d], got {tuple(value.shape)}, "
        f"{tuple(output_root.shape)}",
    )
    if check_backend(backend, "torch") == "reference":
        return reference.value_effect(value, output_root)
    return torch.bmm(value.float(), output_root).norm(dim=-1)


def page_scores(
    scores: torch.Tensor, page_size: int, reduce: str = "max", backend: str = "torch"
) -> torch.Tensor:
    """Score of a page from its tokens'.

    Args:
        scores: [..., n] float32, n a multiple of page_size; not negative for 'rms'.
        page_size: tokens per page.
        reduce: 'max' (its best token), 'mean', or 'rms' (root mean square, between the two).
        backend: 'torch' or 'reference'.

    Returns:
        [..., n / page_size] float32.

    Raises:
        ValueError: if n is not a multiple of page_size, or on an unknown reduction.
    """
    num_tokens = scores.shape[-1]
    check(
        num_tokens % page_size == 0,
        f"{num_tokens} scores are not whole pages of {page_size} tokens",
    )
    check(reduce in PAGE_REDUCTIONS, f"unknown page reduction {reduce!r}")
    if check_backend(backend, "torch") == "reference":
        return reference.page_scores(scores, page_size, reduce)
    pages = scores.unflatten(-1, (num_tokens // page_size, page_size))
    best = pages.amax(dim=-1)
    if reduce == "max":
        return best
    if reduce == "mean":
        return pages.mean(dim=-1)
    # Relative to the best, since squares of small scores would underflow.
    unit = torch.where((best > 0) & best.isfinite(), best, 1.0)
    return unit * (pages / unit[..., None]).square().mean(dim=-1).sqrt()


def joint_top_counts(
    scores: torch.Tensor, total: int, guaranteed: int, backend: str = "torch"
) -> torch.Tensor:
    """How many entries each row gets when rows compete for `total` entries (Ada-KV).

    Args:
        scores: [R, n] float32.
        total: entries to give out over all rows, <= R * n.
        guaranteed: best entries of each row that count in any case, R * guaranteed <= total.
        backend: 'torch', 'native' (compiled) or 'reference'.

    Returns:
        [R] int64 summing to total. Equal scores: the entry that ranks higher in its row, then
        the lower row, first, so that rows with equal scores share evenly.

    Raises:
        ValueError: if the numbers do not fit.
    """
    num_rows, num_entries = scores.shape
    check(
        0 <= guaranteed <= num_entries and num_rows * guaranteed <= total <= scores.numel(),
        f"cannot give {total} of {num_rows} x {num_entries} entries, {guaranteed} sure per row",
    )
    if check_backend(backend, "torch", "native") == "reference":
        return reference.joint_top_counts(scores, total, guaranteed)
    if backend == "native":
        numbers = torch.tensor(
            [[num_entries], [total], [guaranteed]], dtype=torch.int32, device=scores.device
        )
        entries, totals, sure = numbers[0], numbers[1:2], numbers[2:]
        return joint_page_counts(scores[None], entries, totals, sure, backend="native")[0].long()
    by_rank = scores.sort(dim=1, descending=True, stable=True).values
    # Rank by rank, so that a stable sort prefers the higher rank, then the lower row.
    rest = by_rank[:, guaranteed:].t().flatten()
    winners = rest.sort(descending=True, stable=True).indices[: total - num_rows * guaranteed]
    return torch.bincount(winners % num_rows, minlength=num_rows) + guaranteed


def select_top(scores: torch.Tensor, counts: torch.Tensor, backend: str = "torch") -> torch.Tensor:
    """The best entries of each row, a different number per row.

    Args:
        scores: [R, n] float32.
        counts: [R] int64, entries to take, each in [0, n].
        backend: 'torch', 'native' (compiled) or 'reference'.

    Returns:
        [sum(counts)] int64: each row's chosen indices ascending, rows one after another.
        Equal scores: the lower index first. Syncs with the host (the size depends on data).

    Raises:
        ValueError: if the counts do not fit the scores.
    """
    num_rows, num_entries = scores.shape
    check(
        counts.shape == (num_rows,) and bool(((counts >= 0) & (counts <= num_entries)).all()),
        f"want {num_rows} counts in [0, {num_entries}], got {counts.tolist()}",
    )
    if check_backend(backend, "torch", "native") == "reference":
        return reference.select_top(scores, counts)
    if backend == "native":
        width = torch.tensor([num_entries], dtype=torch.int32, device=scores.device)
        wanted = counts.to(device=scores.device, dtype=torch.int32)[None]
        _, indices = select_entries(
            scores[None], width, wanted, int(counts.sum()), backend="native"
        )
        return indices[0].long()
    order = scores.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(num_entries, device=scores.device).expand(num_rows, -1)
    keep_mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    keep_mask.scatter_(1, order, ranks < counts.to(scores.device)[:, None])
    return keep_mask.nonzero()[:, 1]
