"""Moving and addressing pages of the paged KV pool.

The pool is seen as [num_pages, page_elements]: page `(block * L + layer) * H + head` holds
the K and V of `block_size` tokens of one head. The order of the elements inside a page is the
attention kernel's business and is described by a `PageOrder`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from vllm_kvcompress.ops.checks import check


@dataclass(frozen=True)
class PageOrder:
    """Where each element of a token's K and V lies inside a page.

    Attributes:
        key_offsets, value_offsets: [block_size, head_size] int64 offsets, in elements,
            from the start of the page; together a permutation of the page.
    """

    key_offsets: torch.Tensor
    value_offsets: torch.Tensor

    def __post_init__(self) -> None:
        both = torch.cat([self.key_offsets.flatten(), self.value_offsets.flatten()])
        check(
            torch.equal(both.sort().values, torch.arange(both.numel())),
            "key and value offsets are not a permutation of the page",
        )

    @classmethod
    def plain(cls, block_size: int, head_size: int) -> PageOrder:
        """Token after token, its key before its value: vLLM's `BLHNC` pages on a GPU."""
        keys = torch.arange(block_size)[:, None] * 2 * head_size + torch.arange(head_size)
        return cls(keys, keys + head_size)

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether it is the plain order."""
        plain = PageOrder.plain(self.block_size, self.head_size)
        return torch.equal(self.key_offsets, plain.key_offsets) and torch.equal(
            self.value_offsets, plain.value_offsets
        )

    @functools.cached_property
    def key_strides(self) -> tuple[int, int, int] | None:
        """First offset and steps per token and per element of the keys; None if not regular."""
        return _strides(self.key_offsets)

    @functools.cached_property
    def value_strides(self) -> tuple[int, int, int] | None:
        """As `key_strides`, of the values."""
        return _strides(self.value_offsets)

    @property
    def block_size(self) -> int:
        """Tokens per page."""
        return self.key_offsets.shape[0]

    @property
    def head_size(self) -> int:
        """Elements of one token's key (and value)."""
        return self.key_offsets.shape[1]


def _strides(offsets: torch.Tensor) -> tuple[int, int, int] | None:
    first = int(offsets[0, 0])
    token = int(offsets[1, 0]) - first if offsets.shape[0] > 1 else 1
    element = int(offsets[0, 1]) - first if offsets.shape[1] > 1 else 1
    tokens, elements = (torch.arange(size) for size in offsets.shape)
    is_regular = torch.equal(offsets, first + tokens[:, None] * token + elements * element)
    return (first, token, element) if is_regular and min(token, element) > 0 else None


def copy_pages(pool: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy whole pages inside the pool.

    Args:
        pool: [num_pages, page_elements], written at `target`.
        source, target: [n] int64 page ids; no target may be a source.

    Raises:
        ValueError: if the id lists differ in length.
    """
    check(
        source.shape == target.shape and source.dim() == 1,
        f"want as many sources as targets, got {tuple(source.shape)} and {tuple(target.shape)}",
    )
    pool.index_copy_(0, target, pool.index_select(0, source))


def unpack_pages(
    pool: torch.Tensor, page_ids: torch.Tensor, order: PageOrder, part: str
) -> torch.Tensor:
    """Read the keys or the values of pages in token order.

    Args:
        pool: [num_pages, page_elements].
        page_ids: [..., n] int64, pages of one stream after another.
        order: element order of a page.
        part: 'key' or 'value'.

    Returns:
        [..., n * block_size, head_size], a new tensor of the pool's dtype.

    Raises:
        ValueError: on another part.
    """
    check(part in ("key", "value"), f"pages hold keys and values, not {part!r}")
    is_key = part == "key"
    block_size, head_size = order.block_size, order.head_size
    ids = page_ids.reshape(-1)
    strides = order.key_strides if is_key else order.value_strides
    if strides is None:
        offsets = order.key_offsets if is_key else order.value_offsets
        raw = pool.index_select(0, ids).index_select(1, offsets.reshape(-1))
    else:
        first, token, element = strides
        size = (block_size - 1) * token + (head_size - 1) * element + 1
        taken = pool[:, first : first + size].index_select(0, ids)
        raw = taken.as_strided((len(ids), block_size, head_size), (size, token, element))
    return raw.reshape(*page_ids.shape[:-1], page_ids.shape[-1] * block_size, head_size)


def gather_tokens(
    pool: torch.Tensor, page_ids: torch.Tensor, places: torch.Tensor, order: PageOrder
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of single tokens.

    Args:
        pool: [num_pages, page_elements].
        page_ids, places: [n] int64 page of each token, and its place inside it.
        order: element order of a page.

    Returns:
        key and value [n, head_size], new tensors of the pool's dtype.

    Raises:
        ValueError: if the id lists differ in length.
    """
    check(
        page_ids.shape == places.shape and places.dim() == 1,
        f"want a page for each place, got {tuple(page_ids.shape)} and {tuple(places.shape)}",
    )
    pages = page_ids[:, None]
    return pool[pages, order.key_offsets[places]], pool[pages, order.value_offsets[places]]


def pack_pages(
    pool: torch.Tensor,
    page_ids: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    order: PageOrder,
) -> None:
    """Write whole pages from tokens in order.

    Args:
        pool: [num_pages, page_elements], written at `page_ids`.
        page_ids: [n] int64.
        key, value: [n * block_size, head_size] of the pool's dtype.
        order: element order of a page.

    Raises:
        ValueError: if the tokens do not fill the pages exactly.
    """
    want = (page_ids.numel() * order.block_size, order.head_size)
    check(
        key.shape == want and value.shape == want,
        f"want key and value {want}, got {tuple(key.shape)} and {tuple(value.shape)}",
    )
    num_pages = page_ids.numel()
    raw = torch.empty(num_pages, pool.shape[1], dtype=pool.dtype, device=pool.device)
    raw[:, order.key_offsets.reshape(-1)] = key.reshape(num_pages, -1)
    raw[:, order.value_offsets.reshape(-1)] = value.reshape(num_pages, -1)
    pool.index_copy_(0, page_ids, raw)


def region_page_ids(region_blocks: torch.Tensor, pages_per_block: int) -> torch.Tensor:
    """Page ids of a compressed region's virtual pages, in order.

    Virtual page v lies in region block `v // pages_per_block`, as its page `v % pages_per_block`.

    Args:
        region_blocks: [n] block ids.
        pages_per_block: L * H.

    Returns:
        [n * pages_per_block] int64.
    """
    pages = torch.arange(pages_per_block, device=region_blocks.device)
    return (region_blocks.long()[:, None] * pages_per_block + pages).flatten()


def ragged_page_table(
    region_ids: torch.Tensor,
    page_offsets: torch.Tensor,
    tail_blocks: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """Page table of every (layer, head) stream of one compressed request.

    Stream s reads its region pages `region_ids[page_offsets[s] : page_offsets[s + 1]]`, then
    page s of each tail block.

    Args:
        region_ids: [V] int64 page ids of the region.
        page_offsets: [S + 1] int64 virtual-page offsets, S = L * H.
        tail_blocks: [t] int64 block ids after the compressed part, in token order.
        width: columns of the result, at least the longest stream's pages.

    Returns:
        [S, width] int32; columns past a stream's end are 0 and must not be read.

    Raises:
        ValueError: if a stream does not fit the width.

    Example:
        S = 2 streams with 1 and 2 region pages in block 7 and 8 (pages 14, 15, 16), one tail
        block 3 (pages 6 and 7), width 3: [[14, 6, 0], [15, 16, 7]].
    """
    num_streams = page_offsets.numel() - 1
    num_tail = tail_blocks.numel()
    counts = page_offsets[1:] - page_offsets[:-1]
    longest = int(counts.max()) + num_tail
    check(longest <= width, f"a stream of {longest} pages does not fit a table of {width}")
    table = torch.zeros(num_streams, width, dtype=torch.int32)
    columns = torch.arange(width)
    in_region = columns < counts[:, None]
    table[in_region] = region_ids[: int(page_offsets[-1])].to(torch.int32)
    in_tail = (columns >= counts[:, None]) & (columns < counts[:, None] + num_tail)
    streams = torch.arange(num_streams)
    tail_ids = tail_blocks.long()[None, :] * num_streams + streams[:, None]
    table[in_tail] = tail_ids.flatten().to(torch.int32)
    return table
