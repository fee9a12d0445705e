"""Shape of the paged KV cache on one rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheShape:
    """What kernels and bookkeeping must know of the cache's layers that are compressed.

    Attributes:
        num_layers: L.
        num_kv_heads: H on this rank.
        num_queries_per_kv: g, query heads per KV head.
        head_size: elements of a key, and of a value.
        block_size: tokens per block, and per page.
    """

    num_layers: int
    num_kv_heads: int
    num_queries_per_kv: int
    head_size: int
    block_size: int

    @property
    def pages_per_block(self) -> int:
        """Pages that one block owns, L * H; as many as there are streams."""
        return self.num_layers * self.num_kv_heads

    def streams(self, layer: int, num_layers: int = 1) -> slice:
        """Streams of some layers, from `layer` on."""
        return slice(layer * self.num_kv_heads, (layer + num_layers) * self.num_kv_heads)
