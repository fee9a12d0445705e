"""Plain torch in place of the compiled ops below vLLM's FlashAttention backend.

Only these ops are replaced. vLLM's own builder, `forward` and `do_kv_cache_update` run, and read
what they read on a GPU. All is vectorised over rows and waits for no device, so that it may stand
in on a GPU too, where vLLM's compiled ops are not at hand.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

import torch

# Whose ops attend and store prompts in the tests of the CUDA side.
CHOICE_NAME = "KVC_RIG_ATTENTION"
CHOICES = ("vllm", "torch")
# float64 products of a call at once.
_MOST_LOGITS = 2**23


def chosen_attention(choice: str | None = None) -> str:
    """Whose ops run: 'vllm' or 'torch'.

    Args:
        choice: one of these; None = the environment's KVC_RIG_ATTENTION, and if there is none,
            vLLM's on a GPU and torch's without one.

    Raises:
        ValueError: if it is neither, or vLLM's without a GPU.
    """
    has_gpu = torch.cuda.is_available()
    choice = choice or os.environ.get(CHOICE_NAME) or ("vllm" if has_gpu else "torch")
    if choice not in CHOICES:
        raise ValueError(f"{CHOICE_NAME} is {choice!r}, not one of {CHOICES}")
    if choice == "vllm" and not has_gpu:
        raise ValueError(f"{CHOICE_NAME} is 'vllm', whose ops need a GPU")
    return choice


def describe_attention(choice: str) -> str:
    """One line for a test report."""
    ops = {"vllm": "vLLM's compiled ops", "torch": "plain torch in their place"}[choice]
    return f"FlashAttention and the store below it ({CHOICE_NAME}={choice}): {ops}"


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,
    window_size: list[int] | None = None,
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    alibi_slopes: None = None,
    scheduler_metadata: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    num_splits: int = 0,
    fa_version: int = 3,
    dynamic_causal: None = None,
    mask_mod: None = None,
    aux_tensors: None = None,
) -> Any:
    """Causal attention of rows to their blocks in float64, as by `flash_attn_varlen_func`.

    Args:
        q: [T, H * g, d].
        k, v: [blocks, b, H, d] views of the cache.
        out: as q; written.
        cu_seqlens_q: [R + 1] int32 first token of every row, and T.
        max_seqlen_q: at least every row's tokens.
        seqused_k: [R] int32 keys of every row.
        max_seqlen_k: at least all of them.
        softmax_scale: of the logits.
        causal: True.
        block_table: [R, W] int32.
        window_size: keys before each token that it reads, and 0; [-1, -1] = all.
        softcap: 0 = none.
        s_aux: [H * g] sinks.
        return_softmax_lse: whether the sums are asked for.
        q_descale, k_descale, v_descale: [R, H] float32, all 1.

    Returns:
        `out`, and if asked for, [H * g, T] float32 logarithms of sums over keys, without sinks.
    """
    assert causal is True and alibi_slopes is None and dynamic_causal is None
    assert mask_mod is None and aux_tensors is None and fa_version in (2, 3, 4)
    num_rows, num_kv_heads = len(seqused_k), k.shape[2]
    for scale in (q_descale, k_descale, v_descale):
        assert scale is None or scale.shape == (num_rows, num_kv_heads)
    tensors = (q, k, v, out, cu_seqlens_q, seqused_k, block_table, s_aux)
    tensors += (scheduler_metadata, q_descale, k_descale, v_descale)
    assert len({x.device for x in tensors if x is not None}) == 1
    window = -1 if window_size is None else window_size[0]
    lse = q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    for rows, tokens, longest_q, longest_k in _batches(
        cu_seqlens_q, seqused_k, len(q), max_seqlen_q, max_seqlen_k
    ):
        starts, lens = cu_seqlens_q[rows.start : rows.stop + 1], seqused_k[rows]
        keys, values = (_rows_of(x, block_table[rows], longest_k) for x in (k, v))
        num_heads = (rows.stop - rows.start) * q.shape[1]
        # So many queries of each row that the logits are no larger than allowed.
        step = max(1, _MOST_LOGITS // max(1, num_heads * longest_k))
        for first in range(0, longest_q, step):
            part = torch.arange(first, min(first + step, longest_q), device=q.device)
            attended, sums = _attend(
                q, keys, values, part, starts, lens, softmax_scale, softcap, window, s_aux
            )
            _put(out, tokens, attended, part, starts)
            _put(lse.t(), tokens, sums, part, starts)
    return (out, lse) if return_softmax_lse else out


def _batches(
    starts: torch.Tensor, lens: torch.Tensor, num_tokens: int, longest_q: int, longest_k: int
) -> list[tuple[slice, slice, int, int]]:
    """Rows that are attended together, their tokens, and the most queries and keys of a row.

    All rows at once, padded, where a device would have to be waited for; else each by itself.
    """
    if starts.device != torch.device("cpu"):
        return [(slice(0, len(lens)), slice(0, num_tokens), longest_q, longest_k)]
    batches = []
    bounds = starts.tolist()
    for row, seq_len in enumerate(lens.tolist()):
        first, end = bounds[row], bounds[row + 1]
        batches.append((slice(row, row + 1), slice(first, end), end - first, seq_len))
    return batches


def _rows_of(cache: torch.Tensor, block_table: torch.Tensor, longest: int) -> torch.Tensor:
    """[R, n, H, d] float64 entries of every row, padded to whole blocks."""
    num_blocks = -(-longest // cache.shape[1])
    return cache[block_table[:, :num_blocks].long()].flatten(1, 2).double()


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    part: torch.Tensor,
    starts: torch.Tensor,
    lens: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, m, H * g, d] and [R, m, H * g] of the rows' queries number `part`, some past the end."""
    num_rows, num_keys, num_kv_heads, head_size = keys.shape
    starts, lens = starts.long(), lens.long()
    own = (starts[:-1, None] + part).clamp(max=len(q) - 1)
    queries = q[own].double().unflatten(2, (num_kv_heads, -1))
    # Each query's own position, which is the last that it reads.
    last = (lens - (starts[1:] - starts[:-1]))[:, None] + part
    places = torch.arange(num_keys, device=q.device)
    is_read = (places <= last[..., None]) & (places < lens[:, None, None])
    if window >= 0:
        is_read &= places >= last[..., None] - window
    logits = torch.einsum("rmhgd,rnhd->rhgmn", queries, keys) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~is_read[:, None, None], -torch.inf)
    sums = logits.logsumexp(dim=-1)
    total = sums
    if sinks is not None:
        total = torch.logaddexp(sums, sinks.double().view(num_kv_heads, -1, 1))
    weights = (logits - total[..., None]).exp()
    # What nobody may read may be NaN.
    values = values.masked_fill(~is_read.any(dim=1)[..., None, None], 0.0)
    attended = torch.einsum("rhgmn,rnhd->rmhgd", weights, values)
    size = (num_rows, len(part), -1, head_size)
    return attended.reshape(size), sums.permute(0, 3, 1, 2).flatten(2)


def _put(
    target: torch.Tensor, tokens: slice, found: torch.Tensor, part: torch.Tensor, starts: Any
) -> None:
    """Write what rows [R, m, ...] have for their queries number `part` to their tokens [T, ...]."""
    index = torch.arange(tokens.start, tokens.stop, device=found.device)
    row = torch.searchsorted(starts[1:].long(), index, right=True)
    # Which of its row's queries a token is, counted from the first of this part.
    query = index - starts.long()[row] - part[0]
    is_here = (query >= 0) & (query < len(part))
    new = found[row, query.clamp(0, len(part) - 1)].to(target.dtype)
    is_here = is_here.view(-1, *[1] * (target.dim() - 1))
    target[tokens] = torch.where(is_here, new, target[tokens])


def store_in_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Stands in for `reshape_and_cache_flash`, whose arguments it has.

    Args:
        key, value: [T, H, d] or longer.
        key_cache, value_cache: [blocks, b, H, d] views of the cache; written.
        slot_mapping: [T] int64 place of every token, block by block; -1 = none. No token's is 0,
            which is vLLM's null block.
        kv_cache_dtype: 'auto'.
        k_scale, v_scale: one float32 each, on the device.
    """
    assert kv_cache_dtype == "auto"
    tensors = (key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    assert len({x.device for x in tensors}) == 1
    is_stored = (slot_mapping >= 0)[:, None, None]
    slots = slot_mapping.clamp(min=0)
    block, offset = slots // key_cache.shape[1], slots % key_cache.shape[1]
    for cache, new in ((key_cache, key), (value_cache, value)):
        # Tokens without a place write slot 0 as it is: to leave them out means to count the rest.
        new = new[: len(slots)].to(cache.dtype)
        cache[block, offset] = torch.where(is_stored, new, cache[block, offset])


def scheduler_metadata(
    *, batch_size: int, cache_seqlens: torch.Tensor, cu_seqlens_q: torch.Tensor, **sizes: Any
) -> torch.Tensor:
    """Stands in for FlashAttention 3's plan of its tiles, which nobody reads here. [n] int32."""
    assert cache_seqlens.shape == (batch_size,) and cu_seqlens_q.shape == (batch_size + 1,)
    assert cache_seqlens.dtype == cu_seqlens_q.dtype == torch.int32
    return cache_seqlens.new_zeros(1 + -(-batch_size // 4) * 4)


def _stand_in_module() -> ModuleType:
    """vLLM's `vllm_flash_attn` with the functions above; its own needs compiled ops."""
    module = ModuleType("vllm.vllm_flash_attn")
    vars(module).update(
        flash_attn_varlen_func=varlen_attention,
        get_scheduler_metadata=scheduler_metadata,
        compile_flash_attn_varlen_func_from_specs=None,
    )
    return module


def import_backend() -> ModuleType:
    """vLLM's FlashAttention backend, also where its Python sources are and its ops are not.

    Raises:
        ImportError: if it is vLLM's ops that were chosen.
    """
    try:
        return importlib.import_module("vllm.v1.attention.backends.flash_attn")
    except ImportError:
        if chosen_attention() == "vllm":
            raise
        sys.modules["vllm.vllm_flash_attn"] = _stand_in_module()
        return importlib.import_module("vllm.v1.attention.backends.flash_attn")


def use_plain_attention(patch: Any, version: int = 3) -> None:
    """Put the functions above in place of vLLM's ops; `patch` is a pytest MonkeyPatch.

    Args:
        patch: undoes it.
        version: of FlashAttention that vLLM is told it has.
    """
    flash_attn = import_backend()
    patch.setattr(flash_attn, "get_flash_attn_version", lambda *args, **kwargs: version)
    for name, function in {
        "flash_attn_varlen_func": varlen_attention,
        "reshape_and_cache_flash": store_in_pages,
        "get_scheduler_metadata": scheduler_metadata,
        "flash_attn_supports_sinks": lambda: True,
    }.items():
        patch.setattr(flash_attn, name, function, raising=False)
    patch.setitem(sys.modules, "vllm.vllm_flash_attn", _stand_in_module())


if torch.cuda.is_available() and chosen_attention() == "torch":
    # Before anything imports vLLM's backends, which fail to without their ops.
    import_backend()
