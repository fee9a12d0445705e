"""Plain references of selection."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.scoring.reference import joint_top_counts, select_top
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
    num_groups = total_pages.shape[1]
    size = scores.shape[1] // num_groups
    lowest = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    for r, entries in enumerate(num_entries.tolist()):
        for group in range(num_groups):
            streams = slice(group * size, (group + 1) * size)
            total = int(total_pages[r, group])
            counts = joint_top_counts(
                lowest[r, streams, :entries], total * page_size, int(guaranteed[r, group])
            ).tolist()
            if page_size > 1:
                ideal = [count / page_size for count in counts]
                counts = apportion(ideal, total, 1, entries // page_size)
            num_pages[r, streams] = torch.tensor(counts, dtype=torch.int32)


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
    lowest = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    for r, entries in enumerate(num_entries.tolist()):
        page_offsets[r, 0] = 0
        page_offsets[r, 1:] = num_pages[r].cumsum(0)
        chosen = select_top(lowest[r, :, :entries], num_pages[r] * page_size)
        indices[r, : len(chosen)] = chosen.to(torch.int32)
