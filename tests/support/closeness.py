"""How near a kernel must come to the float64 reference."""

from __future__ import annotations

import torch

# Largest rounding of a number near 1, per type.
_EPS = {t: torch.finfo(t).eps for t in (torch.float32, torch.float16, torch.bfloat16)}


def assert_close(
    got: torch.Tensor,
    want: torch.Tensor,
    same_dtype: torch.Tensor,
    dtype: torch.dtype,
    ulps: float = 2,
) -> None:
    """At most twice the error that torch makes in the same type, and some roundings.

    Args:
        got: the kernel's result.
        want: the reference, float64 or as stored from it.
        same_dtype: torch's result with inputs and products in `dtype`.
        dtype: whose roundings are allowed on top.
        ulps: how many of them, of the largest number.
    """
    got, want, same_dtype = (x.double() for x in (got, want, same_dtype))
    assert torch.equal(got.isfinite(), want.isfinite()), "Inf or NaN in other places"
    assert torch.equal(got[~got.isfinite()].nan_to_num(), want[~want.isfinite()].nan_to_num())
    finite = want.isfinite()
    if not finite.any():
        return
    error = (got - want)[finite].abs().max().item()
    allowed = 2 * (same_dtype - want)[finite].abs().max().item()
    floor = ulps * _EPS[dtype] * want[finite].abs().max().item()
    assert error <= allowed + floor, f"error {error:.3g}, allowed {allowed:.3g} + {floor:.3g}"
