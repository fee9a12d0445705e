"""No step on the CUDA side waits for the device: it is run on a device that has no contents.

That is torch's 'meta'. Whoever wants a number of its tensors on the host (`.item()`, `.tolist()`,
a mask's number of entries, a tensor as a condition) gets an error, and so does who mixes them with
tensors of the host.
"""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from cuda_rig import METHODS, Request, Rig
from cuda_stand_ins import SCALE, make_builder, make_layers, make_vllm_config
from device_labels import no_waiting
from device_work import DeviceWork
from gpu.recording import record
from paged_pool import DEVICE
from plain_flash_attention import use_plain_attention
from reachable import tensors_of
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import CacheShape
from vllm_kvcompress.policies import make_scorer
from vllm_kvcompress.policies.base import ChunkInputs, Rotary, ScoreInputs
from vllm_kvcompress.vllm_integration.platforms.cuda.engine import CUDAEngine
from vllm_kvcompress.vllm_integration.worker.engine import EngineParts
from vllm_kvcompress.vllm_integration.worker.metrics import CompressionStats

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
        parts = EngineParts(
            config=config,
            shape=SHAPE,
            layer_views=self.views,
            layers=[parameters] * SHAPE.num_layers,
            row_names=lambda common: self.names,
            max_num_reqs=8,
            stats=CompressionStats(log=False),
            one_shot_tokens=1024,
        )
        self.engine = CUDAEngine(parts)
        vllm_config = make_vllm_config(torch.float32, 3)
        self.layers = make_layers(vllm_config, SHAPE, list(self.views), META)
        self.builder = make_builder(vllm_config, SHAPE, self.engine, META)

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
            layer = self.layers[name]
            layer.impl.forward(layer, query, key, key, view, metadata, torch.empty_like(query))


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
    """What vLLM's FlashAttention backend launches, which does nothing here."""

    def attend(q, *, return_softmax_lse=False, **rest):
        return (rest["out"], empty(NUM_HEADS, len(q))) if return_softmax_lse else rest["out"]

    use_plain_attention(monkeypatch)
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", attend)
    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", lambda *args: None)
    module = ModuleType("vllm.vllm_flash_attn")
    module.flash_attn_varlen_func = attend
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)


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


def serve_for_real(rig):
    """As `serve`, with numbers in the tensors and every result checked."""
    block = rig.shape.block_size
    first, dense, second = (
        Request("a", 7 * block + 5),
        Request("dense", block + 3),
        Request("b", 6 * block),
    )
    staged = [Request(f"s{n}", n, is_one_shot=True) for n in (6 * block + 3, 5 * block + 9)]
    rig.step([(first, 2 * block), (dense, block + 3)])
    rig.step([(dense, 1), (first, 5 * block + 1), (second, 6 * block)])
    rig.step([(second, 1), (first, 4), *((r, r.prompt_len) for r in staged)])
    rig.step([(first, 1), (staged[0], 1), (second, 19)])
    assert all(r.selection is not None for r in (first, second, *staged))


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_a_gpu(monkeypatch, method, granularity):
    """Preparing, attending, scoring and compacting, in CUDA's own mode that forbids it."""
    monkeypatch.undo()
    options = (("granularity", granularity),)
    config = KVCompressConfig(method, budget=64, window=WINDOW, options=options)
    serve_for_real(Rig(monkeypatch, SHAPE, config, torch.bfloat16, may_wait=False))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the GPU's own mode tells")
@pytest.mark.parametrize(
    ("method", "granularity"), [("span", "page"), ("h2o", "token"), ("random", "page")]
)
def test_no_step_waits_for_a_device_with_contents(monkeypatch, labels, method, granularity):
    monkeypatch.undo()
    options = (("granularity", granularity),)
    config = KVCompressConfig(method, budget=48, window=WINDOW, options=options)
    serve_for_real(Rig(monkeypatch, CacheShape(1, 1, 2, 64, 16), config, may_wait=False))


@pytest.mark.parametrize("method", METHODS)
def test_no_policy_waits_for_the_device(labels, method):
    """Those that kernels cannot score are run on the device as they are."""
    num_tokens, hidden = 100, 24
    heads, group, size = SHAPE.num_kv_heads, SHAPE.num_queries_per_kv, SHAPE.head_size

    def random(*size):
        return torch.rand(size, generator=generator, device=DEVICE)

    generator = torch.Generator(DEVICE).manual_seed(0)
    scorer = make_scorer(KVCompressConfig(method, budget=64, window=WINDOW))
    query, key = random(heads, group, num_tokens, size), random(heads, num_tokens, size)
    weight = random(heads, group, size, hidden)
    common = {"scale": SCALE, "rotary": Rotary(random(600, size))}
    root = ops.output_root(weight)
    with no_waiting(DEVICE):
        observed = None
        if "all_queries" in scorer.needs:
            chunk = ChunkInputs(query=query, key=key, first=0, logits_soft_cap=0.0, **common)
            observed = scorer.observe(chunk, None)
        inputs = ScoreInputs(
            key=key,
            num_candidates=num_tokens - WINDOW,
            budget_tokens=64,
            window_query=query[:, :, -WINDOW:],
            value=random(heads, num_tokens, size),
            output_weight=weight,
            output_root=root,
            observed=observed,
            **common,
        )
        scores = scorer.score(inputs)
    assert scores.first.device == key.device and not scores.first.isnan().any()


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
