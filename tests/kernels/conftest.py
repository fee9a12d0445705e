"""Kernels run on the GPU if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch
from paged_pool import DEVICE


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
