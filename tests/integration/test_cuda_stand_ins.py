"""What vLLM's FlashAttention backend reads is there in the rig, and plain torch stands in for it.

Attributes are collected from vLLM's source, so that one which is new there is asked for here too.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from cache_shapes import cache_shape

pytest.importorskip("vllm")

import plain_flash_attention
from cuda_side import CapturedStep, CUDASide, captured
from engine_rig import Request, Rig
from paged_pool import DEVICE
from plain_flash_attention import (
    chosen_attention,
    describe_attention,
    store_in_pages,
    varlen_attention,
)
from rig_checks import SCALE
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.vllm_integration.platforms.cuda import attention as backend_cuda
from vllm_kvcompress.vllm_integration.platforms.cuda.attention import (
    KVCompressCUDAImpl,
    KVCompressCUDAMetadata,
    KVCompressCUDAMetadataBuilder,
)

pytestmark = pytest.mark.usefixtures("labels")

SHAPE = cache_shape(2, 2, 3, 64, 16)
# Read by methods of these names on the object itself.
IMPL_METHODS = ("forward", "do_kv_cache_update")
BUILDER_METHODS = ("build", "_get_scheduler_metadata", "_store_scheduler_metadata")
# Which vLLM's own constructor makes only for what a rig is not: decode context parallelism, and
# FlashAttention 3 in full graphs of its own.
SOMETIMES = {"_dcp_context_kv_lens", "scheduler_metadata"}


def reads(function: Callable, *names: str) -> dict[str, set[str]]:
    """Attributes that a function reads of variables with these names."""
    # Not of something that stands in for it.
    assert function.__module__.startswith(("vllm.", "vllm_kvcompress.")), function
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found: dict[str, set[str]] = {name: set() for name in names}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load)
            and isinstance(node.value, ast.Name)
            and node.value.id in found
        ):
            found[node.value.id].add(node.attr)
    return found


def missing(target: object, names: set[str]) -> set[str]:
    return {name for name in names - SOMETIMES if not hasattr(target, name)}


def lacking(rig: Rig, metadata: KVCompressCUDAMetadata) -> dict[str, set[str]]:
    """What vLLM's functions and ours read and the rig does not have, by whose it is."""
    impl = {name for method in IMPL_METHODS for name in reads_of(FlashAttentionImpl, method)}
    impl |= reads_of(KVCompressCUDAImpl, "forward")
    impl |= reads(backend_cuda.attend_with_lse, "impl")["impl"]
    layer = set().union(
        *(reads(getattr(FlashAttentionImpl, m), "layer")["layer"] for m in IMPL_METHODS),
        reads(KVCompressCUDAImpl.forward, "layer")["layer"],
    )
    builder = {x for m in BUILDER_METHODS for x in reads_of(FlashAttentionMetadataBuilder, m)}
    builder |= reads_of(KVCompressCUDAMetadataBuilder, "build")
    stock = reads(FlashAttentionImpl.forward, "attn_metadata")["attn_metadata"]
    stock |= reads(backend_cuda.attend_with_lse, "metadata")["metadata"]
    own = reads(KVCompressCUDAImpl.forward, "metadata")["metadata"]
    found = {
        "impl": missing(rig.impl, impl),
        "layer": missing(next(iter(rig.layers.values())), layer),
        "builder": missing(rig.builder, builder),
        "metadata of a run": missing(metadata.runs[0].metadata, stock),
        "metadata": missing(metadata, own),
    }
    return {whose: names for whose, names in found.items() if names}


def reads_of(owner: type, method: str) -> set[str]:
    return reads(getattr(owner, method), "self")["self"]


@pytest.fixture
def rig(monkeypatch):
    config = KVCompressConfig("span", budget=64, window=8)
    return Rig(monkeypatch, CUDASide("reference"), SHAPE, config)


def test_everything_that_is_read_is_there(rig):
    metadata = rig.metadata([(Request("a", 100), 100)])
    assert isinstance(metadata.runs[0].metadata, FlashAttentionMetadata)
    assert lacking(rig, metadata) == {}


def test_the_source_that_is_looked_at_has_what_once_was_forgotten():
    impl = {name for method in IMPL_METHODS for name in reads_of(FlashAttentionImpl, method)}
    assert impl >= {
        "attn_type",
        "kv_cache_dtype",
        "alibi_slopes",
        "dcp_world_size",
        "fa4_hd256",
        "supports_quant_query_input",
    }
    layer = reads(FlashAttentionImpl.forward, "layer")["layer"]
    assert layer >= {"_q_scale", "_k_scale", "_v_scale"}
    assert reads_of(FlashAttentionMetadataBuilder, "build") >= {"aot_schedule", "dcp_world_size"}


def test_what_is_missing_is_named(rig):
    """As it was with an impl, a layer and a builder that no constructor had made."""
    metadata = rig.metadata([(Request("a", 100), 100)])
    bare = object.__new__(KVCompressCUDAImpl)
    vars(bare).update(num_heads=6, num_kv_heads=2, head_size=64, scale=SCALE)
    bare_builder = object.__new__(KVCompressCUDAMetadataBuilder)
    vars(bare_builder).update(engine=rig.engine, aot_schedule=False)
    layer = SimpleNamespace(layer_name="layers.0", impl=bare)
    rig.layers, rig.builder = {"layers.0": layer}, bare_builder
    metadata.runs[0] = copy.copy(metadata.runs[0])
    object.__setattr__(metadata.runs[0], "metadata", SimpleNamespace(max_seq_len=100))
    found = lacking(rig, metadata)
    assert found["impl"] >= {"attn_type", "kv_cache_dtype", "alibi_slopes", "fa4_hd256"}
    assert found["layer"] == {"_q_scale", "_k_scale", "_v_scale"}
    assert {"dcp_world_size", "use_full_cuda_graph"} <= found["builder"]
    assert {"scheduler_metadata", "block_table"} - SOMETIMES <= found["metadata of a run"]


def test_prompts_run_what_vllm_runs(monkeypatch, rig):
    """Its forward, its store and its plan, with what stands in below them called by them."""
    called = []

    def watch(owner, name):
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    watch(FlashAttentionImpl, "forward")
    watch(FlashAttentionImpl, "do_kv_cache_update")
    for name in ("flash_attn_varlen_func", "reshape_and_cache_flash", "get_scheduler_metadata"):
        watch(flash_attn, name)
    rig.step([(Request("a", 20), 20)])
    num_layers = SHAPE.num_layers
    assert called.count("forward") == called.count("do_kv_cache_update") == num_layers
    assert called.count("flash_attn_varlen_func") == num_layers
    assert called.count("reshape_and_cache_flash") == num_layers
    assert called.count("get_scheduler_metadata") == 1


@pytest.mark.gpu
def test_a_graph_is_replayed_without_python(monkeypatch, rig):
    captured_step = CapturedStep(rig, num_rows=3)
    request = Request("a", 30)
    rig.step([(request, 30)])
    called = []
    monkeypatch.setattr(KVCompressCUDAImpl, "forward", lambda *args: called.append(args))
    for _ in range(3):
        rig.step([(request, 1)], captured=captured_step)
    assert not called


def test_a_graph_is_captured_after_kernels_were_compiled(monkeypatch):
    """The order of calls, by a stand-in for CUDA's graphs; what they do needs a GPU."""
    calls = []

    class Stream:
        def wait_stream(self, other):
            calls.append("wait")

    @contextmanager
    def within(name):
        calls.append(f"begin {name}")
        yield
        calls.append(f"end {name}")

    graph = SimpleNamespace(replay=lambda: calls.append("replay"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within("stream"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda captured: within("graph"))
    replay = captured(lambda: calls.append("run"), torch.device("cuda"))
    replay()
    assert calls == [
        *("wait", "begin stream", "run", "end stream", "wait"),
        *("begin graph", "run", "end graph", "replay"),
    ]


@pytest.fixture(params=[False, True], ids=["all_rows_at_once", "row_by_row"])
def place(request):
    """Where tensors are: the device, where lengths are not read, or the host, where they are."""
    return torch.device("cpu") if request.param else DEVICE


@pytest.mark.parametrize("window", [-1, 7])
@pytest.mark.parametrize(("softcap", "has_sinks"), [(0.0, False), (3.0, False), (0.0, True)])
def test_plain_attention_is_attention(monkeypatch, place, window, softcap, has_sinks):
    # Several parts per row.
    monkeypatch.setattr(plain_flash_attention, "_MOST_LOGITS", 6 * 3 * 48 * 4)
    lens, counts, block_size = [37, 5, 20], [11, 5, 1], 16
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randperm(12, generator=generator).int()[:9].view(3, 3)
    cache = torch.full((12, 2, block_size, 128), torch.nan)
    entries = [torch.randn(n, 2, 128, generator=generator) for n in lens]
    for row, own in enumerate(entries):
        for place_, entry in enumerate(own):
            cache[blocks[row, place_ // block_size], :, place_ % block_size] = entry
    query = torch.randn(sum(counts), 6, 64, generator=generator)
    sinks = torch.linspace(-2, 2, 6) if has_sinks else None
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    views = cache.to(place).transpose(1, 2).split(64, dim=-1)
    out = torch.full_like(query, torch.nan).to(place)
    _, lse = varlen_attention(
        query.to(place),
        *views,
        out=out,
        cu_seqlens_q=starts.to(place),
        max_seqlen_q=max(counts),
        seqused_k=torch.tensor(lens, dtype=torch.int32).to(place),
        max_seqlen_k=max(lens),
        softmax_scale=SCALE,
        causal=True,
        block_table=blocks.to(place),
        window_size=[window, 0 if window >= 0 else -1],
        softcap=softcap,
        s_aux=None if sinks is None else sinks.to(place),
        return_softmax_lse=True,
    )
    out, lse = out.cpu(), lse.cpu()
    for row, own in enumerate(entries):
        for i in range(counts[row]):
            token, last = int(starts[row]) + i, lens[row] - counts[row] + i
            first = 0 if window < 0 else max(0, last - window)
            for head in range(6):
                keys, values = own[first : last + 1, head // 3].split(64, dim=-1)
                logits = SCALE * keys @ query[token, head]
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                total = logits.logsumexp(0)
                torch.testing.assert_close(lse[head, token], total)
                if sinks is not None:
                    total = torch.logaddexp(total, sinks[head])
                want = (logits - total).exp() @ values
                torch.testing.assert_close(out[token, head], want, atol=1e-5, rtol=1e-5)


def test_the_plain_store_writes_its_slots_and_nothing_else():
    cache = torch.full((4, 2, 16, 8), torch.nan).to(DEVICE)
    views = cache.transpose(1, 2).split(4, dim=-1)
    key, value = (torch.arange(5 * 8.0).view(5, 2, 4).to(DEVICE) + x for x in (1, 100))
    slots = torch.tensor([17, -1, 63, -1]).to(DEVICE)
    one = torch.ones((), device=DEVICE)
    # Keys are padded, slots are not.
    store_in_pages(key, value, *views, slots, "auto", one, one)
    want = torch.full((4, 2, 16, 8), torch.nan)
    for token, (block, offset) in {0: (1, 1), 2: (3, 15)}.items():
        want[block, :, offset] = torch.cat([key[token], value[token]], dim=-1).cpu()
    assert torch.equal(cache.cpu().nan_to_num(-1), want.nan_to_num(-1))


def test_whose_ops_attend_is_chosen_and_said(monkeypatch):
    monkeypatch.delenv("KVC_RIG_ATTENTION", raising=False)
    default = "vllm" if DEVICE.type == "cuda" else "torch"
    assert chosen_attention() == default
    monkeypatch.setenv("KVC_RIG_ATTENTION", "torch")
    assert chosen_attention() == "torch"
    assert "KVC_RIG_ATTENTION=torch" in describe_attention("torch")
    with pytest.raises(ValueError, match="not one of"):
        chosen_attention("flash")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="need a GPU"):
        chosen_attention("vllm")
