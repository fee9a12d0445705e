"""95 % intervals of means."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import sqrt
from statistics import fmean

_Z = 1.959964
_RESAMPLES = 2000


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's interval of a proportion.

    Raises:
        ValueError: unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"no proportion: {successes} of {n}")
    share = successes / n
    centre = share + _Z**2 / (2 * n)
    spread = _Z * sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    low, high = (centre - spread) / scale, (centre + spread) / scale
    # Rounding must not put the share itself outside.
    return min(share, max(0.0, low)), max(share, min(1.0, high))


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the mean, the same for the same values.

    Raises:
        ValueError: on no values.
    """
    return mean_of_means([values], seed)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Wilson's interval for zeros and ones, else the bootstrap's."""
    if all(value in (0, 1) for value in values):
        return wilson(int(sum(values)), len(values))
    return bootstrap(values)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Interval of the mean difference `first - second` over the same samples.

    Raises:
        ValueError: if the lengths differ.
    """
    return bootstrap([a - b for a, b in zip(first, second, strict=True)])


def mean_of_means(groups: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the mean of the groups' means, resampled inside each group.

    Raises:
        ValueError: on no groups, or an empty one.
    """
    if not groups or not all(groups):
        raise ValueError("no values to take an interval of")
    rng = random.Random(seed)
    means = sorted(
        fmean(fmean(rng.choices(values, k=len(values))) for values in groups)
        for _ in range(_RESAMPLES)
    )
    return means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1]
