"""Shared by all tests; the poisoning below touches the unit tests only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Before anything imports triton: without a GPU the kernels run in its interpreter. vLLM's CPU
# build uses no Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

UNIT_TESTS = Path(__file__).parent / "unit"
ENGINE_TESTS = Path(__file__).parent / "e2e"
POISONED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# A slow machine is no failure, a test run leaves nothing in the tree, and two runs of the same
# tree see the same examples; `--hypothesis-profile explore` looks for new ones.
settings.register_profile("explore", deadline=None, database=None, print_blob=True)
settings.register_profile("repeatable", settings.get_profile("explore"), derandomize=True)
settings.load_profile("repeatable")


def _poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.dtype in POISONED_DTYPES else tensor

    return allocate_nan


@pytest.fixture(autouse=True)
def poison_empty(request, monkeypatch):
    """Uninitialised floats are NaN, so that an output nobody wrote cannot look right."""
    if not request.path.is_relative_to(UNIT_TESTS):
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def one_thread(request):
    """Small tensors: more threads would only wait for each other."""
    if request.path.is_relative_to(ENGINE_TESTS):
        yield
        return
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
