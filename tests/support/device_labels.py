"""A device of its own in the CPU's memory: tensors on it hold numbers, and mix with no others.

Without a GPU, whoever hands an op a tensor of the host beside one of the device is not noticed.
Here the device is `LABELLED`, torch's 'cpu:0', which no tensor has by itself. Memory that is made
there has a label, `tensor.device` tells it, and an op that is given memory with and without one
raises `MixedDevices`. As with CUDA, numbers of dimension 0 may come from the host, and `to`, `cpu`
and `copy_` go from one to the other. Stricter than CUDA, indices have to be on the device too.

Inside `no_waiting` an op also raises where it makes the host wait: for a number, or for a copy in
either direction that is not said to be `non_blocking`.

Triton's interpreter runs without all this, once the arguments of a launch have been looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

LABELLED = torch.device("cpu", 0)
_HOST = torch.device("cpu")
# Labels of memory that is gone are dropped when there are so many more.
_PURGE_EVERY = 4096
# Ops that ask the device something: a size, or a number.
_WAITING = {
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "masked_select",
    "repeat_interleave",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
_TENSOR_MAKERS = {torch.tensor, torch.as_tensor, torch.asarray}
_HOST_ARRAYS = {torch.Tensor.numpy, torch.Tensor.__array__}
_HOST_NUMBERS = {torch.Tensor.tolist}
_INDEXED = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class MixedDevices(RuntimeError):
    """An op was given tensors of the host and of the device."""


class HostWaits(RuntimeError):
    """The host asked for what is on the device, where it may not wait."""


class _Labels:
    """Which memory is the device's; views share their base's."""

    def __init__(self) -> None:
        # While a weak reference is held, no other memory gets the same key.
        self._known: dict[int, StorageWeakRef] = {}
        self._purge_at = _PURGE_EVERY
        self.may_wait = True

    def has(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self._known

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = StorageWeakRef(storage)
        if len(self._known) > self._purge_at:
            self._known = {k: ref for k, ref in self._known.items() if not ref.expired()}
            self._purge_at = len(self._known) + _PURGE_EVERY
        return tensor

    def wait(self, what: Any) -> None:
        if not self.may_wait:
            raise HostWaits(f"the host waits for the device in {what}")


# There is one set of modes per process, as there is one `torch.Tensor.device`.
_LABELS = _Labels()


def _tensors(*values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(*value)
        elif isinstance(value, dict):
            yield from _tensors(*value.values())


def _holds_tensors(*values: Any) -> bool:
    return next(_tensors(*values), None) is not None


def _is_labelled(device: Any) -> bool:
    return device is not None and torch.device(device) == LABELLED


def check_together(what: Any, *values: Any) -> bool:
    """Whether these are on the device; tensors may be nested in lists, tuples and dicts.

    Raises:
        MixedDevices: if some are and some are not.
    """
    tensors = [x for x in _tensors(*values) if x.layout is torch.strided and not x.is_meta]
    on_device = [x for x in tensors if _LABELS.has(x)]
    on_host = [x for x in tensors if x.dim() and not _LABELS.has(x)]
    if on_device and on_host:
        sizes = [tuple(x.shape) for x in on_device], [tuple(x.shape) for x in on_host]
        raise MixedDevices(f"{what} is given {sizes[0]} on the device and {sizes[1]} on the host")
    return bool(on_device)


class _Calls(TorchFunctionMode):
    """What torch is asked for in Python, where an explicit device can still be seen."""

    def __init__(self) -> None:
        super().__init__()
        # Whether memory that the innermost call makes by the way is the device's.
        self.is_on_device = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            return _move(*args, **kwargs)
        if func is torch.Tensor.cpu:
            return _move(args[0], _HOST)
        if func in _HOST_ARRAYS and _LABELS.has(args[0]):
            raise TypeError("can't convert a tensor of the device to numpy; use Tensor.cpu() first")
        if func in _HOST_NUMBERS and _LABELS.has(args[0]):
            _LABELS.wait("tolist")
        if func in _TENSOR_MAKERS:
            return _make(func, args, kwargs)
        if func in _INDEXED and _LABELS.has(args[0]):
            args = (args[0], _index(args[1]), *args[2:])
        before = self.is_on_device
        if kwargs.get("device") is None:
            self.is_on_device = any(_LABELS.has(x) for x in _tensors(args, kwargs))
        else:
            self.is_on_device = _is_labelled(kwargs["device"])
        try:
            return func(*args, **kwargs)
        finally:
            self.is_on_device = before


class _Ops(TorchDispatchMode):
    """What torch runs: looks at the operands and labels the results."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "copy_":
            # Either way it waits, unless told otherwise.
            non_blocking = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if _LABELS.has(args[1]) != _LABELS.has(args[0]) and not non_blocking:
                _LABELS.wait(func)
            return func(*args, **kwargs)
        is_on_device = check_together(func, args, kwargs)
        if is_on_device and (name in _WAITING or _reads_mask(name, args)):
            _LABELS.wait(func)
        result = func(*args, **kwargs)
        device = kwargs.get("device")
        if not _holds_tensors(args, kwargs):
            is_on_device = self._calls.is_on_device or _is_labelled(device)
        elif device is not None and name.startswith(("new_", "empty_", "zeros_", "ones_", "full_")):
            # Like another tensor, but for the device.
            is_on_device = self._calls.is_on_device
        if is_on_device:
            for tensor in _tensors(result):
                _LABELS.put(tensor)
        return result


def _reads_mask(name: str, args: Any) -> bool:
    """Whether an index is a mask, whose number of entries is needed on the host."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(x.dtype == torch.bool for x in _tensors(args[1]))


def _make(func: Callable[..., torch.Tensor], args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """A tensor of numbers that the host has, or of another tensor."""
    device, data = kwargs.pop("device", None), args[0]
    if isinstance(data, torch.Tensor):
        data = data if device is None else _move(data, torch.device(device))
        return data if kwargs.get("dtype") is None else data.to(kwargs["dtype"])
    if _is_labelled(device) or any(_LABELS.has(x) for x in _tensors(data)):
        _LABELS.wait(func)
    if device is not None and not _is_labelled(device):
        return func(*args, device=device, **kwargs)
    result = func(*args, **kwargs)
    return _LABELS.put(result) if _is_labelled(device) else result


def _move(
    tensor: torch.Tensor,
    *args: Any,
    device: Any = None,
    dtype: torch.dtype | None = None,
    non_blocking: bool = False,
    copy: bool = False,
    **rest: Any,
) -> torch.Tensor:
    """`Tensor.to`, which copies between host and device."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, (str, torch.device)):
            device = arg
        else:
            raise NotImplementedError(f"Tensor.to with a positional {arg!r}")
    dtype = dtype or tensor.dtype
    was_on_device = _LABELS.has(tensor)
    if device is None:
        is_on_device = was_on_device
    elif torch.device(device).type != "cpu":
        return tensor.to(device=device, dtype=dtype, copy=copy, **rest)
    else:
        is_on_device = _is_labelled(device)
    if was_on_device != is_on_device and not non_blocking:
        _LABELS.wait("Tensor.to")
    # Not an op of the modes: they would see memory of the host made of the device's.
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        result = tensor.to(dtype, copy=copy or was_on_device != is_on_device, **rest)
    return _LABELS.put(result) if is_on_device else result


def _index(index: Any) -> Any:
    """Numbers of the host in an index, which torch puts on the indexed tensor's device."""
    if isinstance(index, tuple):
        return tuple(_index(x) for x in index)
    if isinstance(index, (list, range, np.ndarray)) and not _holds_tensors(index):
        _LABELS.wait("an index that the host has")
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return _LABELS.put(torch.as_tensor(np.array(index)))
    return index


class _Generator(torch.Generator):
    """Tells the device that it was made for, as one for a GPU does."""

    def __new__(cls, device: torch.device | str = "cpu") -> _Generator:
        generator = super().__new__(cls, torch.device(device))
        generator._device = torch.device(device)
        return generator

    @property
    def device(self) -> torch.device:
        return self._device


@contextmanager
def labelled_device() -> Iterator[None]:
    """Labels count inside; memory made on `LABELLED` before counts as the host's."""
    host_device = torch.Tensor.__dict__.get("device")
    tell = torch._C.TensorBase.device.__get__

    def device(tensor: torch.Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            return LABELLED if _LABELS.has(tensor) else tell(tensor)

    calls = _Calls()
    with pytest.MonkeyPatch.context() as patch:
        assert host_device is None, "labels count already"
        patch.setattr(torch.Tensor, "device", property(device), raising=False)
        patch.setattr(torch, "Generator", _Generator)
        _guard_launches(patch)
        with calls, _Ops(calls):
            yield


def _guard_launches(patch: pytest.MonkeyPatch) -> None:
    """Look at what kernels are given; the interpreter knows of no labels."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def guarded(executor: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = list(_tensors(args, kwargs))
        name = executor.fn.__name__
        if tensors and not check_together(name, tensors):
            raise MixedDevices(f"{name} is given tensors of the host")
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return launch(executor, *args, **kwargs)

    patch.setattr(GridExecutor, "__call__", guarded)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Inside, an op that makes the host wait for the device raises.

    On a GPU by CUDA's own debugging mode, on the labelled device by its labels.
    """
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return
    assert device == LABELLED, f"nobody would notice on {device}"
    before, _LABELS.may_wait = _LABELS.may_wait, False
    try:
        yield
    finally:
        _LABELS.may_wait = before


@contextmanager
def device_under_test(device: torch.device) -> Iterator[None]:
    """Inside, ops and kernels that mix the device with the host raise: on a GPU by themselves."""
    if device.type == "cuda":
        yield
        return
    with labelled_device():
        yield


def skip_without_gpu(items: list[pytest.Item]) -> None:
    """Tests marked `gpu`, where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
