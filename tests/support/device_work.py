"""What torch itself would do on a device."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class DeviceWork(TorchDispatchMode):
    """Collects torch's ops that would do something on the device: not views, nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(result.alias_info is not None for result in func._schema.returns)
        is_allocation = func.name().startswith(("aten::empty", "aten::new_empty"))
        if func._schema.is_mutable or not (is_view or is_allocation):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))
