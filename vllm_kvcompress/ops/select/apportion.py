"""Whole shares of a sum, on the host."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_kvcompress.ops.checks import check


def apportion(ideal: Sequence[float], total: int, lower: int, upper: int) -> list[int]:
    """Whole numbers close to `ideal` that sum to `total`, by largest remainder. On the host.

    Args:
        ideal: wished shares; their sum should be near `total`.
        total: exact sum of the result.
        lower, upper: inclusive bounds of every share.

    Returns:
        One share per entry; equal remainders go to the earlier entry.

    Raises:
        ValueError: if the bounds cannot hold `total`.
    """
    size = len(ideal)
    check(
        size * lower <= total <= size * upper,
        f"cannot share {total} pages among {size} places of {lower} to {upper} pages each",
    )
    shares = [min(max(int(x), lower), upper) for x in ideal]
    missing = total - sum(shares)
    step = 1 if missing > 0 else -1
    for _ in range(abs(missing)):
        open_places = [
            i for i in range(size) if (shares[i] < upper if step > 0 else shares[i] > lower)
        ]
        best = max(open_places, key=lambda i: (step * (ideal[i] - shares[i]), -i))
        shares[best] += step
    return shares
