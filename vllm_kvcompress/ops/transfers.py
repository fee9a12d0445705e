"""Numbers that go to a device or come from it, the host waiting for neither."""

from __future__ import annotations

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device; the host goes on at once, and may change `values`."""
    host = torch.from_numpy(values)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True, copy=True)


class HostCopy:
    """A device tensor's contents on their way to the host, which goes on at once.

    Holds no memory of the device. Its pinned memory goes back to torch, which uses it for later
    copies, once nobody holds the copy or what `take` has given.

    Args:
        values: any tensor; it may be freed or written to by later work of the current stream.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._host, self._event = _start_copy(values)

    def has_arrived(self) -> bool:
        """Whether `take` need not wait."""
        return self._host is not None and (self._event is None or self._event.query())

    def take(self) -> np.ndarray:
        """The contents; waits for them.

        Raises:
            RuntimeError: if the tensor's device has no contents.
        """
        if self._event is not None:
            self._event.synchronize()
        if self._host is None:
            raise RuntimeError("a tensor of the device 'meta' has no contents")
        return self._host.numpy()


def _start_copy(values: torch.Tensor) -> tuple[torch.Tensor | None, torch.cuda.Event | None]:
    """Host memory, and the event after which the contents are there; None if they are already."""
    if values.is_meta:
        return None, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    # On other devices nothing would tell when the contents are there.
    host.copy_(values, non_blocking=values.device.type in ("cuda", "cpu"))
    if not values.is_cuda:
        return host, None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))
    return host, event
