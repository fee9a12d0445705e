"""How near a result must come to float64, and attention in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Attention of [..., g, d] queries over [..., n, d] keys and values.

    In float64 it is the judge. In another type products are summed in float32, weights and result
    are rounded to `dtype`, as the kernel does it.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = query.to(wide) @ key.to(wide).mT * scale
    weights = logits.softmax(dim=-1).to(dtype)
    return (weights.to(wide) @ value.to(wide)).to(dtype)


@dataclass
class Verdict:
    """What comparisons of one case came to.

    Attributes:
        max_error: greatest error, and
        bound: what was allowed there, of the comparison that came nearest to its bound.
        worst: which one that was.
        faults: what else is wrong, in words.
        facts: more fields of the case's row.
    """

    max_error: float = 0.0
    bound: float = 0.0
    worst: str = ""
    num_compared: int = 0
    faults: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether all is as it should be, and anything was looked at."""
        return not self.faults and self.num_compared > 0 and self.max_error <= self.bound

    def expect(self, is_so: bool, fault: str) -> None:
        """Note a fault unless `is_so`."""
        self.num_compared += 1
        if not is_so:
            self.faults.append(fault)

    def expect_equal(self, got: torch.Tensor, want: torch.Tensor, what: str) -> None:
        """Note a fault unless both have the same bits."""
        same_kind = got.shape == want.shape and got.dtype == want.dtype
        is_equal = same_kind and bool(torch.equal(_bits(got), _bits(want)))
        self.expect(is_equal, f"{what}: not equal to the bit")

    def compare(
        self,
        got: torch.Tensor,
        want: torch.Tensor,
        same_dtype: torch.Tensor,
        dtype: torch.dtype,
        ulps: float,
        what: str,
    ) -> None:
        """Expect at most twice the error of the same type, and `ulps` roundings of the largest.

        NaN and Inf are looked for first. A greater error is seen in `ok`.

        Args:
            got, want, same_dtype: of one shape; `want` is float64.
            dtype: whose roundings are meant.
            ulps: how many of them are allowed on top.
            what: names the comparison.
        """
        if not bool(torch.equal(got.isfinite(), want.isfinite())):
            self.expect(False, f"{what}: Inf or NaN in other places")
            return
        self.num_compared += 1
        got, same_dtype = got.double(), same_dtype.double()
        error = float((got - want).abs().max())
        floor = ulps * torch.finfo(dtype).eps * float(want.abs().max())
        bound = 2 * float((same_dtype - want).abs().max()) + floor
        # By cross products: bounds may be 0.
        if not self.worst or error * self.bound > self.max_error * bound:
            self.max_error, self.bound, self.worst = error, bound, what
        if error > bound:
            self.faults.append(f"{what}: error {error:.3g}, allowed {bound:.3g}")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
