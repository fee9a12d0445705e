"""Memory that scores take, and how many prompts and layers are scored at once for it.

Three things lie beside the pool: scores of what is chosen from (pages or tokens), of all layers;
scores of tokens and what they are made of, of the layers that are scored together; and the windows
that are kept until these are. The last two have limits, up to which more is done at once. The first
has none in a step: all prompts that end in it have theirs until its last layer. But they are a part
of what the prompts' blocks take, which is set aside (`entry_share`).
"""

from __future__ import annotations

from vllm_kvcompress import ops
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import CacheShape, RequestGeometry, cdiv
from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.base import WindowPlan
from vllm_kvcompress.policies.entries import entries_per_page

# Of a batch's prompts, for each of the two kinds of scores; a single prompt may take more.
MOST_SCORE_BYTES = 256 * 2**20
# Of all prompts that end in a step.
MOST_WINDOW_BYTES = 64 * 2**20


class ScoreMemory:
    """Bytes that scores of prompts take.

    Args:
        config: validated setting.
        shape: of the paged cache.
        plan: how fused ops make the scores; None = torch makes them, which is not counted.
    """

    def __init__(
        self, config: KVCompressConfig, shape: CacheShape, plan: WindowPlan | None
    ) -> None:
        self._config, self._shape, self._plan = config, shape, plan
        num_heads = shape.num_kv_heads * shape.num_queries_per_kv
        # Queries have the type of keys and values.
        query_bytes = shape.head_size * shape.page.element_bytes
        self._window_bytes = config.window * num_heads * (query_bytes + 4)

    def entry_bytes(self, geometry: RequestGeometry) -> int:
        """Of one kind of a prompt's scores, in a batch of prompts as long."""
        per_page = entries_per_page(self._config, self._shape.block_size)
        num_entries = geometry.first_kept_block * per_page
        return 4 * self._shape.pages_per_block * ops.score_width(num_entries)

    def token_bytes(self, geometry: RequestGeometry) -> int:
        """Of one layer of a prompt, in a batch of prompts as long; 0 without a plan."""
        plan, shape = self._plan, self._shape
        if plan is None:
            return 0
        num_rated = plan.num_rated(
            geometry.compact_len, geometry.num_candidate_tokens, self._config.window
        )
        return shape.num_kv_heads * ops.token_score_bytes(
            plan, num_rated, window=self._config.window, group=shape.num_queries_per_kv
        )

    def prompt_bytes(self, geometry: RequestGeometry) -> int:
        """The larger of a prompt's two kinds of scores, if layers are scored one by one."""
        return max(self.entry_bytes(geometry), self.token_bytes(geometry))

    def entry_share(self) -> float:
        """What scores of all that is chosen from take, as a part of the blocks that hold it.

        With what is made of them: the entries that are chosen, and where there are two kinds of
        scores the second, which is raised and has places of its own.
        """
        per_page = entries_per_page(self._config, self._shape.block_size)
        num_kinds = 5 if self._config.num_scores == 2 else 2
        return 4 * num_kinds * per_page / self._shape.page.num_bytes

    def layers_at_once(self, longest: RequestGeometry, num_prompts: int, num_kept: int) -> int:
        """Layers of a batch that are scored together, in groups of about the same size.

        Args:
            longest: prompt of the batch.
            num_prompts: of the batch.
            num_kept: prompts whose windows are kept at the same time, those of the batch included.
        """
        num_layers = self._shape.num_layers
        most = min(
            MOST_SCORE_BYTES // max(1, num_prompts * self.token_bytes(longest)),
            MOST_WINDOW_BYTES // (num_kept * self._window_bytes),
        )
        num_groups = cdiv(num_layers, min(max(most, 1), num_layers))
        return cdiv(num_layers, num_groups)

    def staged_entry_bytes(self, num_tokens: int) -> int:
        """Of prompts without blocks for what they evict, so many tokens together."""
        shape = self._shape
        return int(self.entry_share() * shape.block_bytes) * cdiv(num_tokens, shape.block_size)

    def most_bytes(self, max_len: int, max_prompts: int) -> int:
        """Most that prompts with blocks take together, whatever they are.

        Args:
            max_len: tokens of the longest prompt.
            max_prompts: that end in one step.
        """
        geometry = self._config.geometry(self._shape.block_size).of(max_len)
        if not geometry.is_compressed:
            return 0
        num_layers = self._shape.num_layers
        entries = self.entry_bytes(geometry)
        # A batch's rows are as wide as its longest prompt's.
        most = max(entries, min(MOST_SCORE_BYTES, max_prompts * entries))
        if self._plan is None:
            return most
        tokens = self.token_bytes(geometry)
        most += max(tokens, min(MOST_SCORE_BYTES, max_prompts * num_layers * tokens))
        windows = max_prompts * self._window_bytes
        most += max(windows, min(MOST_WINDOW_BYTES, num_layers * windows))
        # Of a prompt whose window is cut by the end of a step.
        return most + num_layers * self._window_bytes


def score_memory_of(config: KVCompressConfig, shape: CacheShape) -> ScoreMemory:
    """That of a setting."""
    return ScoreMemory(config, shape, make_scorer(config).window_plan())
