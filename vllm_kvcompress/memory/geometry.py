"""Block-table geometry of a request: a pure function of its prompt length, what is kept, and when.

A request's block-table row is, in order::

    [full prompt blocks] [region blocks] [tail blocks]
     0 .. boundary_block   num_region_blocks

Before compaction the region is absent and the row is exactly stock vLLM's. The step that
computes the last token before the compaction point (the prompt's end, unless the option
suffix_tokens moves it) also gets the region blocks; it copies what is kept there and the
prompt blocks before `first_kept_block` go back to the pool once that step has settled.
Scheduler and worker derive every number below separately and never talk about it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from vllm_kvcompress.memory.retention import Retention, Schedule
from vllm_kvcompress.memory.row_layout import CompactionPoint, RowLayout


def cdiv(a: int, b: int) -> int:
    """`a / b` rounded up, for `b` > 0."""
    return -(-a // b)


@dataclass(frozen=True)
class RequestGeometry:
    """Geometry of one request.

    Attributes:
        prompt_len: tokens in the prompt.
        block_size: tokens per block (= per page).
        first_kept_block: blocks before this one are compressed (0 when nothing is);
            from it on every prompt token stays in dense blocks. Equals the number of candidate
            pages per KV head.
        num_region_blocks: blocks of the compressed region; 0 = this request stays whole.
        compact_len: tokens [0, compact_len) are compacted once they are all computed; the
            rest of the prompt is computed after that, over what was kept.
    """

    prompt_len: int
    block_size: int
    first_kept_block: int
    num_region_blocks: int
    compact_len: int

    @property
    def is_compressed(self) -> bool:
        """Whether this request's prompt is compacted."""
        return self.num_region_blocks > 0

    @property
    def boundary_block(self) -> int:
        """Row index of the first region block: the full blocks up to compaction precede it."""
        return self.compact_len // self.block_size

    @property
    def num_candidate_tokens(self) -> int:
        """Prompt tokens per KV head that compete for the region."""
        return self.first_kept_block * self.block_size

    @property
    def num_dense_prompt_tokens(self) -> int:
        """Prompt tokens kept in ordinary blocks: the window, rounded out to a block, and
        what follows the compaction point."""
        return self.prompt_len - self.num_candidate_tokens

    @property
    def num_tail_tokens(self) -> int:
        """Tokens before the compaction point that stay in ordinary blocks."""
        return self.compact_len - self.num_candidate_tokens

    @property
    def num_kept_tokens(self) -> int:
        """Prompt tokens kept per KV head and layer on average."""
        return self.num_region_blocks * self.block_size + self.num_dense_prompt_tokens

    def num_row_blocks(self, num_tokens: int) -> int:
        """Length of the block-table row that gives `num_tokens` tokens a slot."""
        blocks = cdiv(num_tokens, self.block_size)
        if self.is_compressed and num_tokens >= self.region_from_tokens:
            blocks += self.num_region_blocks
        return blocks

    @property
    def region_from_tokens(self) -> int:
        """Tokens from which on the row of a compressed request has its region."""
        # The row grows strictly in order, so the region must be there before the first
        # tail block is, and at the latest in the step that ends at the compaction point.
        return min(self.compact_len, self.boundary_block * self.block_size + 1)

    @property
    def point(self) -> CompactionPoint:
        """Its compaction; ask only if there is one."""
        assert self.is_compressed, f"a prompt of {self.prompt_len} tokens stays whole"
        return CompactionPoint(self.boundary_block, self.num_region_blocks, self.first_kept_block)

    @property
    def layout(self) -> RowLayout:
        """Columns of its row once it has its region."""
        return RowLayout((self.point,) if self.is_compressed else ())


class Geometry:
    """Geometry of every request with the same retention, schedule and block size.

    Args:
        retention: what is kept.
        schedule: when a request is compacted.
        block_size: tokens per block.

    Raises:
        ValueError: if the budget cannot hold what is always kept and one page.
    """

    def __init__(self, retention: Retention, schedule: Schedule, block_size: int) -> None:
        problem = retention.problem(block_size)
        if problem is not None:
            raise ValueError(problem)
        self.retention, self.schedule, self.block_size = retention, schedule, block_size
        self.of = functools.lru_cache(maxsize=4096)(self._of)
        self.max_region_blocks = functools.lru_cache(maxsize=4096)(self._max_region_blocks)

    def of_request(self, prompt_len: int, is_whole: bool) -> RequestGeometry:
        """Geometry of a request; if it `is_whole` it stays so however long its prompt is."""
        return self._whole(prompt_len) if is_whole else self.of(prompt_len)

    def _whole(self, prompt_len: int) -> RequestGeometry:
        return RequestGeometry(prompt_len, self.block_size, 0, 0, prompt_len)

    def _of(self, prompt_len: int) -> RequestGeometry:
        whole, retention = self._whole(prompt_len), self.retention
        points = self.schedule.points(prompt_len)
        if not points:
            return whole
        # A geometry has one region.
        (compact_len,) = points
        kept_tokens = retention.num_tokens(compact_len)
        if compact_len <= retention.window or kept_tokens >= compact_len:
            return whole
        first_kept_block = (compact_len - retention.recent_tokens) // self.block_size
        tail_tokens = compact_len - first_kept_block * self.block_size
        num_region_blocks = retention.num_region_blocks(kept_tokens - tail_tokens, self.block_size)
        if num_region_blocks >= first_kept_block:
            return whole
        return RequestGeometry(
            prompt_len, self.block_size, first_kept_block, num_region_blocks, compact_len
        )

    def _max_region_blocks(self, max_len: int) -> int:
        # Most region blocks that any prompt of at most `max_len` tokens takes. The region grows
        # with the prompt but for rounding, whose period is one block.
        first = max(1, max_len - 2 * self.block_size - self.retention.window)
        return max(self._of(n).num_region_blocks for n in range(first, max_len + 1))

    def max_request_blocks(self, max_model_len: int) -> int:
        """Most blocks that one request of at most `max_model_len` tokens holds at once."""
        return cdiv(max_model_len, self.block_size) + self.max_region_blocks(max_model_len)


@functools.lru_cache(maxsize=256)
def shared_geometry(retention: Retention, schedule: Schedule, block_size: int) -> Geometry:
    """The geometry of these three, the same object whoever asks.

    Raises:
        ValueError: as `Geometry`.
    """
    return Geometry(retention, schedule, block_size)
