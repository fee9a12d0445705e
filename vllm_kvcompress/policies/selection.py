"""From scores to the pages or tokens that each head keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies.budgets import head_pages, layer_pages


@dataclass(frozen=True)
class Selection:
    """What one prompt keeps. L layers, H KV heads; streams are (layer, head), layer first.

    Attributes:
        num_pages: [L, H] int64, region pages of each stream, all >= 1.
        indices: [sum] int64, per stream ascending: kept page numbers (granularity 'page') or
            kept token positions (granularity 'token', `block_size` per page).
        granularity: 'page' or 'token'.
    """

    num_pages: torch.Tensor
    indices: torch.Tensor
    granularity: str

    @property
    def page_offsets(self) -> torch.Tensor:
        """[L * H + 1] int64, first virtual page of each stream, and their number."""
        offsets = torch.zeros(self.num_pages.numel() + 1, dtype=torch.int64)
        offsets[1:] = self.num_pages.reshape(-1).cumsum(0)
        return offsets


def select(
    scores: torch.Tensor, config: KVCompressConfig, mean_pages: int, block_size: int
) -> Selection:
    """Choose what each (layer, KV head) keeps.

    Args:
        scores: [L, H, T] float32 on the CPU, T candidate tokens, a multiple of block_size.
        config: names the schedule, the allocation and the granularity.
        mean_pages: region pages per stream on average; the total is exact.
        block_size: tokens per page.

    Returns:
        The selection; its pages sum to mean_pages * L * H.
    """
    num_layers, num_heads, num_tokens = scores.shape
    granularity = config.granularity
    if granularity == "page":
        scores, page_size = ops.page_scores(scores, block_size), 1
    else:
        page_size = block_size
    options = dict(config.options)
    per_layer = layer_pages(
        config.recipe.schedule,
        mean_pages,
        num_layers,
        num_tokens // block_size,
        **{key: options[key] for key in ("beta",) if key in options},
    )
    num_pages = torch.tensor(
        [
            head_pages(
                config.recipe.allocation,
                scores[layer],
                per_layer[layer],
                page_size,
                **{key: options[key] for key in ("alpha",) if key in options},
            )
            for layer in range(num_layers)
        ],
        dtype=torch.int64,
    )
    assert int(num_pages.sum()) == mean_pages * num_layers * num_heads
    flat = scores.reshape(num_layers * num_heads, -1)
    indices = ops.select_top(flat, num_pages.reshape(-1) * page_size)
    return Selection(num_pages, indices, granularity)
