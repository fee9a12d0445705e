"""What the random block-manager machine plays with: set-ups, sequences, chunks, prompts."""

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies import scorer_class
from vllm_kvcompress.vllm_integration.scheduler.spec import KVCompressSpec

# A token id no family of prompts uses; ids from here on are handed out once.
FIRST_UNIQUE_TOKEN = 10_000_000


@dataclass(frozen=True)
class Setup:
    """One engine configuration.

    Attributes:
        num_spare_blocks: usable blocks of the pool beyond what the largest request needs.
        depth: steps that may be in flight while the next one is scheduled; 0 = sync.
        full_sequence_must_fit: vLLM's `scheduler_reserve_full_isl`.
        retention: vLLM's `prefix_cache_retention_interval`.
        suffix: prompt tokens after the compaction point.
        one_shot_tokens: of the spec; 0 = every prompt gets dense blocks.
        one_shot: the option.
    """

    block_size: int = 16
    window: int = 16
    budget: int | None = None
    ratio: float | None = None
    max_model_len: int = 256
    num_spare_blocks: int = 8
    caching: bool = True
    depth: int = 0
    full_sequence_must_fit: bool = True
    watermark: float = 0.0
    retention: int | None = 0
    suffix: int = 0
    one_shot_tokens: int = 0
    one_shot: str = "auto"
    method: str = "snapkv"

    @property
    def needs_all_queries(self) -> bool:
        return "all_queries" in scorer_class(self.config().recipe.scorer).needs

    def config(self) -> KVCompressConfig:
        return KVCompressConfig(
            method=self.method,
            budget=self.budget,
            ratio=self.ratio,
            window=self.window,
            options=(("one_shot", self.one_shot), ("suffix_tokens", self.suffix)),
        )

    def spec(self) -> KVCompressSpec:
        stock = FullAttentionSpec(
            block_size=self.block_size, num_kv_heads=1, head_size=8, dtype=torch.float32
        )
        return KVCompressSpec.from_full_attention(stock, self.config(), self.one_shot_tokens)


@dataclass(eq=False)
class Sequence:
    """A request and what the simulated worker knows of it.

    Attributes:
        tokens: prompt and every sampled token, those still in flight included.
        labels: what slot of position p holds, one per token (see `Machine.relabel`).
        row: the worker's block-table row; it keeps the ids of blocks nulled later.
        num_slots: tokens that have a slot, all of them written.
        finish_step: step that reached the compaction point, None before.
        is_compacted: the manager has been told that `finish_step` has settled.
        has_region: the region has been written.
        is_one_shot: the blocks it evicts were never there.
    """

    request: Request
    family: int | None
    tokens: list[int]
    labels: list[Any] = field(default_factory=list)
    exact_labels: list[Any] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    num_slots: int = 0
    finish_step: int | None = None
    is_compacted: bool = False
    has_region: bool = False
    is_one_shot: bool = False

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def prompt_len(self) -> int:
        return self.request.num_prompt_tokens


@dataclass
class Chunk:
    """Tokens [start, end) of a sequence in one step; `sampled` is its output, if any."""

    sequence: Sequence
    start: int
    end: int
    sampled: int | None = None


def family_token(family: int, position: int) -> int:
    return family * 10_000 + position


def prompt_of(family: int, length: int) -> list[int]:
    return [family_token(family, position) for position in range(length)]
