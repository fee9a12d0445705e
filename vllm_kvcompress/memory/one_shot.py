"""Which prompts may be computed without blocks for what they evict, and what that takes.

Such a prompt is computed in a single step. Its keys and values lie in a buffer outside of the pool,
in one area per layer. Where a layer's budget does not depend on the others', what it keeps moves to
the region before the next layer starts, and one area serves all layers. Where all layers compete,
the buffer also holds what may yet be kept of the layers so far (see `compaction.staging`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_kvcompress.memory.cache_shape import CacheShape
from vllm_kvcompress.memory.geometry import RequestGeometry, cdiv

# With one score for each entry; with more, the buffer has to hold more of a prompt.
_MOST_JOINT_SHARE = 0.25


@dataclass(frozen=True)
class OneShot:
    """When prompts are computed so, and what decides how large their buffer is.

    Attributes:
        when: 'never', 'always', or 'auto': unless others may want the prompt's blocks.
        layers_compete: whether the heads of all layers compete for pages.
        num_scores: scores by either of which an entry may be kept.
        keeps_tokens: whether single tokens compete; else pages do.
        ratio: fraction of a prompt that is removed; None = it does not depend on the prompt.
    """

    when: str
    layers_compete: bool
    num_scores: int
    keeps_tokens: bool
    ratio: float | None

    @property
    def most_share(self) -> float:
        """Share of a prompt's pages that its region may have for `fits_counted_buffer`."""
        return _MOST_JOINT_SHARE / self.num_scores if self.layers_compete else 1.0

    def most_held_pages(self, shape: CacheShape, num_region_blocks: int) -> int:
        """Most pages of a prompt that may yet be kept while all layers compete."""
        # Shares of tokens are rounded up to pages.
        slack = shape.pages_per_block if self.keeps_tokens else 0
        return self.num_scores * (num_region_blocks * shape.pages_per_block + slack)

    def fits_counted_buffer(self, geometry: RequestGeometry) -> bool:
        """Whether a prompt may use a buffer of `counted_buffer_pages`, as far as its region goes.

        Where all layers compete, a large one would need as much memory beside the pool as the
        prompt's blocks do in it.
        """
        most_blocks = self.most_share * geometry.first_kept_block
        return self.when != "never" and geometry.num_region_blocks <= most_blocks

    def counted_buffer_pages(self, shape: CacheShape, max_tokens: int, max_prompts: int) -> int:
        """Pages of a buffer that one step's prompts fit, whatever they are.

        Args:
            shape: of the paged cache.
            max_tokens: of all prompts together.
            max_prompts: number of them.
        """
        block_size, num_heads = shape.block_size, shape.num_kv_heads
        if self.when == "never":
            return 0
        if not self.layers_compete:
            # A prompt is compressed from two blocks on.
            num_prompts = min(max_prompts, max_tokens // (2 * block_size))
            return num_heads * (max_tokens // block_size + num_prompts)
        share = self.most_share
        num_prompts = min(max_prompts, int(share * max_tokens) // block_size)
        region_blocks = int(share * max_tokens) // block_size
        if self.ratio is not None:
            # Every head keeps at least one page.
            asked = cdiv(int((1 - self.ratio) * max_tokens), block_size)
            region_blocks = min(region_blocks, asked + num_prompts)
        slack = self.most_held_pages(shape, 0) * max(0, num_prompts - 1)
        held = self.most_held_pages(shape, region_blocks) + slack if num_prompts else 0
        area = num_heads * (max_tokens // block_size + num_prompts)
        return 2 * held + _areas_beside(held, area) if area else 0

    def buffer_pages(self, shape: CacheShape, geometries: Sequence[RequestGeometry]) -> int:
        """Pages of a buffer that just these prompts fit."""
        blocks = sum(cdiv(g.compact_len, shape.block_size) for g in geometries)
        area = blocks * shape.num_kv_heads
        if not self.layers_compete:
            return area
        held = sum(self.most_held_pages(shape, g.num_region_blocks) for g in geometries)
        return min(shape.num_layers * area, 2 * held + _areas_beside(held, area))


def _areas_beside(held: int, area: int) -> int:
    """Pages of areas, so many that what is held is narrowed a few times only."""
    return area * max(1, cdiv(held, 2 * area))
