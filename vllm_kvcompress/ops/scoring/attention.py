"""What scores of tokens are made of: weights of attention, and what values do.

None writes to its arguments; all are deterministic.
"""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.dispatch import choose
from vllm_kvcompress.ops.scoring import reference

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
    return choose(_ATTENTION, backend)(query, key, scale, logits_soft_cap, sinks)


def _window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    logits_soft_cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
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


_ATTENTION = {"torch": _window_attention, "reference": reference.window_attention}


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
    return choose(_VALUE_NORM, backend)(value, output_weight)


def _projected_value_norm(value: torch.Tensor, output_weight: torch.Tensor) -> torch.Tensor:
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


_VALUE_NORM = {"torch": _projected_value_norm, "reference": reference.projected_value_norm}


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
    return choose(_VALUE_EFFECT, backend)(value, output_root)


def _value_effect(value: torch.Tensor, output_root: torch.Tensor) -> torch.Tensor:
    return torch.bmm(value.float(), output_root).norm(dim=-1)


_VALUE_EFFECT = {"torch": _value_effect, "reference": reference.value_effect}
