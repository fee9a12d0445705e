"""Shape of the paged KV cache on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kvcompress.memory.page_format import PageFormat


@dataclass(frozen=True)
class CacheShape:
    """What kernels and bookkeeping must know of the cache's layers that are compressed.

    Attributes:
        num_layers: L.
        num_kv_heads: H on this rank.
        num_queries_per_kv: g, query heads per KV head.
        page: what a page of one KV head is.
    """

    num_layers: int
    num_kv_heads: int
    num_queries_per_kv: int
    page: PageFormat

    @property
    def head_size(self) -> int:
        """Elements of a key, and of a value."""
        return self.page.head_size

    @property
    def block_size(self) -> int:
        """Tokens per block, and per page."""
        return self.page.num_tokens

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.pages_per_block * self.page.num_bytes

    @property
    def pages_per_block(self) -> int:
        """Pages that one block owns, L * H; as many as there are streams."""
        return self.num_layers * self.num_kv_heads

    def streams(self, layer: int, num_layers: int = 1) -> slice:
        """Streams of some layers, from `layer` on."""
        return slice(layer * self.num_kv_heads, (layer + num_layers) * self.num_kv_heads)
