"""The CUDA platform in a rig, on a GPU or without one.

Where there is no GPU the kernels run in Triton's interpreter (or the references stand in), plain
torch stands in for vLLM's compiled ops, and the device is a labelled part of the host's memory.
`plain_flash_attention` and `device_labels` tell more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from device_labels import device_under_test
from engine_rig import Rig, Tokens
from paged_pool import DEVICE, DTYPE
from plain_flash_attention import chosen_attention, use_plain_attention
from rig_side import Side
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends import fa_utils

from vllm_kvcompress.ops import PageOrder
from vllm_kvcompress.vllm_integration.platforms.cuda.attention import KVCompressCUDABackend
from vllm_kvcompress.vllm_integration.platforms.cuda.engine import CUDAEngine
from vllm_kvcompress.vllm_integration.worker.engine import EngineParts, WorkerEngine


class CUDASide(Side):
    """vLLM for a GPU.

    Args:
        backend: of the ops, 'triton' or 'reference'.
        flash_attn_version: skips the test where vLLM's ops are chosen and lack it.
        device: of the pool.
    """

    counts_memory = True

    def __init__(
        self,
        backend: str = "triton",
        flash_attn_version: int = 3,
        device: torch.device = DEVICE,
    ) -> None:
        super().__init__(backend, device, DTYPE, {"flash_attn_version": flash_attn_version})
        self.flash_attn_version = flash_attn_version

    @property
    def attention(self) -> type[AttentionBackend]:
        """Ours on vLLM's FlashAttention."""
        return KVCompressCUDABackend

    def prepare(self, patch: Any) -> None:
        """Plain torch in place of vLLM's ops where these are not chosen."""
        version = self.flash_attn_version
        if chosen_attention() == "torch":
            use_plain_attention(patch, version)
        elif not fa_utils.is_fa_version_supported(version):
            pytest.skip(f"vLLM has no FlashAttention {version} for this GPU")

    def make_engine(self, parts: EngineParts, order: PageOrder, impl: Any) -> WorkerEngine:
        """As in the GPU's worker."""
        assert order.is_plain
        return CUDAEngine(parts, self.backend, tells_lse=impl.tells_lse)

    def guard(self) -> AbstractContextManager[None]:
        """Without a GPU, ops that mix the device with the host raise."""
        return device_under_test(self.device)


class CapturedStep:
    """A step of single tokens whose layers run again and again: on a GPU a CUDA graph of them.

    Args:
        rig: whose layers.
        num_rows: of the step. There are no requests yet when vLLM captures one.

    Attributes:
        num_rows: tokens of the step, padding included.
    """

    def __init__(self, rig: Rig, num_rows: int) -> None:
        # What layers read of later steps lies at the same addresses.
        metadata = rig.metadata([], num_rows, is_step=False)
        assert metadata.step.plan.num_single == num_rows and not metadata.runs
        self.num_rows = num_rows
        self._inputs = [
            tuple(torch.zeros_like(x) for x in layer) for layer in rig.random_tokens(num_rows)
        ]
        self._outputs = [torch.zeros_like(query) for _, _, query in self._inputs]
        self._replay = captured(
            lambda: rig.run_layers(metadata, self._inputs, self._outputs), rig.side.device
        )

    def replay(self, metadata: Any, tokens: Sequence[Tokens]) -> list[torch.Tensor]:
        """Each layer's [T, H * g, d] output for the tokens of fewer rows, or as many.

        Args:
            metadata: of their step, which has single tokens only.
            tokens: layer by layer.
        """
        assert not metadata.runs
        for inputs, output, new in zip(self._inputs, self._outputs, tokens, strict=True):
            output.fill_(torch.nan)
            for own, values in zip(inputs, new, strict=True):
                # Nobody may look at the padding.
                own.fill_(torch.nan)
                own[: len(values)] = values
        self._replay()
        return [output.clone() for output in self._outputs]


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """What does the same again: a replayed CUDA graph; without a GPU, the call itself."""
    if device.type != "cuda":
        return run
    # Kernels are compiled outside of the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
