"""Decode attention by other libraries on as many tokens per head, those that are installed.

Each gets dense requests of the mean length: nobody else takes lengths per head. A call does what a
step does: it attends in every layer, each with its own cache. Pages are of 16 tokens in shuffled
order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu.shapes import ModelShape

PAGE_SIZE = 16
_WORKSPACE_BYTES = 128 * 2**20

# Attention of one layer, by its number.
Attend = Callable[[int], Any]


def decode_peers(
    names: Sequence[str], shape: ModelShape, batch: int, num_tokens: int, device: torch.device
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What builds each peer's call, by names of `PEERS`.

    Built one at a time: caches of all layers are large. Building one raises what its library does,
    ImportError where it is missing.
    """
    if shape.pool_dtype != shape.dtype:
        return {}
    return {name: partial(_step, PEERS[name], shape, batch, num_tokens, device) for name in names}


def _step(
    build: Callable[..., Attend],
    shape: ModelShape,
    batch: int,
    num_tokens: int,
    device: torch.device,
) -> Callable[[], Any]:
    attend = build(shape, batch, num_tokens, device)

    def step() -> Any:
        for layer in range(shape.num_layers - 1):
            attend(layer)
        return attend(shape.num_layers - 1)

    return step


def _normal(*size: int, like: ModelShape, device: torch.device) -> torch.Tensor:
    return torch.randn(*size, device=device, dtype=like.dtype)


def _pages(
    shape: ModelShape, batch: int, num_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """[layers, pages, 2, 16, H, d] and a shuffled [batch, width] table, every layer's."""
    width = -(-num_tokens // PAGE_SIZE)
    size = (batch * width, 2, PAGE_SIZE, shape.num_kv_heads, shape.head_size)
    order = torch.randperm(batch * width, device=device)
    pages = _normal(shape.num_layers, *size, like=shape, device=device)
    return pages, order.view(batch, width).to(torch.int32)


def _dense(
    shape: ModelShape, batch: int, num_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [batch, H * g, 1, d], keys and values [layers, batch, H, num_tokens, d]."""
    size = (shape.num_layers, batch, shape.num_kv_heads, num_tokens, shape.head_size)
    return (
        _normal(batch, shape.num_heads, 1, shape.head_size, like=shape, device=device),
        _normal(*size, like=shape, device=device),
        _normal(*size, like=shape, device=device),
    )


def _sdpa(shape: ModelShape, batch: int, num_tokens: int, device: torch.device) -> Attend:
    query, key, value = _dense(shape, batch, num_tokens, device)
    return lambda layer: F.scaled_dot_product_attention(
        query, key[layer], value[layer], enable_gqa=shape.group > 1
    )


def _flex_attention(shape: ModelShape, batch: int, num_tokens: int, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    # One graph per shape. Past its limit of recompilations torch would run it uncompiled.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    query, key, value = _dense(shape, batch, num_tokens, device)
    return lambda layer: compiled(query, key[layer], value[layer], enable_gqa=shape.group > 1)


def _flash_attention(
    shape: ModelShape, batch: int, num_tokens: int, device: torch.device
) -> Attend:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    pages, table = _pages(shape, batch, num_tokens, device)
    query = _normal(batch, shape.num_heads, shape.head_size, like=shape, device=device)
    lens = torch.full((batch,), num_tokens, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    version = 3 if torch.cuda.get_device_capability()[0] == 9 else 2
    return lambda layer: flash_attn_varlen_func(
        q=query,
        k=pages[layer, :, 0],
        v=pages[layer, :, 1],
        max_seqlen_q=1,
        cu_seqlens_q=starts,
        max_seqlen_k=num_tokens,
        seqused_k=lens,
        block_table=table,
        causal=True,
        fa_version=version,
    )


def _flashinfer(shape: ModelShape, batch: int, num_tokens: int, device: torch.device) -> Attend:
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
    return lambda layer: wrapper.run(query, pages[layer])


def _xformers(shape: ModelShape, batch: int, num_tokens: int, device: torch.device) -> Attend:
    from xformers.ops import fmha

    # xformers' paged masks want pages of 256 tokens or more.
    page_size = 256
    width = -(-num_tokens // page_size)
    stored = (1, batch * width * page_size, shape.num_kv_heads, 1, shape.head_size)
    seen = (*stored[:3], shape.group, stored[4])
    key = _normal(shape.num_layers, *stored, like=shape, device=device)
    value = _normal(shape.num_layers, *stored, like=shape, device=device)
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
    return lambda layer: fmha.memory_efficient_attention_forward(
        query, key[layer].expand(seen), value[layer].expand(seen), attn_bias=bias
    )


# In the order in which they are timed.
PEERS = {
    "torch SDPA": _sdpa,
    "torch FlexAttention": _flex_attention,
    "FlashAttention (vLLM)": _flash_attention,
    "FlashInfer": _flashinfer,
    "xformers": _xformers,
}
