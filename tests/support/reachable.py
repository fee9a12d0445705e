"""Which tensors an object keeps alive."""

from __future__ import annotations

import gc
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch


def tensors_of(thing: Any) -> list[torch.Tensor]:
    """All tensors that are reachable from an object; not by way of its class, or of functions."""
    found, seen, waiting = [], set(), [thing]
    while waiting:
        current = waiting.pop()
        is_code = isinstance(current, (type, ModuleType, FunctionType, BuiltinFunctionType))
        if id(current) in seen or is_code:
            continue
        seen.add(id(current))
        if isinstance(current, torch.Tensor):
            found.append(current)
            continue
        waiting += gc.get_referents(current)
    return found
