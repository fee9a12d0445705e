"""Triton's kernels run on the GPU if there is one, else in its interpreter; compiled ones on the
CPU, with every instruction set that it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import csrc_on_host
import pytest
import torch
from compiled_ops import INSTRUCTION_SETS, need_compiled_ops, using
from device_labels import device_under_test, skip_without_gpu
from gpu import native
from paged_pool import DEVICE

from vllm_kvcompress.ops.native import is_installed

needs_compiler = pytest.mark.skipif(csrc_on_host.COMPILER is None, reason="needs g++")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def labels() -> Iterator[None]:
    """Without a GPU, ops and kernels that mix the device with the host raise."""
    with device_under_test(DEVICE):
        yield


@pytest.fixture(scope="module", params=["triton", *INSTRUCTION_SETS])
def scorer(request) -> Iterator[str]:
    """The backend of ops that score; the compiled one with one instruction set after another."""
    if request.param == "triton":
        yield "triton"
        return
    with using(request.param):
        yield "native"


@pytest.fixture(scope="module", params=["triton", "native", "torch"])
def selector(request) -> str:
    """The backend of ops that select and copy."""
    if request.param == "native":
        need_compiled_ops()
    return request.param


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> None:
    """The ops run on this GPU."""
    if native.build_cuda().find_nvcc() is None and not is_installed("cuda"):
        pytest.skip("not installed, and no nvcc in $CUDA_HOME, $PATH or /usr/local/cuda")
    native.load_here(tmp_path_factory.mktemp("csrc"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("host", marks=[needs_compiler, pytest.mark.emulated]),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def target(request) -> tuple[ModuleType, torch.device]:
    """The kernels, and the device on which they take their tensors."""
    if request.param == "host":
        return csrc_on_host, torch.device("cpu")
    request.getfixturevalue("compiled")
    return native, torch.device("cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_without_gpu(items)
