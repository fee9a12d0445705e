"""Attention shapes named in configs/kernel_shapes.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

CONFIG = Path(__file__).parents[2] / "configs" / "kernel_shapes.toml"


@dataclass(frozen=True)
class ModelShape:
    """What a model's attention looks like on one GPU; see the comments of the file."""

    name: str
    num_layers: int
    num_kv_heads: int
    group: int
    head_size: int
    dtype: torch.dtype
    pool_dtype: torch.dtype
    block_size: int = 16
    num_parameters: int = 0

    @property
    def is_model(self) -> bool:
        """Whether there is such a model; the others are what the kernels must also take."""
        return self.num_parameters > 0

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.num_kv_heads * self.group

    @property
    def num_streams(self) -> int:
        """Layers times KV heads."""
        return self.num_layers * self.num_kv_heads

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one KV head of one layer."""
        return 2 * self.head_size * self.pool_dtype.itemsize


def read_shapes(path: Path = CONFIG) -> dict[str, ModelShape]:
    """All shapes of the file by name."""
    shapes = {}
    for name, entry in tomllib.loads(path.read_text(encoding="utf-8")).items():
        dtype = getattr(torch, entry.pop("dtype", "bfloat16"))
        pool_dtype = getattr(torch, entry.pop("pool_dtype", "bfloat16"))
        shapes[name] = ModelShape(name, dtype=dtype, pool_dtype=pool_dtype, **entry)
    return shapes


# A model that the interpreter is quick with.
DRY_SHAPE = ModelShape(
    "dry run", 2, 1, 2, 64, torch.bfloat16, torch.bfloat16, num_parameters=1_000_000
)
