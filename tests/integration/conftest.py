"""Tests of the CUDA side run on a GPU if there is one, else on a labelled part of the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from device_labels import device_under_test, skip_without_gpu
from paged_pool import DEVICE
from plain_flash_attention import chosen_attention, describe_attention


@pytest.fixture
def labels() -> Iterator[None]:
    """Without a GPU, ops that mix the device with the host raise."""
    with device_under_test(DEVICE):
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say on what the tests ran."""
    terminalreporter.write_line(f"CUDA rig on {DEVICE}: {describe_attention(chosen_attention())}")


def _takes_tokens(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    return call is not None and call.params.get("granularity") == "token"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Pages are what is served by default: where there is not time for all, they come first.
    places = [i for i, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    own = sorted((items[i] for i in places), key=_takes_tokens)
    for i, item in zip(places, own, strict=True):
        items[i] = item
    skip_without_gpu(items)
