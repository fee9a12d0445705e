"""The KV-cache spec that carries our setting from the workers to the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import Geometry, PageFormat


@dataclass(frozen=True, kw_only=True)
class KVCompressSpec(FullAttentionSpec):
    """A full-attention layer whose prompts are compressed at the end of prefill.

    Attributes:
        kv_compress: the setting.
        one_shot_tokens: tokens of one request that the scheduler can always fit into a step in
            which no other prompt is computed; up to there a prompt may be computed in one shot,
            without blocks for what is evicted. 0 = never.
        is_buffer_counted: whether such prompts share a buffer of fixed size, which not all may use
            (see `memory.one_shot`).
    """

    kv_compress: KVCompressConfig
    one_shot_tokens: int = 0
    is_buffer_counted: bool = False

    @classmethod
    def from_full_attention(
        cls,
        spec: FullAttentionSpec,
        config: KVCompressConfig,
        one_shot_tokens: int = 0,
        is_buffer_counted: bool = False,
    ) -> KVCompressSpec:
        """The same layer with compression on."""
        values = {f.name: getattr(spec, f.name) for f in fields(spec) if f.init}
        return cls(
            **values,
            kv_compress=config,
            one_shot_tokens=one_shot_tokens,
            is_buffer_counted=is_buffer_counted,
        )

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Join equal specs; vLLM's own merge does not know the extra field."""
        first = specs[0]
        if any(spec != first for spec in specs[1:]):
            raise ValueError(f"compressed layers of one group differ: {set(specs)}")
        return first

    @property
    def geometry(self) -> Geometry:
        """Geometry of requests under this spec."""
        return self.kv_compress.geometry(self.block_size)

    def page_format(self, order: str) -> PageFormat:
        """What one page of one KV head is, its elements' order having this name."""
        dtype = str(self.dtype).removeprefix("torch.")
        return PageFormat(dtype, self.block_size, self.head_size, order=order)

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Width of the worker's block-table row: freed entries keep their place in it."""
        return self.geometry.max_request_blocks(max_len)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of one layer that the largest single request can hold at once."""
        max_len = vllm_config.model_config.max_model_len
        return self.geometry.max_request_blocks(max_len) * self.page_size_bytes
