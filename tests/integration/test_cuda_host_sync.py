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

from cuda_rig import METHODS, SCALE, make_builder, make_impl
from device_work import DeviceWork
from gpu.recording import record
from reachable import tensors_of
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from vllm_kvcompress import ops
from vllm_kvcompress.compaction import CacheShape, LayerParameters
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies.base import Rotary
from vllm_kvcompress.vllm_integration import backend_cuda
from vllm_kvcompress.vllm_integration.engine_cuda import CUDAEngine
from vllm_kvcompress.vllm_integration.metrics import CompressionStats

SHAPE = CacheShape(2, 2, 3, 64, 16)
NUM_HEADS = SHAPE.num_kv_heads * SHAPE.num_queries_per_kv
META = torch.device("meta")
NUM_BLOCKS, ROW_WIDTH, WINDOW = 160, 64, 8


def empty(*size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device=META)


class Worker:
    """A GPU worker's engine, builder and impl on the device without contents."""

    def __init__(self, config):
        size = (NUM_BLOCKS, SHAPE.num_layers, SHAPE.num_kv_heads, SHAPE.block_size)
        buffer = empty(*size, 2 * SHAPE.head_size)
        self.views = {f"layers.{i}": buffer[:, i] for i in range(SHAPE.num_layers)}
        root = empty(SHAPE.num_kv_heads, SHAPE.head_size, SHAPE.head_size)
        weight = empty(SHAPE.num_kv_heads, SHAPE.num_queries_per_kv, SHAPE.head_size, 24)
        parameters = LayerParameters(SCALE, 0.0, weight, root, Rotary(empty(600, SHAPE.head_size)))
        self.names = ((), np.empty(0))
        self.engine = CUDAEngine(
            config,
            SHAPE,
            self.views,
            [parameters] * SHAPE.num_layers,
            lambda common: self.names,
            8,
            CompressionStats(log=False),
            1024,
        )
        self.builder, self.impl = make_builder(self.engine), make_impl(SHAPE)

    def step(self, rows, one_shot_ids=()):
        """Rows of (request, prompt length, tokens before this step, tokens of this step)."""
        self.forward(self.metadata(rows, one_shot_ids), sum(count for *_, count in rows))

    def metadata(self, rows, one_shot_ids=()):
        ids, prompt_lens, before, counts = zip(*rows, strict=True)
        self.names = (ids, np.array(prompt_lens))
        starts = np.cumsum([0, *counts]).astype(np.int32)
        seq_lens = (np.array(before) + counts).astype(np.int32)
        num_tokens = int(starts[-1])
        common = CommonAttentionMetadata(
            query_start_loc=empty(len(starts), dtype=torch.int32),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=empty(len(rows), dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
            num_reqs=len(rows),
            num_actual_tokens=num_tokens,
            max_query_len=max(counts),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=empty(len(rows), ROW_WIDTH, dtype=torch.int32),
            slot_mapping=empty(num_tokens, dtype=torch.int64),
        )
        with self.engine.scheduled_step(one_shot_ids):
            return self.builder.build(0, common)

    def forward(self, metadata, num_tokens):
        query = empty(num_tokens, NUM_HEADS, SHAPE.head_size)
        key = empty(num_tokens, SHAPE.num_kv_heads, SHAPE.head_size)
        for name, view in self.views.items():
            layer = SimpleNamespace(layer_name=name)
            self.impl.forward(layer, query, key, key, view, metadata, torch.empty_like(query))


def serve(worker):
    """Prompts in chunks and whole, staged and not, several at once; suffixes; single tokens."""
    worker.step([("a", 205, 0, 70), ("dense", 19, 0, 19)])
    worker.step([("dense", 19, 19, 1), ("a", 205, 70, 131), ("b", 150, 0, 150)])
    staged = [("c", 140, 0, 140), ("d", 99, 0, 99)]
    worker.step([("b", 150, 150, 1), ("a", 205, 201, 4), *staged], one_shot_ids=["c", "d"])
    worker.step([("a", 205, 205, 1), ("c", 140, 140, 1), ("b", 150, 151, 19)])
    worker.engine.forget(["c", "d"])
    worker.step([("a", 205, 206, 1), ("c", 140, 0, 100)])


@pytest.fixture(autouse=True)
def flash_attention(monkeypatch):
    """vLLM's own part, which does nothing here."""

    def attend_with_lse(impl, query, *args):
        return empty(NUM_HEADS, len(query))

    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda *args: None)
    monkeypatch.setattr(FlashAttentionImpl, "do_kv_cache_update", lambda *args: None)
    monkeypatch.setattr(backend_cuda, "attend_with_lse", attend_with_lse)


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("method", [*METHODS, "span-keydiff"])
def test_no_step_waits_for_the_device(method, granularity):
    config = KVCompressConfig(
        method, budget=64, window=WINDOW, options=(("granularity", granularity),)
    )
    worker = Worker(config)
    launches = record(lambda: serve(worker))
    assert "compact_kernel" in {launch.name for launch in launches}
    # Not even what is told of requests, until somebody asks for it.
    assert {"a", "b", "c", "d", "dense"} == set(worker.engine.stats._requests)
    # And none of it stays on the device.
    assert tensors_of(worker.engine.stats) == []


def test_layers_of_a_decode_step_launch_the_decode_kernel_only():
    worker = Worker(KVCompressConfig("span", budget=64, window=WINDOW))
    work, steps = DeviceWork(), []

    def prepare():
        worker.step([("a", 205, 0, 205), ("b", 150, 0, 150)])
        steps.append(worker.metadata([("a", 205, 205, 1), ("dense", 20, 30, 1)]))

    def decode():
        with work:
            worker.forward(steps[0], 2)

    record(prepare)
    launches = record(decode)
    assert [launch.name for launch in launches] == ["ragged_decode_kernel"] * SHAPE.num_layers
    assert work.names == []


def test_who_asks_a_tensor_is_found_out(monkeypatch):
    compact = ops.select_and_compact

    def asking(scores, *arguments, **options):
        scores.max().item()
        return compact(scores, *arguments, **options)

    monkeypatch.setattr(ops, "select_and_compact", asking)
    worker = Worker(KVCompressConfig("snapkv", budget=64, window=WINDOW))
    with pytest.raises(RuntimeError, match="meta"):
        record(lambda: serve(worker))
