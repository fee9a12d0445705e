"""The one pool behind the layers' views of the KV cache."""

from __future__ import annotations

import torch

from vllm_kvcompress.memory import CacheShape


def flat_pool(layer_views: list[torch.Tensor], shape: CacheShape) -> torch.Tensor:
    """The pool behind the layers' views as [num_pages, page_elements].

    Page `(block * L + layer) * H + head` is contiguous.

    Raises:
        RuntimeError: if the views are laid out otherwise, or have other elements.
    """
    first = layer_views[0]
    page = shape.page.num_elements
    dtype = str(first.dtype).removeprefix("torch.")
    if dtype != shape.page.dtype:
        raise RuntimeError(f"KV cache of {dtype}; expected pages of {shape.page.dtype}")
    num_blocks = first.shape[0]
    want_shape = (num_blocks, shape.num_kv_heads, shape.block_size, 2 * shape.head_size)
    want_strides = (shape.pages_per_block * page, page, 2 * shape.head_size, 1)
    base = first.storage_offset()
    for layer, view in enumerate(layer_views):
        offset = base + layer * shape.num_kv_heads * page
        if (
            tuple(view.shape) != want_shape
            or view.stride() != want_strides
            or view.storage_offset() != offset
            or view.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            raise RuntimeError(
                f"KV cache of layer {layer} is not a slice of one [block, layer, head] pool: "
                f"shape {tuple(view.shape)}, strides {view.stride()}, offset "
                f"{view.storage_offset()}; expected {want_shape}, {want_strides}, {offset}"
            )
    num_pages = num_blocks * shape.pages_per_block
    if num_pages >= 2**31:
        raise RuntimeError(f"{num_pages} pages do not fit 32-bit page ids; use larger blocks")
    return first.as_strided((num_pages, page), (page, 1), base)
