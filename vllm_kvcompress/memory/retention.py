"""What of a request is kept, and when that is decided: data that its geometry follows from.

Neither says anything of an engine, so that every request may have its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """How many tokens before a compaction point are kept. Either a budget or a ratio is given.

    Attributes:
        window: tokens before the point whose queries score the others.
        recent_tokens: tokens before the point that are kept in any case; at most `window`.
        budget: tokens kept per KV head and layer on average, the recent ones included.
        ratio: fraction of the tokens to remove, in [0, 1).

    Raises:
        ValueError: unless just one of budget and ratio is given.
    """

    window: int
    recent_tokens: int
    budget: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.ratio is None):
            raise ValueError(f"give a budget ({self.budget}) or a ratio ({self.ratio}), not both")

    def num_tokens(self, compact_len: int) -> int:
        """Tokens asked to be kept of `compact_len`, per KV head and layer, recent ones included."""
        if self.ratio is not None:
            return compact_len - int(self.ratio * compact_len)
        assert self.budget is not None
        return self.budget

    def num_region_blocks(self, num_tokens: int, block_size: int) -> int:
        """Blocks of a region that is asked to hold `num_tokens` per KV head; at least one.

        A budget is never exceeded, except that every head keeps at least one page. A ratio is met
        on average over prompts: rounded down, it would evict half a page more than asked.
        """
        rounding = 0 if self.ratio is None else block_size // 2
        return max(1, (num_tokens + rounding) // block_size)

    def problem(self, block_size: int) -> str | None:
        """Why no region of such blocks can be made; None if one can."""
        smallest = self.recent_tokens + block_size
        if self.budget is None or self.budget >= smallest:
            return None
        return (
            f"KV-compression budget {self.budget} is smaller than the tokens always kept plus "
            f"one page ({self.recent_tokens} + {block_size} = {smallest} tokens); give "
            f"{smallest} or more"
        )


@dataclass(frozen=True)
class Schedule:
    """The token counts at which a request is compacted, as a function of its prompt's length.

    Attributes:
        suffix_tokens: tokens of the prompt that are computed after its compaction.
    """

    suffix_tokens: int = 0

    def points(self, prompt_len: int) -> tuple[int, ...]:
        """Token counts in ascending order; none if there is nothing before the suffix."""
        compact_len = prompt_len - self.suffix_tokens
        return (compact_len,) if compact_len > 0 else ()
