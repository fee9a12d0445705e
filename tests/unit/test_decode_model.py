"""Arithmetic of the model of decode times, on numbers that can be followed by hand."""

from __future__ import annotations

import pytest
import torch
from gpu.decode_model import Gpu, Kernel, estimate, table
from gpu.shapes import ModelShape

# 2 * 64 * 2 = 256 bytes per token and KV head; a tile of 16 tokens has 4096.
SHAPE = ModelShape("toy", 1, 2, 4, 64, torch.bfloat16, torch.bfloat16)
# 1024 bytes per us at best, half of it from pages.
GPU = Gpu("toy GPU", 1.024, num_sms=2, page_efficiency=0.5, latency_us=1.0, launch_us=3.0)
KERNEL = Kernel(16, programs_per_sm=2, tiles_ahead=1, least_tiles=2, start_loads=4, merge_loads=2)


def test_a_share_of_whole_streams_merges_nothing():
    # 4 streams of 4 tiles among 4 programs.
    found = estimate(GPU, KERNEL, SHAPE, batch=2, kept=64)
    assert (found.num_programs, found.num_working) == (4, 4)
    assert found.floor_us == pytest.approx(4 * 64 * 256 / 1024)
    # Launch, start, and 16 tiles at half of the bandwidth: longer than one program's share.
    assert found.estimate_us == pytest.approx(3 + 4 + 2 * 64)
    assert found.of_copy == pytest.approx(64 / 135)


def test_shared_streams_are_merged():
    # 2 streams of 3 tiles: shares of two tiles, 6 programs' worth of work for 4.
    found = estimate(GPU, KERNEL, SHAPE, batch=1, kept=48)
    assert found.num_working == 3
    pieces = 2 * 2 * 3 * 4 * 65 * 4 / 1024
    assert found.estimate_us == pytest.approx(3 + 4 + 2 * 6 * 4 + 2 + pieces)


def test_few_tiles_keep_few_programs_busy():
    found = estimate(GPU, KERNEL, SHAPE, batch=1, kept=16)
    assert (found.num_programs, found.num_working) == (4, 1)


def test_a_program_may_be_slower_than_the_memory():
    # Memory without limit: a program has two tiles per latency, and starts once more.
    fast = Gpu("fast", 1e9, num_sms=1, latency_us=1.0, launch_us=0.0)
    one = Kernel(16, programs_per_sm=1, tiles_ahead=1, least_tiles=1, start_loads=4)
    found = estimate(fast, one, SHAPE, batch=1, kept=64)
    # 8 tiles of two streams; the share may begin and end inside of them.
    assert found.estimate_us == pytest.approx(4 + 8 / 2 + 2 * 4)


def test_shares_are_rounded_up():
    # 6 streams of 3 tiles among 4 programs: the slowest has five, as if all had.
    found = estimate(GPU, KERNEL, SHAPE, batch=3, kept=48)
    merge = 2 + 2 * 2 * 4 * 4 * 65 * 4 / 1024
    assert found.estimate_us == pytest.approx(3 + 4 + 2 * 5 * 4 * 4 + merge)


def test_the_table_says_that_it_is_a_model():
    text = table([GPU, Gpu("other", 2.0)], KERNEL, SHAPE)
    head, _, columns, _, *rows = text.splitlines()
    assert "a model, not measured" in head
    assert columns.endswith("| % of copy toy GPU / other |")
    assert len(rows) == 5 and rows[0].startswith("| 1 x 4096 | 4 / 4 |")
