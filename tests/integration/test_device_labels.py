"""The labelled device: it must notice what a GPU would, and let pass what a GPU lets pass."""

from __future__ import annotations

import device_labels
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from device_labels import LABELLED, HostWaits, MixedDevices, labelled_device, no_waiting

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU tells devices apart")


@pytest.fixture(autouse=True)
def labels():
    with labelled_device():
        yield


def on_device(*size):
    return torch.ones(size, device=LABELLED)


def generator(x):
    return torch.Generator(x.device).manual_seed(1)


MIXING = {
    "sum": lambda x, host: x + host,
    "in_place": lambda x, host: x.add_(host),
    "host_and_number": lambda x, host: host + x.sum(),
    "cat": lambda x, host: torch.cat([x, host]),
    "equal": lambda x, host: torch.equal(x, host),
    "where": lambda x, host: torch.where(x > 0, x, host),
    "mask": lambda x, host: x.masked_fill(host > 0, 0.0),
    "index": lambda x, host: x[host.long()],
    "put": lambda x, host: x.index_copy_(0, torch.arange(4), x),
    "values": lambda x, host: x.index_put_((torch.arange(4, device=LABELLED),), host),
    "device_index": lambda x, host: host[x.long()],
    "view": lambda x, host: x[1:3] * host.view(2, 2)[0],
    "out": lambda x, host: torch.exp(x, out=host),
    "einsum": lambda x, host: torch.einsum("i,i->", x, host),
    "isin": lambda x, host: torch.isin(x, host),
    "factory": lambda x, host: x + torch.arange(4),
    "like_a_moved_one": lambda x, host: x + torch.zeros_like(x.cpu()),
    "new_on_host": lambda x, host: x + x.new_zeros(4, device="cpu"),
    "generated": lambda x, host: x + torch.randn(4, generator=torch.Generator()),
    "array": lambda x, host: x * torch.from_numpy(np.ones(4, np.float32)),
}


@pytest.mark.parametrize("name", MIXING)
def test_an_op_on_both_devices_is_noticed(name):
    with pytest.raises(MixedDevices, match="on the host"):
        MIXING[name](on_device(4), torch.ones(4))


def test_numpy_sees_no_tensor_of_the_device():
    with pytest.raises(TypeError, match=r"Tensor\.cpu"):
        on_device(4).numpy()
    assert on_device(4).cpu().numpy().sum() == 4


def test_comparing_results_on_two_devices_is_noticed():
    with pytest.raises(AssertionError, match="device"):
        torch.testing.assert_close(on_device(4), torch.ones(4))


STAYING = {
    "numbers": lambda x: x * torch.tensor(2.0) + 1,
    "new": lambda x: x + x.new_zeros(4) + torch.zeros_like(x) + torch.zeros(4, device=x.device),
    "new_on_device": lambda x: x + torch.ones(4).new_zeros(4, device=x.device),
    "generated": lambda x: x + torch.randn(4, generator=(g := generator(x)), device=g.device),
    "moved": lambda x: x + torch.ones(4).to(x.device) + torch.ones(4).to(x),
    "type": lambda x: x.double().to(torch.float32),
    "list_index": lambda x: x[[3, 2, 1, 0]],
    "array_index": lambda x: x[np.array([0, 1])],
    "tensor": lambda x: x[torch.tensor([1, 0], device=LABELLED)],
    "set": lambda x: torch.zeros(2, 4, device=LABELLED).index_put_((x.long(),), x),
    "composed": lambda x: torch.nn.functional.one_hot(x.long(), 3),
    "sorted": lambda x: torch.einsum("i,j->ij", x, x).logsumexp(-1).topk(2).values,
    "view": lambda x: x.view(2, 2).t().flatten(),
}


@pytest.mark.parametrize("name", STAYING)
def test_results_stay_on_the_device(name):
    result = STAYING[name](on_device(4))
    assert result.device == LABELLED
    assert torch.equal(result, result.clone())


def test_copies_go_both_ways():
    x, host = on_device(4), torch.zeros(4)
    host.copy_(x)
    assert host.device == torch.device("cpu") and host.sum() == 4
    x[1:3] = torch.tensor([5.0, 6.0])
    x[[0]] = 2.0
    assert x.tolist() == [2, 5, 6, 1]
    moved = x.cpu()
    moved += host
    # A copy, as from a GPU.
    assert x.tolist() == [2, 5, 6, 1] and moved.device == torch.device("cpu")
    assert x.to(LABELLED) is not host and x.to(LABELLED).device == LABELLED


def test_memory_that_is_gone_takes_its_label_along(monkeypatch):
    monkeypatch.setattr(device_labels, "_PURGE_EVERY", 8)
    monkeypatch.setattr(device_labels._LABELS, "_purge_at", 8)
    # Other tests of the process may have left some.
    before = len(device_labels._LABELS._known)
    for _ in range(200):
        del_me = on_device(1000)
        assert torch.ones(1000).device == torch.device("cpu")
    assert del_me.device == LABELLED
    assert len(device_labels._LABELS._known) < before + 50


WAITING = {
    "item": lambda x: x.sum().item(),
    "condition": lambda x: bool(x.any()),
    "list": lambda x: x.tolist(),
    "mask": lambda x: x[x > 0],
    "put_mask": lambda x: x.index_put_((x > 0,), x.sum()),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "copy": lambda x: torch.zeros(4).copy_(x),
    "repeat": lambda x: torch.repeat_interleave(x, x.long()),
    # Copies of what the host has wait for what was launched before.
    "to_device": lambda x: torch.ones(4).to(x.device),
    "made_there": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "copied_there": lambda x: x.copy_(torch.ones(4)),
    "item_set": lambda x: x.__setitem__(1, 2.0),
    "list_index": lambda x: x[[0, 1]],
    "slice": lambda x: x[: x.sum().long()],
}


@pytest.mark.parametrize("name", WAITING)
def test_waiting_for_the_device_is_noticed(name):
    x = on_device(4)
    WAITING[name](x)
    with no_waiting(LABELLED), pytest.raises(HostWaits):
        WAITING[name](x)
    WAITING[name](x)


def test_copies_that_do_not_block_make_nobody_wait():
    with no_waiting(LABELLED):
        x = torch.from_numpy(np.ones(4)).to(LABELLED, non_blocking=True, copy=True)
        x[1:] = x[:-1] * 2 + x.new_ones(3)
        x[1:3] = 5.0
        x.copy_(torch.ones(4), non_blocking=True)
    assert x.cpu().tolist() == [1.0] * 4


@triton.jit
def _double(target, source, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(target + place, 2 * tl.load(source + place))


def test_kernels_run_on_the_device_only():
    x, host = on_device(4), torch.ones(4)
    _double[(1,)](x, x, 4)
    assert x.tolist() == [2, 2, 2, 2]
    with pytest.raises(MixedDevices, match="_double is given"):
        _double[(1,)](x, host, 4)
    with pytest.raises(MixedDevices, match="tensors of the host"):
        _double[(1,)](host, host, 4)
