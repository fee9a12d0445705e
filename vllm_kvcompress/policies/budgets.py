"""How a request's pages are shared: among layers (schedules), then among a layer's heads.

All totals are exact in pages. Every head of every layer gets at least one page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_kvcompress import ops
from vllm_kvcompress.ops import apportion


def layer_pages(
    budgets: str, mean_pages: int, num_layers: int, max_pages: int, options: Mapping[str, Any]
) -> list[int]:
    """Pages per KV head for each layer, before heads compete.

    'pyramid' is PyramidKV (arXiv 2406.02069, eq. 3-4): linear from `2 * mean - mean / beta`
    in the first layer to `mean / beta` in the last. Where a head has fewer pages to choose from
    than twice the mean, the layers share uniformly, as the authors do for prompts shorter than
    that. The authors' code floors its step and overspends (L=80 at 128 tokens: +27 %); here the
    sum is exact. kvpress' PyramidKVPress counts the window inside a layer's number and clamps
    where this goes uniform.

    Args:
        budgets: key into `recipes.BUDGETS`, not 'joint' and not a table per head.
        mean_pages: average over the layers.
        num_layers: layers to share among.
        max_pages: pages a head has to choose from.
        options: the method's; 'beta' or 'table' is read.

    Returns:
        One number per layer, each in [1, max_pages], summing to mean_pages * num_layers.
    """
    total = mean_pages * num_layers
    if budgets == "static":
        return apportion(_shares(options["table"], total), total, 1, max_pages)
    is_pyramid = budgets in ("pyramid", "ada-pyramid")
    if not is_pyramid or num_layers == 1 or max_pages < 2 * mean_pages:
        return [mean_pages] * num_layers
    low = mean_pages / options["beta"]
    high = 2 * mean_pages - low
    step = (high - low) / (num_layers - 1)
    ideal = [high - step * layer for layer in range(num_layers)]
    return apportion(ideal, total, 1, max_pages)


@dataclass(frozen=True)
class StreamBudgets:
    """Pages of every (layer, KV head).

    Attributes:
        num_pages: [L, H] int64, each >= 1.
        guaranteed: [L] int64, entries (pages or tokens) that each head is assured of.
    """

    num_pages: torch.Tensor
    guaranteed: torch.Tensor


def stream_budgets(
    budgets: str,
    scores: torch.Tensor,
    mean_pages: int,
    page_size: int,
    options: Mapping[str, Any],
    backend: str = "torch",
) -> StreamBudgets:
    """Pages for each head of each layer.

    'ada' is Ada-KV (arXiv 2407.11550, algorithm 1) in kvpress' form: each head is sure of its
    best `alpha * mean`, the rest goes to the best scores of the layer's heads together. 'joint'
    is the same over all layers' heads at once (KV-Compress, arXiv 2410.00161, section 3;
    Layer-DefensiveKV, arXiv 2510.13334), each head being sure of `floor * mean`.

    Args:
        budgets: key into `recipes.BUDGETS`.
        scores: [L, H, N] float32; one entry per page (page_size 1) or per token.
        mean_pages: pages per head on average.
        page_size: entries of `scores` per page.
        options: the method's.
        backend: 'torch' or 'native', of the ops.

    Returns:
        Pages summing to mean_pages * L * H.

    Raises:
        ValueError: if a table's shape is not the model's.
    """
    num_layers, num_heads, num_entries = scores.shape
    plan = plan_budgets(
        budgets, num_layers, num_heads, mean_pages, num_entries // page_size, page_size, options
    )
    if plan.num_pages is not None:
        return StreamBudgets(plan.num_pages, plan.guaranteed_per_layer(num_layers))
    groups = scores.reshape(plan.num_groups, -1, num_entries)
    pages = _compete(groups, plan.total_pages, page_size, plan.guaranteed, backend)
    return StreamBudgets(pages.view(num_layers, num_heads), plan.guaranteed_per_layer(num_layers))


@dataclass(frozen=True)
class BudgetPlan:
    """What is known of a prompt's budgets before its scores are.

    Attributes:
        num_pages: [L, H] int64, if scores have no say in it; else None.
        total_pages: [G] int64 pages to share in each group of streams that compete: the heads of
            a layer (G = L) or all of them (G = 1). Empty if there are none.
        guaranteed: [G] int64, entries that each stream of a group is assured of.
    """

    num_pages: torch.Tensor | None
    total_pages: torch.Tensor
    guaranteed: torch.Tensor

    @property
    def num_groups(self) -> int:
        """G."""
        return self.total_pages.numel()

    def guaranteed_per_layer(self, num_layers: int) -> torch.Tensor:
        """[L] int64, entries that each head of a layer is assured of."""
        if self.num_pages is not None:
            return torch.zeros(num_layers, dtype=torch.int64)
        return self.guaranteed.expand(num_layers)


def plan_budgets(
    budgets: str,
    num_layers: int,
    num_heads: int,
    mean_pages: int,
    max_pages: int,
    page_size: int,
    options: Mapping[str, Any],
) -> BudgetPlan:
    """What `stream_budgets` can tell without scores.

    Args:
        budgets, mean_pages, page_size, options: as there.
        num_layers, num_heads: L and H.
        max_pages: pages a stream has to choose from.

    Raises:
        ValueError: if a table's shape is not the model's.
    """
    none = torch.empty(0, dtype=torch.int64)
    if budgets == "joint":
        guaranteed = _guaranteed(options["floor"], mean_pages, page_size)
        total = mean_pages * num_layers * num_heads
        return BudgetPlan(None, torch.tensor([total]), torch.tensor([guaranteed]))
    if budgets == "static":
        check_table(options["table"], num_layers, num_heads)
        if isinstance(options["table"][0], tuple):
            total = mean_pages * num_layers * num_heads
            weights = [weight for row in options["table"] for weight in row]
            pages = apportion(_shares(weights, total), total, 1, max_pages)
            return BudgetPlan(torch.tensor(pages).view(num_layers, num_heads), none, none)
    means = layer_pages(budgets, mean_pages, num_layers, max_pages, options)
    if budgets in ("ada", "ada-pyramid"):
        sure = [_guaranteed(options["alpha"], mean, page_size) for mean in means]
        totals = [mean * num_heads for mean in means]
        return BudgetPlan(None, torch.tensor(totals), torch.tensor(sure))
    return BudgetPlan(torch.tensor(means)[:, None].expand(-1, num_heads), none, none)


def layer_budgets(
    budgets: str,
    scores: torch.Tensor,
    layer: int,
    num_layers: int,
    mean_pages: int,
    page_size: int,
    options: Mapping[str, Any],
    backend: str = "torch",
) -> tuple[torch.Tensor, int]:
    """One layer of `stream_budgets`, for all budgets but 'joint': layers do not compete.

    Args:
        budgets, mean_pages, page_size, options, backend: as in `stream_budgets`.
        scores: [H, N] float32 of this layer.
        layer: its 0-based index.
        num_layers: L.

    Returns:
        [H] int64 pages, and the entries that each head is assured of.
    """
    num_heads, num_entries = scores.shape
    max_pages = num_entries // page_size
    plan = plan_budgets(budgets, num_layers, num_heads, mean_pages, max_pages, page_size, options)
    if plan.num_pages is not None:
        return plan.num_pages[layer], 0
    total, sure = plan.total_pages[layer, None], plan.guaranteed[layer, None]
    return _compete(scores[None], total, page_size, sure, backend)[0], int(sure)


def joint_most_entries(
    scores: torch.Tensor,
    num_layers: int,
    mean_pages: int,
    page_size: int,
    options: Mapping[str, Any],
    backend: str = "torch",
) -> torch.Tensor:
    """Most entries that heads of the first layers can end up with under 'joint' budgets.

    The other layers are still unknown. More competitors can only raise the score that it takes
    to be kept, and rounding to whole pages adds less than one page.

    Args:
        scores: [l, H, N] float32 of layers 0 .. l - 1.
        num_layers: L >= l.
        mean_pages, page_size, options, backend: as in `stream_budgets`.

    Returns:
        [l, H] int64, at least `stream_budgets(...).num_pages[:l] * page_size`, whatever the
        scores of the other layers.
    """
    num_known, num_heads, num_entries = scores.shape
    guaranteed = _guaranteed(options["floor"], mean_pages, page_size)
    total = mean_pages * num_layers * num_heads * page_size
    total -= (num_layers - num_known) * num_heads * guaranteed
    flat = scores.flatten(0, 1)
    counts = ops.joint_top_counts(flat, min(total, flat.numel()), guaranteed, backend)
    if page_size > 1:
        counts = ((counts // page_size + 1) * page_size).clamp(max=num_entries)
    return counts.view(num_known, num_heads)


def check_table(table: Sequence[Any], num_layers: int, num_heads: int) -> None:
    """Raise ValueError unless a static table fits a model's layers and (local) KV heads."""
    rows = [row if isinstance(row, tuple) else None for row in table]
    if len(rows) != num_layers:
        raise ValueError(f"the budget table has {len(rows)} layers, the model {num_layers}")
    if rows[0] is not None and len(rows[0]) != num_heads:
        raise ValueError(f"the budget table has {len(rows[0])} heads, the model {num_heads}")


def _shares(weights: Sequence[float], total: int) -> list[float]:
    scale = total / sum(weights)
    return [weight * scale for weight in weights]


def _guaranteed(share: float, mean_pages: int, page_size: int) -> int:
    # A head that is promised anything is promised at least one whole page.
    guaranteed = int(share * mean_pages * page_size)
    return max(1, guaranteed) if page_size == 1 else guaranteed


def _compete(
    groups: torch.Tensor,
    total_pages: torch.Tensor,
    page_size: int,
    guaranteed: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    """[G, R] pages for G groups of R rows [G, R, N] that compete for `total_pages` [G] of them."""
    num_groups, num_rows, num_entries = groups.shape
    if backend == "native":
        num_pages = ops.joint_page_counts(
            groups.flatten(0, 1)[None],
            torch.tensor([num_entries], dtype=torch.int32),
            total_pages[None].int(),
            guaranteed[None].int(),
            page_size,
            backend="native",
        )
        return num_pages.view(num_groups, num_rows).long()
    pages = []
    for scores, total, sure in zip(groups, total_pages.tolist(), guaranteed.tolist(), strict=True):
        counts = ops.joint_top_counts(scores, total * page_size, sure, backend)
        if page_size > 1:
            ideal = [count / page_size for count in counts.tolist()]
            counts = torch.tensor(apportion(ideal, total, 1, num_entries // page_size))
        pages.append(counts)
    return torch.stack(pages)
