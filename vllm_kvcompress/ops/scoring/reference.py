"""Plain references of the ops: loops in float64, no cleverness, the judge of every backend."""

from __future__ import annotations

import torch


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    logits_soft_cap: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ops.window_attention`."""
    num_heads, group, window, _ = query.shape
    num_keys = key.shape[1]
    size = (num_heads, group, window, num_keys)
    out = torch.zeros(size, dtype=torch.float64, device=key.device)
    for h in range(num_heads):
        for g in range(group):
            for w in range(window):
                visible = num_keys - window + w + 1
                logits = key[h, :visible].double() @ query[h, g, w].double() * scale
                if logits_soft_cap > 0:
                    logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h, g].double()[None]])
                out[h, g, w, :visible] = logits.softmax(dim=0)[:visible]
    return out.float()


def pool_scores(scores: torch.Tensor, kernel: int, kind: str) -> torch.Tensor:
    """See `ops.pool_scores`."""
    num_entries = scores.shape[-1]
    out = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    for i in range(num_entries):
        near = scores[..., max(0, i - kernel // 2) : i + kernel // 2 + 1].double()
        out[..., i] = near.amax(dim=-1) if kind == "max" else near.sum(dim=-1) / kernel
    return out.float()


def projected_value_norm(value: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
    """See `ops.projected_value_norm`."""
    num_heads, num_tokens, _ = value.shape
    group = output_weight.shape[1]
    out = torch.zeros(num_heads, num_tokens, dtype=torch.float64, device=value.device)
    for h in range(num_heads):
        for token in range(num_tokens):
            for g in range(group):
                moved = value[h, token].double() @ output_weight[h, g].double()
                out[h, token] += moved.abs().sum() / group
    return out.float()


def value_effect(value: torch.Tensor, output_root: torch.Tensor) -> torch.Tensor:
    """See `ops.value_effect`."""
    num_heads, num_tokens, _ = value.shape
    out = torch.zeros(num_heads, num_tokens, dtype=torch.float64, device=value.device)
    for h in range(num_heads):
        for token in range(num_tokens):
            moved = value[h, token].double() @ output_root[h].double()
            out[h, token] = (moved**2).sum().sqrt()
    return out.float()


def page_scores(scores: torch.Tensor, page_size: int, reduce: str) -> torch.Tensor:
    """See `ops.page_scores`."""
    pages = []
    for start in range(0, scores.shape[-1], page_size):
        page = scores[..., start : start + page_size].double()
        if reduce == "max":
            pages.append(page.amax(dim=-1))
        elif reduce == "mean":
            pages.append(page.sum(dim=-1) / page_size)
        else:
            pages.append(((page**2).sum(dim=-1) / page_size).sqrt())
    return torch.stack(pages, dim=-1).float() if pages else scores


def joint_top_counts(scores: torch.Tensor, total: int, guaranteed: int) -> torch.Tensor:
    """See `ops.joint_top_counts`."""
    num_rows, _ = scores.shape
    counts = [guaranteed] * num_rows
    contenders = []
    for row in range(num_rows):
        ranked = sorted(scores[row].tolist(), reverse=True)
        contenders += [(-score, rank, row) for rank, score in enumerate(ranked[guaranteed:])]
    for _, _, row in sorted(contenders)[: total - num_rows * guaranteed]:
        counts[row] += 1
    return torch.tensor(counts, dtype=torch.int64)


def select_top(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """See `ops.select_top`."""
    chosen: list[int] = []
    for row, count in zip(scores.tolist(), counts.tolist(), strict=True):
        ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
        chosen += sorted(ranked[:count])
    return torch.tensor(chosen, dtype=torch.int64)
