"""How vLLM's CPU attention kernel orders the elements of a page, found by asking it.

The order depends on the instruction set the kernel was built for ('vec', 'vec16', 'amx', ...)
and is written down nowhere, but it is a fixed permutation: a page filled with known numbers
through vLLM's own store op tells it.
"""

from __future__ import annotations

import functools

import torch
from vllm import _custom_ops as vllm_ops

from vllm_kvcompress.ops import PageOrder

# Whole numbers up to this are exact in bf16, the narrowest supported cache type.
_DIGIT_BASE = 128


@functools.cache
def find_page_order(isa: str, block_size: int, head_size: int, dtype: torch.dtype) -> PageOrder:
    """The element order of one page.

    Args:
        isa: the kernel's instruction-set name, as in `layer.isa`.
        block_size: tokens per page.
        head_size: elements per key.
        dtype: of the cache; float32, float16 or bfloat16.

    Returns:
        The order; checked to be a permutation.

    Raises:
        RuntimeError: if the kernel stores anything but a permutation of its input.
    """
    numel = block_size * head_size
    numbers = torch.arange(1, 2 * numel + 1).view(2, block_size, head_size)
    found = torch.zeros(2 * numel, dtype=torch.int64)
    place = 1
    while place <= 2 * numel:
        digits = (numbers // place % _DIGIT_BASE).to(dtype)
        page = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
        key_cache, value_cache = page.chunk(2, dim=2)
        vllm_ops.cpu_attn_reshape_and_cache(
            digits[0].unsqueeze(1),
            digits[1].unsqueeze(1),
            key_cache,
            value_cache,
            torch.arange(block_size, dtype=torch.int64),
            isa,
        )
        found += page.flatten().to(torch.int64) * place
        place *= _DIGIT_BASE
    offsets = torch.full((2 * numel + 1,), -1, dtype=torch.int64)
    if not torch.equal(found.sort().values, numbers.flatten()):
        raise RuntimeError(
            f"vLLM's CPU kernel ({isa}, block size {block_size}, head size {head_size}, {dtype}) "
            "does not store a page as a permutation; KV compression cannot address it"
        )
    offsets[found] = torch.arange(2 * numel)
    key_offsets, value_offsets = offsets[1:].view(2, block_size, head_size)
    return PageOrder(key_offsets.contiguous(), value_offsets.contiguous())
