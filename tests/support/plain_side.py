"""The platform of tests in a rig: attention in plain torch, see `plain_platform`."""

from __future__ import annotations

from typing import Any

import torch
from plain_platform.attention import PlainBackend
from plain_platform.engine import PlainEngine
from rig_side import Side
from vllm.v1.attention.backend import AttentionBackend

from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.vllm_integration.worker.engine import EngineParts, WorkerEngine


class PlainSide(Side):
    """Everything by torch."""

    def __init__(self) -> None:
        super().__init__("torch", torch.device("cpu"))

    @property
    def attention(self) -> type[AttentionBackend]:
        """The plain one."""
        return PlainBackend

    def make_engine(self, parts: EngineParts, order: PageOrder, impl: Any) -> WorkerEngine:
        """As in the plain worker."""
        assert order.is_plain
        return PlainEngine(parts)
