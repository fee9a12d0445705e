"""How many kernels the end of a prompt launches on a GPU: recorded, none of them run."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cache_shapes import cache_shape

pytest.importorskip("vllm")

from cuda_side import CUDASide
from device_work import DeviceWork
from engine_rig import Request, Rig
from gpu.recording import record

from vllm_kvcompress.compaction import score_memory
from vllm_kvcompress.compaction.score_memory import ScoreMemory
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.vllm_integration.platforms.cuda.engine import CUDAEngine

WINDOW = 8
MOST_LAUNCHES = 12
COUNTS = ["joint_digit_kernel"] * 4 + ["share_pages_kernel"]
COPY = ["select_kernel", "compact_kernel"]
SNAPKV = ["window_scores_kernel", "join_scores_kernel"]
DEFENSIVE = [
    "window_sums_kernel",
    "defensive_scores_kernel",
    "value_effect_kernel",
    "join_scores_kernel",
]


def config_of(method, **options):
    return KVCompressConfig(method, budget=64, window=WINDOW, options=tuple(options.items()))


def shape_of(num_layers):
    return cache_shape(num_layers, 2, 2, 64, 16)


class Steps:
    """Steps of a worker whose own kernels are recorded, and torch's work behind attention."""

    def __init__(self, monkeypatch, config, num_layers, flash_attn_version=3):
        self.rig = Rig(
            monkeypatch,
            CUDASide("triton", flash_attn_version),
            shape_of(num_layers),
            config,
            torch.float32,
        )
        self.work = DeviceWork()
        after_attention = CUDAEngine.after_attention

        def watched(*args):
            with self.work:
                after_attention(*args)

        monkeypatch.setattr(CUDAEngine, "after_attention", watched)
        # Statistics of a prompt are no part of it.
        monkeypatch.setattr(self.rig.stats, "record_compressed", lambda *args, **kwargs: None)

    def step(self, *chunks):
        """Names of the kernels that all layers of a step launch; `work` has torch's of it."""
        rig = self.rig
        self.work.names.clear()
        metadata = rig.metadata(chunks)
        tokens = rig.random_tokens(sum(count for _, count in chunks))

        outputs = [torch.empty_like(query) for _, _, query in tokens]
        names = [
            launch.name for launch in record(lambda: rig.run_layers(metadata, tokens, outputs))
        ]
        for request, count in chunks:
            request.num_computed += count
        return names


@pytest.mark.parametrize(
    ("method", "options", "tells_lse", "expected"),
    [
        ("span", {}, True, DEFENSIVE + COUNTS + COPY),
        ("span", {}, False, DEFENSIVE + COUNTS + COPY),
        ("pyramidkv", {}, True, DEFENSIVE + COPY),
        ("snapkv", {}, True, [*SNAPKV, *COPY]),
        ("pyramidkv", {"published": True}, False, ["window_sums_kernel", *SNAPKV, *COPY]),
        ("ada-snapkv", {"published": True}, True, [*SNAPKV, *COUNTS, *COPY]),
    ],
)
@pytest.mark.parametrize("num_layers", [2, 8])
def test_launches_of_a_prompts_end(monkeypatch, method, options, tells_lse, expected, num_layers):
    version = 3 if tells_lse else 4
    steps = Steps(monkeypatch, config_of(method, **options), num_layers, version)
    # Budgets of a prompt's length are made on the host, once.
    steps.step((Request("a", 205), 205))
    assert steps.step((Request("b", 205), 205)) == expected
    work = Counter(steps.work.names)
    # Each layer keeps its window: queries, and sums if attention tells them.
    assert work.pop("aten::stack.out") == (1 + tells_lse) * num_layers
    # From the host come numbers of the budgets, and the row where the engine finds the result.
    selection = {"aten::zeros": 1} if "joint_digit_kernel" in expected else {}
    assert work == {"aten::_to_copy": 2, "aten::index_copy_": 1, **selection}
    assert len(expected) + len(selection) <= MOST_LAUNCHES


def test_prompts_that_end_together_share_launches(monkeypatch):
    steps = Steps(monkeypatch, config_of("span"), 3)
    requests = [Request(f"r{n}", n) for n in (205, 150, 170)]
    launches = steps.step(*((request, request.prompt_len) for request in requests))
    assert launches == DEFENSIVE + COUNTS + COPY
    assert steps.work.names.count("aten::stack.out") == 2 * 3


@pytest.mark.parametrize("limit", ["MOST_SCORE_BYTES", "MOST_WINDOW_BYTES"])
def test_layers_that_do_not_fit_memory_are_scored_in_groups(monkeypatch, limit):
    config = config_of("span")
    steps = Steps(monkeypatch, config, 7)
    geometry = config.geometry(16).of(205)
    layer_bytes = {
        "MOST_SCORE_BYTES": steps.rig.engine.compactor.memory.token_bytes(geometry),
        # Queries and sums of four heads.
        "MOST_WINDOW_BYTES": WINDOW * 4 * (64 * 4 + 4),
    }
    monkeypatch.setattr(score_memory, limit, 3 * layer_bytes[limit])
    assert steps.step((Request("a", 205), 205)) == DEFENSIVE * 3 + COUNTS + COPY
    monkeypatch.setattr(score_memory, limit, 3 * layer_bytes[limit] - 1)
    assert steps.step((Request("b", 205), 205)) == DEFENSIVE * 4 + COUNTS + COPY
    # Less than a single layer takes.
    monkeypatch.setattr(score_memory, limit, 1)
    assert steps.step((Request("c", 205), 205)) == DEFENSIVE * 7 + COUNTS + COPY


@pytest.mark.parametrize("num_layers", [2, 5])
def test_a_window_over_several_steps_costs_its_copies_only(monkeypatch, num_layers):
    steps, request = Steps(monkeypatch, config_of("span"), num_layers), Request("a", 205)
    assert steps.step((request, 200)) == []
    assert steps.step((request, 5)) == DEFENSIVE + COUNTS + COPY
    assert "aten::stack.out" not in steps.work.names
    # Queries and sums: of each layer as they come, and of all when they are scored.
    assert steps.work.names.count("aten::copy_") == 2 * num_layers + 2


@pytest.mark.parametrize(
    ("method", "window", "num_layers"),
    [("span", 16, 16), ("snapkv", 32, 11), ("pyramidkv", 16, 16)],
)
def test_layers_of_a_long_prompt_that_are_scored_at_once(method, window, num_layers):
    """32,768 tokens in the 8B shape: all; 131,072: `num_layers`."""
    config = KVCompressConfig(method, ratio=0.875, window=window)
    plan = score_memory.make_scorer(config).window_plan()
    memory = ScoreMemory(config, cache_shape(32, 8, 4, 128, 16, "bfloat16"), plan)
    geometry = config.geometry(16).of
    assert memory.layers_at_once(geometry(32768), 1, 1) == 32
    assert memory.layers_at_once(geometry(131072), 1, 1) == num_layers
