"""No step on the CUDA side waits for the device: it is run on a device that has no contents.

That is torch's 'meta'. Whoever wants a number of its tensors on the host (`.item()`, `.tolist()`,
a mask's number of entries, a tensor as a condition) gets an error, and so does who mixes them with
tensors of the host.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from gpu.recording import record

from vllm_kvcompress import ops
from vllm_kvcompress.compaction import CacheShape, LayerParameters
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies.base import Rotary
from vllm_kvcompress.vllm_integration.engine_cuda import CUDAEngine
from vllm_kvcompress.vllm_integration.metrics import CompressionStats

SHAPE = CacheShape(2, 2, 3, 64, 16)
NUM_HEADS = SHAPE.num_kv_heads * SHAPE.num_queries_per_kv
META = torch.device("meta")
NUM_BLOCKS, ROW_WIDTH, WINDOW = 160, 64, 8


def empty(*size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device=META)


class Worker:
    """A GPU worker's engine on the device without contents."""

    def __init__(self, config):
        size = (NUM_BLOCKS, SHAPE.num_layers, SHAPE.num_kv_heads, SHAPE.block_size)
        buffer = empty(*size, 2 * SHAPE.head_size)
        root = empty(SHAPE.num_kv_heads, SHAPE.head_size, SHAPE.head_size)
        weight = empty(SHAPE.num_kv_heads, SHAPE.num_queries_per_kv, SHAPE.head_size, 24)
        rotary = Rotary(empty(600, SHAPE.head_size))
        self.names = ((), np.empty(0))
        self.engine = CUDAEngine(
            config,
            SHAPE,
            {f"layers.{i}": buffer[:, i] for i in range(SHAPE.num_layers)},
            [LayerParameters(0.2, 0.0, weight, root, rotary) for _ in range(SHAPE.num_layers)],
            lambda common: self.names,
            8,
            CompressionStats(log=False),
            1024,
        )

    def step(self, rows, one_shot_ids=()):
        """Rows of (request, prompt length, tokens before this step, tokens of this step)."""
        ids, prompt_lens, before, counts = zip(*rows, strict=True)
        self.names = (ids, np.array(prompt_lens))
        starts = np.cumsum([0, *counts]).astype(np.int32)
        seq_lens = (np.array(before) + counts).astype(np.int32)
        ints = {"dtype": torch.int32}
        common = SimpleNamespace(
            num_reqs=len(rows),
            query_start_loc=empty(len(starts), **ints),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=empty(len(rows), **ints),
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
            block_table_tensor=empty(len(rows), ROW_WIDTH, **ints),
            slot_mapping=empty(int(starts[-1]), dtype=torch.int64),
        )
        with self.engine.scheduled_step(one_shot_ids):
            step = self.engine.prepare(common)
        query = empty(int(starts[-1]), NUM_HEADS, SHAPE.head_size)
        for first, end, is_one_shot in step.runs:
            if is_one_shot:
                self.engine.staged_places(step, first, end)
        for layer in range(SHAPE.num_layers):
            self.engine.begin_layer(step, layer)
            lses = []
            for first, end, _ in step.runs:
                tokens = slice(int(starts[first]), int(starts[end]))
                if self.engine.wants_lse(step, tokens):
                    lses.append((tokens, empty(NUM_HEADS, tokens.stop - tokens.start)))
            self.engine.after_attention(step, layer, query, lses)


def serve(worker):
    """Prompts in chunks and whole, staged and not, several at once; suffixes; single tokens."""
    worker.step([("a", 205, 0, 70), ("dense", 19, 0, 19)])
    worker.step([("dense", 19, 19, 1), ("a", 205, 70, 131), ("b", 150, 0, 150)])
    worker.step([("b", 150, 150, 1), ("a", 205, 201, 4), ("c", 140, 0, 140), ("d", 99, 0, 99)], "cd")
    worker.step([("a", 205, 205, 1), ("c", 140, 140, 1), ("b", 150, 151, 19)])
    worker.engine.forget(["c", "d"])
    worker.step([("a", 205, 206, 1), ("c", 140, 0, 100)])


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize(
    "method",
    [
        "span",
        "span-keydiff",
        "snapkv",
        "pyramidkv",
        "ada-pyramidkv",
        "kvc",
        "tova",
        "h2o",
        "ada-criticalkv",
        "layer-defensivekv",
        "keydiff",
        "expected-attention",
        "streamingllm",
        "chunkkv",
        "random",
    ],
)
def test_no_step_waits_for_the_device(method, granularity):
    config = KVCompressConfig(
        method, budget=64, window=WINDOW, options=(("granularity", granularity),)
    )
    worker = Worker(config)
    launches = record(lambda: serve(worker))
    assert "compact_kernel" in {launch.name for launch in launches}
    # Not even what is told of requests, until somebody asks for it.
    assert {"a", "b", "c", "d", "dense"} == set(worker.engine.stats._requests)


def test_who_asks_a_tensor_is_found_out(monkeypatch):
    compact = ops.select_and_compact

    def asking(scores, *arguments, **options):
        scores.max().item()
        return compact(scores, *arguments, **options)

    monkeypatch.setattr(ops, "select_and_compact", asking)
    worker = Worker(KVCompressConfig("snapkv", budget=64, window=WINDOW))
    with pytest.raises(RuntimeError, match="meta"):
        record(lambda: serve(worker))
