"""What of the backends is the CPU's alone. `test_backends` has what all platforms do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_kvcompress.vllm_integration.platforms.cpu.page_order import find_page_order


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
def test_page_order_reads_back_what_the_kernel_stored(block_size, head_size):
    dtype = torch.bfloat16
    isa = _get_attn_isa(dtype, block_size, head_size, "auto")
    order = find_page_order(isa, block_size, head_size, dtype)
    key, value = torch.randn(2, block_size, 1, head_size).to(dtype)
    page = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
    key_cache, value_cache = page.chunk(2, dim=2)
    vllm_ops.cpu_attn_reshape_and_cache(
        key, value, key_cache, value_cache, torch.arange(block_size), isa
    )
    assert torch.equal(page.flatten()[order.key_offsets], key[:, 0])
    assert torch.equal(page.flatten()[order.value_offsets], value[:, 0])
