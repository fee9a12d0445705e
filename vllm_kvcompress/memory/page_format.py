"""What one page of one KV head is made of, and how large that makes it."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of one element, by the name that torch gives its type.
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes that a token has in a page for scales of its key and value, by their kind.
SCALE_BYTES = {"none": 0}
# Token after token, its key before its value. Every other order has the name that its maker gives.
PLAIN = "plain"


@dataclass(frozen=True)
class PageFormat:
    """One page: keys and values of `num_tokens` tokens of one layer and KV head.

    Attributes:
        dtype: element type, a key of `ELEMENT_BYTES`.
        num_tokens: tokens per page (= per block).
        head_size: elements of a key, and of a value.
        scales: what the elements are to be multiplied with, a key of `SCALE_BYTES`.
        order: name of the elements' order; `PLAIN`, or on a CPU the instruction set of vLLM's
            kernel.

    Raises:
        ValueError: if a name is unknown or a size is below 1.
    """

    dtype: str
    num_tokens: int
    head_size: int
    scales: str = "none"
    order: str = PLAIN

    def __post_init__(self) -> None:
        for name, known in ((self.dtype, ELEMENT_BYTES), (self.scales, SCALE_BYTES)):
            if name not in known:
                raise ValueError(f"pages of {', '.join(known)} are known, not of {name!r}")
        if min(self.num_tokens, self.head_size) < 1:
            raise ValueError(f"an empty page: {self}")

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def num_elements(self) -> int:
        """Elements of a page's keys and values."""
        return 2 * self.num_tokens * self.head_size

    @property
    def num_bytes(self) -> int:
        """Bytes of a page, its scales included."""
        return self.num_elements * self.element_bytes + self.num_tokens * SCALE_BYTES[self.scales]
