"""How scores are made of a window's queries and of pages."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kvcompress.ops.checks import check

WINDOW_REDUCTIONS = ("mean", "sum", "max", "defensive")
GROUP_REDUCTIONS = ("mean", "sum", "max")
POOL_KINDS = ("max", "avg")
MAX_POOL_KERNEL = 31


@dataclass(frozen=True)
class WindowPlan:
    """How ops that read pages make a scorer's scores, in place of its `score`.

    First the window's queries are joined, then, in this order: pooling along the rated tokens and
    joining the group (or the other way round), not below the head's mean, times each head's share
    of the values' effect, maximum over `span_kernel` tokens.

    Attributes:
        reduce: 'mean', 'sum' or 'max' join the window's queries, per query head. 'defensive'
            (DefensiveKV, arXiv 2510.13334, algorithm 1) pools each query's weights by a mean over
            `mean_kernel` rated keys, brings them back to their old sum and takes the maximum over
            the window (and over query heads).
        power: exponent of the weights before they are joined, 1 or 2; 1 for 'defensive'.
        near_tokens: keys up to a query's own that count as 0 for it.
        mean_kernel: odd width; 'defensive' only.
        rates_window: whether tokens of the window are rated too; else only those before it.
        group_reduce: 'mean', 'sum' or 'max' over a KV head's query heads.
        pool_kernel: odd width, stride 1, same length; 1 = none.
        pool_kind: 'max' or 'avg' (tokens outside count as 0).
        pool_first: pool each query head, then join them.
        floor_at_mean: raise each head's scores to their mean over the rated tokens.
        span_kernel: odd width of the last pooling; 1 = none.
        uses_value_effect: whether scores are weighed by what values do (need 'output_root').
    """

    reduce: str = "mean"
    power: int = 1
    near_tokens: int = 0
    mean_kernel: int = 5
    rates_window: bool = False
    group_reduce: str = "mean"
    pool_kernel: int = 1
    pool_kind: str = "max"
    pool_first: bool = True
    floor_at_mean: bool = False
    span_kernel: int = 1
    uses_value_effect: bool = False

    def num_rated(self, num_tokens: int, num_candidates: int, window: int) -> int:
        """Tokens that window_scores rates, of a prompt of num_tokens."""
        before_window = num_tokens - window
        return max(num_candidates, before_window) if self.rates_window else before_window

    @property
    def fits_ops(self) -> bool:
        """Whether the ops take its numbers; `Scorer.score` takes any."""
        return max(self.mean_kernel, self.pool_kernel, self.span_kernel) <= MAX_POOL_KERNEL

    def check_window(self) -> None:
        """Raise ValueError unless `window_scores` takes it."""
        check(self.reduce in WINDOW_REDUCTIONS, f"unknown window reduction {self.reduce!r}")
        check(
            self.power == 1 or (self.power == 2 and self.reduce != "defensive"),
            f"power {self.power} does not go with {self.reduce!r}",
        )
        _check_kernel(self.mean_kernel)
        check(self.near_tokens >= 0, f"near_tokens must not be negative, got {self.near_tokens}")

    def check_join(self) -> None:
        """Raise ValueError unless `join_scores` takes it."""
        check(
            self.group_reduce in GROUP_REDUCTIONS, f"unknown group reduction {self.group_reduce!r}"
        )
        check(
            self.pool_kind in POOL_KINDS,
            f"pool kind must be 'max' or 'avg', got {self.pool_kind!r}",
        )
        for kernel in (self.pool_kernel, self.span_kernel):
            _check_kernel(kernel)


def _check_kernel(kernel: int) -> None:
    check(
        1 <= kernel <= MAX_POOL_KERNEL and kernel % 2 == 1,
        f"a pool kernel must be odd, 1 to {MAX_POOL_KERNEL}, got {kernel}",
    )
