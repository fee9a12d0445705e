"""How large pages and blocks are, against torch's own count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache_shapes import cache_shape

from vllm_kvcompress.memory import PageFormat
from vllm_kvcompress.memory.page_format import ELEMENT_BYTES
from vllm_kvcompress.vllm_integration.worker.pool import flat_pool


@pytest.mark.parametrize("dtype", ELEMENT_BYTES)
@pytest.mark.parametrize(("num_tokens", "head_size"), [(1, 1), (16, 64), (32, 100), (128, 256)])
def test_a_page_is_as_large_as_torch_makes_it(dtype, num_tokens, head_size):
    page = PageFormat(dtype, num_tokens, head_size)
    tensor = torch.empty(num_tokens, 2 * head_size, dtype=getattr(torch, dtype))
    assert page.element_bytes == tensor.element_size()
    assert page.num_elements == tensor.numel()
    assert page.num_bytes == tensor.nbytes
    shape = cache_shape(3, 2, 4, head_size, num_tokens, dtype)
    assert shape.block_bytes == torch.stack([tensor] * 6).nbytes
    assert (shape.block_size, shape.head_size) == (num_tokens, head_size)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"dtype": "float8_e4m3fn"},
            "float32, bfloat16, float16 are known, not of 'float8_e4m3fn'",
        ),
        ({"scales": "per-token"}, "none are known, not of 'per-token'"),
        ({"num_tokens": 0}, "an empty page"),
        ({"head_size": 0}, "an empty page"),
    ],
)
def test_pages_that_nothing_is_known_of_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(PageFormat("float16", 16, 64), **change)


def test_a_pool_of_other_elements_than_the_pages_is_refused():
    shape = cache_shape(2, 2, 1, 8, 16)
    pool = torch.zeros(5, 2, 2, 16, 16)
    views = [pool[:, layer] for layer in range(2)]
    assert flat_pool(views, shape).shape == (20, shape.page.num_elements)
    half = [view.half() for view in views]
    with pytest.raises(RuntimeError, match="KV cache of float16; expected pages of float32"):
        flat_pool(half, shape)
