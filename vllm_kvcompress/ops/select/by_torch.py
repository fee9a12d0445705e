"""Selection by torch, on any device: request by request, which tells the host their sizes."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.scoring.ranking import joint_top_counts, nan_last, select_top
from vllm_kvcompress.ops.select.apportion import apportion


def joint_page_counts(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    total_pages: torch.Tensor,
    guaranteed: torch.Tensor,
    num_pages: torch.Tensor,
    *,
    page_size: int,
) -> None:
    """See `ops.joint_page_counts`."""
    group_size = scores.shape[1] // total_pages.shape[1]
    numbers = zip(num_entries.tolist(), total_pages.tolist(), guaranteed.tolist(), strict=True)
    for r, (entries, totals, sure) in enumerate(numbers):
        groups = nan_last(scores[r, :, :entries]).split(group_size)
        for group, total, least, out in zip(
            groups, totals, sure, num_pages[r].split(group_size), strict=True
        ):
            counts = joint_top_counts(group, total * page_size, least)
            if page_size == 1:
                out.copy_(counts)
                continue
            ideal = [count / page_size for count in counts.tolist()]
            pages = apportion(ideal, total, 1, entries // page_size)
            out.copy_(torch.tensor(pages, dtype=torch.int32))


def select_entries(
    scores: torch.Tensor,
    num_entries: torch.Tensor,
    num_pages: torch.Tensor,
    page_offsets: torch.Tensor,
    indices: torch.Tensor,
    *,
    page_size: int,
) -> None:
    """See `ops.select_entries`."""
    page_offsets[:, 0] = 0
    page_offsets[:, 1:] = num_pages.cumsum(1)
    for r, entries in enumerate(num_entries.tolist()):
        chosen = select_top(nan_last(scores[r, :, :entries]), num_pages[r] * page_size)
        indices[r, : len(chosen)] = chosen
