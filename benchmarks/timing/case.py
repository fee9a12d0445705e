"""One thing to time, and what all of them are built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gpu.recording import record
from gpu.shapes import ModelShape

Call = Callable[[], Any]


@dataclass
class Case:
    """One thing to time.

    Attributes:
        name: of the op.
        label: what it is asked for.
        run: one call: what a step, or a compaction, does in all its layers.
        num_bytes: that any implementation must move in a call.
        num_layers: whose work a call does; 1 where a call is not made of equal layers.
        peers: other ways to do the same with the case's tensors, by name.
        later: other ways that have tensors of their own, as large as `num_bytes`; built when the
            case is gone.
        extra: more fields of the row.
    """

    name: str
    label: str
    run: Call
    num_bytes: int
    num_layers: int = 1
    peers: dict[str, Call] = field(default_factory=dict)
    later: dict[str, Call] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def of_peers(self) -> Case:
        """The same without what keeps its own tensors alive."""
        return replace(self, run=_gone, peers={})


def _gone() -> None:
    raise AssertionError("this case's tensors are gone")


def prepare(run: Call, device: torch.device) -> Any:
    """What a call returns; on the meta device without running its kernels."""
    if device.type != "meta":
        return run()
    returned: list[Any] = []
    record(lambda: returned.append(run()))
    return returned[0]


def normal(*size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers; of 8-bit types too, which torch draws none of."""
    drawn_as = torch.bfloat16 if dtype.itemsize == 1 else dtype
    return torch.randn(*size, device=device, dtype=drawn_as).to(dtype)


def new_pool(shape: ModelShape, num_blocks: int, device: torch.device) -> torch.Tensor:
    """[blocks * S, b, 2 d], as large as so many of vLLM's blocks."""
    size = (num_blocks * shape.num_streams, shape.block_size, 2 * shape.head_size)
    return normal(*size, device=device, dtype=shape.pool_dtype)


def shuffled_table(num_rows: int, width: int, device: torch.device) -> torch.Tensor:
    """[rows, width] int32, all blocks of the pool in some order."""
    order = torch.randperm(num_rows * width, generator=torch.Generator().manual_seed(0))
    return order.view(num_rows, width).to(torch.int32).to(device)
