"""What differs between platforms in the tests of engines: a rig has one `Side`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend

from vllm_kvcompress.memory import CacheShape
from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.vllm_integration.worker.engine import EngineParts, WorkerEngine


class Side:
    """One platform, as its worker would put it together; `engine_rig.Rig` does all the rest.

    The rig makes layers and metadata builder by the constructors of vLLM's classes, through
    `attention`. It then asks for the page order and the engine, and binds the builder to it. A new
    platform says which classes are its own. Only `prepare` may skip a test.

    Attributes:
        backend: of the ops that score, select and move.
        device: of the pool and of a step's tensors.
        dtype: of keys, values and queries where a test does not ask for another.
        tolerances: of outputs against attention in float64, absolute and relative. The two smaller
            types round the output and the weights.
        attention_config: entries of vLLM's `AttentionConfig` that are not its defaults.
        counts_memory: as the platform's.
    """

    counts_memory = False

    tolerances: ClassVar[dict[torch.dtype, float]] = {
        torch.float32: 2e-5,
        torch.bfloat16: 2e-2,
        torch.float16: 4e-3,
    }

    def __init__(
        self,
        backend: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        attention_config: dict[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        self.device = device
        self.dtype = dtype
        self.attention_config = attention_config or {}

    @property
    def attention(self) -> type[AttentionBackend]:
        """The attention backend under test: it names the classes of impl and builder."""
        raise NotImplementedError

    def make_engine(self, parts: EngineParts, order: PageOrder, impl: Any) -> WorkerEngine:
        """The engine of this platform's worker.

        Args:
            parts: that every engine is made of.
            order: of `page_order`.
            impl: of the first layer; the others' are alike.
        """
        raise NotImplementedError

    def page_order(self, layer: Attention, shape: CacheShape, dtype: torch.dtype) -> PageOrder:
        """How elements lie in a page, once builder and layers are made. Plain by default."""
        return PageOrder.plain(shape.block_size, shape.head_size)

    def prepare(self, patch: Any) -> None:
        """Put stand-ins in place before anything is made, or skip the test and say why.

        Args:
            patch: a pytest MonkeyPatch, which undoes it.
        """

    def guard(self) -> AbstractContextManager[None]:
        """Around a test: inside, what this device would forgive raises, if there is a way."""
        return nullcontext()
