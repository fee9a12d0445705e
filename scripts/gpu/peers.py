"""Decode attention by other libraries on as many tokens per head, those that are installed.

Each gets dense requests of the mean length: nobody else takes lengths per head. Pages are of
16 tokens in shuffled order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from gpu.shapes import ModelShape

PAGE_SIZE = 16
_WORKSPACE_BYTES = 128 * 2**20


def decode_peers(
    names: Sequence[str], shape: ModelShape, batch: int, num_tokens: int, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Calls to time, by names of `PEERS`; a library that is missing is left out.

    One that refuses is left out with a line.
    """
    if shape.pool_dtype != shape.dtype:
        return {}
    peers = {}
    for name in names:
        try:
            run = PEERS[name](shape, batch, num_tokens, device)
            run()
        except ImportError:
            continue
        except Exception as error:
            print(f"{name} at batch {batch} x {num_tokens}: {type(error).__name__}: {error}")
            continue
        peers[name] = run
    return peers


def _normal(*size: int, like: ModelShape, device: torch.device) -> torch.Tensor:
    return torch.randn(*size, device=device, dtype=like.dtype)


def _pages(
    shape: ModelShape, batch: int, num_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """[pages, 2, 16, H, d] and a shuffled [batch, width] table."""
    width = -(-num_tokens // PAGE_SIZE)
    size = (batch * width, 2, PAGE_SIZE, shape.num_kv_heads, shape.head_size)
    order = torch.randperm(batch * width, device=device)
    return _normal(*size, like=shape, device=device), order.view(batch, width).to(torch.int32)


def _dense(
    shape: ModelShape, batch: int, num_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [batch, H * g, 1, d], keys and values [batch, H, num_tokens, d]."""
    size = (batch, shape.num_kv_heads, num_tokens, shape.head_size)
    return (
        _normal(batch, shape.num_heads, 1, shape.head_size, like=shape, device=device),
        _normal(*size, like=shape, device=device),
        _normal(*size, like=shape, device=device),
    )


def _sdpa(
    shape: ModelShape, batch: int, num_tokens: int, device: torch.device
) -> Callable[[], Any]:
    tensors = _dense(shape, batch, num_tokens, device)
    return lambda: F.scaled_dot_product_attention(*tensors, enable_gqa=shape.group > 1)


def _flex_attention(
    shape: ModelShape, batch: int, num_tokens: int, device: torch.device
) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # One graph per shape. Past its limit of recompilations torch would run it uncompiled.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    tensors = _dense(shape, batch, num_tokens, device)
    return lambda: compiled(*tensors, enable_gqa=shape.group > 1)


def _flash_attention(
    shape: ModelShape, batch: int, num_tokens: int, device: torch.device
) -> Callable[[], Any]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    pages, table = _pages(shape, batch, num_tokens, device)
    query = _normal(batch, shape.num_heads, shape.head_size, like=shape, device=device)
    lens = torch.full((batch,), num_tokens, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return lambda: flash_attn_varlen_func(
        q=query,
        k=pages[:, 0],
        v=pages[:, 1],
        max_seqlen_q=1,
        cu_seqlens_q=starts,
        max_seqlen_k=num_tokens,
        seqused_k=lens,
        block_table=table,
        causal=True,
        fa_version=3 if torch.cuda.get_device_capability()[0] == 9 else 2,
    )


def _flashinfer(
    shape: ModelShape, batch: int, num_tokens: int, device: torch.device
) -> Callable[[], Any]:
    import flashinfer

    pages, table = _pages(shape, batch, num_tokens, device)
    query = _normal(batch, shape.num_heads, shape.head_size, like=shape, device=device)
    width = table.shape[1]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device),
        "NHD",
        use_tensor_cores=shape.group >= 4,
    )
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device=device) * width,
        table.flatten(),
        torch.full((batch,), (num_tokens - 1) % PAGE_SIZE + 1, dtype=torch.int32, device=device),
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_size,
        PAGE_SIZE,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
    )
    return lambda: wrapper.run(query, pages)


def _xformers(
    shape: ModelShape, batch: int, num_tokens: int, device: torch.device
) -> Callable[[], Any]:
    from xformers.ops import fmha

    # xformers' paged masks want pages of 256 tokens or more.
    page_size = 256
    width = -(-num_tokens // page_size)
    size = (1, batch * width * page_size, shape.num_kv_heads, shape.group, shape.head_size)
    stored = (*size[:3], 1, size[4])
    key = _normal(*stored, like=shape, device=device).expand(size)
    value = _normal(*stored, like=shape, device=device).expand(size)
    query = _normal(
        1, batch, shape.num_kv_heads, shape.group, shape.head_size, like=shape, device=device
    )
    order = torch.randperm(batch * width, device=device).view(batch, width)
    bias = fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * batch,
        kv_seqlen=[num_tokens] * batch,
        page_size=page_size,
        block_tables=order.to(torch.int32),
    )
    return lambda: fmha.memory_efficient_attention_forward(query, key, value, attn_bias=bias)


# In the order in which they are timed.
PEERS = {
    "torch SDPA": _sdpa,
    "torch FlexAttention": _flex_attention,
    "FlashAttention (vLLM)": _flash_attention,
    "FlashInfer": _flashinfer,
    "xformers": _xformers,
}
