"""Numbers that the host knows, for a device that it does not wait for."""

from __future__ import annotations

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device; the host goes on at once, and may change `values`."""
    host = torch.from_numpy(values)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True, copy=True)
