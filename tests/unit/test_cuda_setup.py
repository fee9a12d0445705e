"""What the CUDA side of the seam decides without a device: settings, rows, chunks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cache_shapes import cache_shape

pytest.importorskip("vllm")

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvcompress.compaction.requests import NO_OFFSETS, Requests
from vllm_kvcompress.compaction.score_memory import score_memory_of
from vllm_kvcompress.compaction.step_plan import plan_step
from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.policies import scorer_class
from vllm_kvcompress.vllm_integration import validate
from vllm_kvcompress.vllm_integration.platforms.cpu.platform import CPU
from vllm_kvcompress.vllm_integration.platforms.cuda.attention import KVCompressCUDABackend
from vllm_kvcompress.vllm_integration.platforms.cuda.platform import CUDA
from vllm_kvcompress.vllm_integration.platforms.cuda.step_buffers import StepBuffers
from vllm_kvcompress.vllm_integration.platforms.cuda.worker import KVCompressCUDAWorker
from vllm_kvcompress.vllm_integration.scheduler.scheduler import chunk_tokens, fewest_tokens
from vllm_kvcompress.vllm_integration.scheduler.spec import KVCompressSpec
from vllm_kvcompress.vllm_integration.worker import worker as worker_module
from vllm_kvcompress.vllm_integration.worker.metrics import CompressionStats
from vllm_kvcompress.vllm_integration.worker.row_names import rows_of_v1, rows_of_v2

CONFIG = KVCompressConfig("snapkv", budget=64, window=16)


def engine_config(**changes):
    """As much of vLLM's configuration as the checks read."""
    config = {
        "model_config": SimpleNamespace(
            hf_config=SimpleNamespace(),
            hf_text_config=SimpleNamespace(model_type="llama"),
            runner_type="generate",
            use_mla=False,
            is_encoder_decoder=False,
            is_attention_free=False,
            is_hybrid=False,
            is_diffusion=False,
            is_mm_prefix_lm=False,
            rswa_window=None,
            get_num_layers=lambda parallel: 2,
            get_num_kv_heads=lambda parallel: 2,
            get_num_attention_heads=lambda parallel: 4,
            get_head_size=lambda: 128,
            using_transformers_backend=lambda: False,
            max_model_len=1000,
        ),
        "parallel_config": SimpleNamespace(
            worker_cls=CUDA.worker,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
            distributed_executor_backend="mp",
        ),
        "cache_config": SimpleNamespace(
            block_size=16, cache_dtype="auto", kv_sharing_fast_prefill=False
        ),
        "scheduler_config": SimpleNamespace(
            disable_hybrid_kv_cache_manager=False,
            async_scheduling=True,
            scheduler_cls=None,
            max_num_batched_tokens=2048,
            max_num_scheduled_tokens=None,
            long_prefill_token_threshold=0,
        ),
        "attention_config": SimpleNamespace(backend=None, backend_per_kind={}),
        "kv_transfer_config": None,
        "speculative_config": None,
        "use_v2_model_runner": True,
    }
    for path, value in changes.items():
        owner, _, name = path.partition("__")
        if name:
            setattr(config[owner], name, value)
        else:
            config[owner] = value
    return SimpleNamespace(**config)


def test_full_attention_layers_get_our_backend_and_the_others_keep_theirs():
    windowed = {"sliding_window": AttentionBackendEnum.TRITON_ATTN}
    config = engine_config(attention_config__backend_per_kind=windowed)
    validate.check_engine_config(config, CONFIG)
    assert config.attention_config.backend_per_kind == {
        **windowed,
        "full_attention": AttentionBackendEnum.CUSTOM,
    }
    assert config.scheduler_config.scheduler_cls.endswith("KVCompressAsyncScheduler")
    # A second time, as when an engine is made from another's configuration.
    validate.check_engine_config(config, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_config__backend": AttentionBackendEnum.FLASHINFER}, "backend FLASHINFER"),
        ({"parallel_config__use_ubatching": True}, "microbatches"),
        ({"speculative_config": "a draft"}, "speculative decoding"),
        ({"model_config__is_diffusion": True}, "diffusion language models"),
        ({"model_config__is_mm_prefix_lm": True}, "both directions among an image's tokens"),
        ({"model_config__rswa_window": 128}, "R-SWA"),
        ({"cache_config__cache_dtype": "fp8"}, "KV cache dtype 'fp8'"),
        ({"scheduler_config__long_prefill_token_threshold": 2}, "fewer than 3 tokens"),
        ({"scheduler_config__max_num_batched_tokens": 2}, "fewer than 3 tokens"),
    ],
    ids=str,
)
def test_what_does_not_work_is_refused(change, message):
    with pytest.raises(KVCompressConfigError, match=message):
        validate.check_engine_config(engine_config(**change), CONFIG)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0", "first Ray executor"),
        ("VLLM_BATCH_INVARIANT", "1", "batch invariance"),
    ],
)
def test_what_the_environment_asks_for_may_be_refused(monkeypatch, name, value, message):
    config = engine_config(parallel_config__distributed_executor_backend="ray")
    validate.check_engine_config(config, CONFIG)
    monkeypatch.setenv(name, value)
    with pytest.raises(KVCompressConfigError, match=message):
        validate.check_engine_config(config, CONFIG)


def test_model_runner_v2_is_for_gpus():
    config = engine_config(parallel_config__worker_cls=CPU.worker)
    with pytest.raises(KVCompressConfigError, match="Model Runner V2"):
        validate.check_engine_config(config, CONFIG)


@pytest.mark.parametrize(
    ("missing", "wanted", "collected", "expected"),
    [
        (100, 100, 16, 100),
        (100, 300, 16, 100),
        (100, 40, 16, 40),
        (100, 99, 16, 98),
        (100, 1, 16, 1),
        (100, 1, 100, 0),
        (17, 1, 16, 1),
        (16, 1, 16, 0),
        (16, 2, 16, 2),
        (3, 2, 3, 0),
        (3, 2, 2, 1),
        (3, 3, 16, 3),
        (2, 1, 2, 0),
        (2, 1, 1, 0),
        (2, 9, 16, 2),
        (0, 7, 16, 7),
        (-5, 1, 16, 1),
    ],
)
def test_a_collected_token_is_never_alone(missing, wanted, collected, expected):
    assert chunk_tokens(missing, wanted, collected) == expected


def test_the_fewest_tokens_are_a_chunk_and_no_fewer_are():
    for missing in range(2, 40):
        fewest = fewest_tokens(missing)
        assert chunk_tokens(missing, fewest, 40) == fewest
        assert chunk_tokens(missing, fewest - 1, 40) == 0


def test_rows_of_both_model_runners():
    batch = SimpleNamespace(
        req_ids=["b", "a"], num_prompt_tokens=np.array([7, 9, 0, 0]), num_reqs=2
    )
    ids, lens = rows_of_v1(SimpleNamespace(input_batch=batch))(None)
    assert (ids, lens.tolist()) == (["b", "a"], [7, 9])
    states = SimpleNamespace(
        index_to_req_id={3: "a", 0: "b", 2: "c"},
        prompt_len=SimpleNamespace(np=np.array([7, 0, 5, 9])),
    )
    names = rows_of_v2(SimpleNamespace(req_states=states))
    ids, lens = names(SimpleNamespace(req_idx=np.array([0, 3])))
    assert (ids, lens.tolist()) == (["b", "a"], [7, 9])


# The worker, vLLM's part of which is not run.


class Layer:
    """As much of an attention layer as the worker reads."""

    num_heads, num_kv_heads = 6, 2


def worker_of(config, monkeypatch, **stock):
    """A worker of two layers that nothing has been done to; `stock` are vLLM's methods of it."""
    for name, method in stock.items():
        monkeypatch.setattr(Worker, name, method)
    worker = object.__new__(KVCompressCUDAWorker)
    plain = FullAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=64, head_size_v=64, dtype=torch.bfloat16
    )
    spec = KVCompressSpec.from_full_attention(plain, config, 1000, True)
    worker.get_kv_cache_spec = lambda: {"a": spec, "b": spec}
    worker.vllm_config = engine_config(
        cache_config__kv_cache_memory_bytes=None,
        scheduler_config__max_num_seqs=8,
        compilation_config=SimpleNamespace(
            max_cudagraph_capture_size=16, static_forward_context={"a": Layer(), "b": Layer()}
        ),
    )
    worker.device = torch.device("cpu")
    worker.model_runner = SimpleNamespace(get_model=lambda: "model")
    worker._config, worker._engine = config, None
    worker._stats = CompressionStats(log=False)
    return worker


@pytest.mark.parametrize("method", ["span", "ada-criticalkv"])
def test_memory_beside_the_pool_is_not_the_pools(monkeypatch, method):
    def measure(self):
        self.total_consumed = 3000
        return 10**9

    config = KVCompressConfig(method, ratio=0.9, window=16)
    worker = worker_of(config, monkeypatch, determine_available_memory=measure)
    layers = worker.vllm_config.compilation_config.static_forward_context
    copied = dict(zip(layers.values(), (5, 6), strict=True))
    monkeypatch.setattr(
        worker_module, "output_copy_bytes", lambda model, name, layer: copied[layer]
    )
    shape = cache_shape(2, 2, 3, 64, 16, "bfloat16")
    pages = config.one_shot.counted_buffer_pages(shape, 2048, 16)
    memory = score_memory_of(config, shape)
    scores = memory.most_bytes(1000, 8) + memory.staged_entry_bytes(2048)
    assert pages > 0 and scores > 0
    # What an engine of that shape keeps for its steps, with the stand-in's two multiprocessors.
    buffers = StepBuffers(shape, 16, torch.bfloat16, torch.device("cpu"))
    # Pieces of the programs that share streams are the most of it.
    most = [2 * 8 * 3, 2 * 2 * 24]
    assert [buffers.work.piece_lse.numel(), buffers.extended_work.piece_lse.numel()] == most
    own = buffers.num_bytes + pages * 16 * 2 * 64 * 2 + scores
    own += 11 if method == "ada-criticalkv" else 0
    # Of the rest each block leaves room for the scores of the tokens that it holds.
    share = 4 * (5 if method == "ada-criticalkv" else 2) * 16 / (2 * 16 * 64 * 2)
    own += int((10**9 - own) * share / (1 + share))
    assert worker.determine_available_memory() == 10**9 - own
    # Which vLLM's advice for the next start is made of.
    assert worker.total_consumed == 3000 + own
    worker.vllm_config.cache_config.kv_cache_memory_bytes = 10**9
    assert worker.determine_available_memory() == 10**9
    assert worker.total_consumed == 3000


def test_scores_follow_the_weights(monkeypatch):
    done = []
    worker = worker_of(
        KVCompressConfig("span", ratio=0.9),
        monkeypatch,
        reload_weights=lambda self, path: done.append(path),
        finish_weight_update=lambda self: done.append("updated"),
        shutdown=lambda self: done.append(self._engine),
    )
    # Before there is a cache.
    worker.reload_weights("first")
    worker._layer_parameters = sorted
    worker._engine = SimpleNamespace(use_parameters=done.append)
    worker.reload_weights("second")
    worker.finish_weight_update()
    needs = sorted(scorer_class("span").needs)
    assert "output_root" in needs
    assert done == ["first", "second", needs, "updated", needs]
    worker.shutdown()
    assert done[-1] is None


def test_another_attention_in_a_layer_is_refused(monkeypatch):
    worker = worker_of(KVCompressConfig("span", ratio=0.9), monkeypatch)
    layers = {
        name: SimpleNamespace(
            get_attn_backend=lambda chosen=chosen: chosen,
            kv_cache=torch.empty(3, 2, 2, 16, 128)[:, 0],
        )
        for name, chosen in (("a", KVCompressCUDABackend), ("b", FlashAttentionBackend))
    }
    with pytest.raises(KVCompressConfigError, match="layer b of this model has chosen another"):
        worker._check_layers(layers, cache_shape(2, 2, 1, 64, 16))


def requests_of(config=CONFIG, max_num_reqs=4):
    return Requests(config.geometry(16), 2, max_num_reqs)


def plan(requests, rows, num_padded=0, **options):
    """`rows` are (id, prompt length, tokens before, new tokens)."""
    starts = np.cumsum([0, *(new for *_, new in rows)] + [0] * num_padded)
    seq_lens = np.array([before + new for _, _, before, new in rows] + [0] * num_padded)
    names = [name for name, *_ in rows], np.array([length for _, length, *_ in rows])
    return plan_step(requests, 16, *names, starts, seq_lens, **options)


def test_a_step_of_every_kind_of_row():
    requests = requests_of()
    # 104 tokens: blocks 0 to 4 compete, 2 blocks of region at block 6.
    requests.mark_compacted(requests.get_or_create("decoding", 104))
    requests.mark_compacted(requests.get_or_create("resumed", 100))
    rows = [
        ("short", 20, 30, 1),
        ("decoding", 104, 120, 1),
        ("resumed", 100, 100, 12),
        ("new", 104, 0, 60),
        ("ends", 104, 60, 44),
    ]
    found = plan(requests, rows, num_padded=1)
    assert found.num_single == 2
    assert found.has_regions
    assert found.numbers[:, 0].tolist() == found.numbers[:, 3].tolist() == [0] * 5
    assert found.numbers[:, 1].tolist() == [
        2,
        6,
        6,
        5,
        requests.get_or_create("decoding", 104).offsets_row,
    ]
    assert found.numbers[:, 4].tolist() == [2, 6, 6, 0, NO_OFFSETS]
    assert found.numbers[:, 5].tolist() == [0] * 5
    assert [(row.row, row.token_start, row.query_len) for row in found.extended] == [(2, 2, 12)]
    assert [(row, seq_len) for row, seq_len, _ in found.cut] == [(4, 104)]
    (chunk,) = found.chunks
    assert (chunk.request_id, chunk.first, chunk.finishes) == ("ends", 88, True)
    assert (chunk.token_start, chunk.token_end) == (102, 118)
    assert chunk.whole_window(16) == slice(102, 118)
    assert chunk.whole_window(17) is None


def test_a_window_cut_by_a_chunk_is_collected_in_parts():
    requests = requests_of()
    (first,) = plan(requests, [("a", 104, 0, 94)]).chunks
    assert (first.first, first.token_start, first.token_end, first.finishes) == (88, 88, 94, False)
    (last,) = plan(requests, [("a", 104, 94, 10)]).chunks
    assert (last.first, last.token_start, last.token_end, last.finishes) == (94, 0, 10, True)
    assert last.whole_window(16) is None


def test_scorers_of_all_queries_see_every_chunk():
    (chunk,) = plan(requests_of(), [("a", 104, 10, 40)], collect_all=True).chunks
    assert (chunk.first, chunk.token_start, chunk.token_end) == (10, 0, 40)


def test_slots_are_given_back():
    requests = requests_of(max_num_reqs=2)
    taken = {requests.mark_compacted(requests.get_or_create(name, 104)) for name in "ab"}
    assert taken == {1, 2}
    requests.forget("a")
    requests.forget("unknown")
    again = requests.get_or_create("c", 104)
    assert requests.mark_compacted(again) == requests.mark_compacted(again) == 1
    # The same id with another prompt is another request.
    requests.get_or_create("b", 90)
    assert requests.mark_compacted(requests.get_or_create("d", 104)) == 2


def test_dense_prompts_are_told():
    found = plan(requests_of(), [("a", 50, 0, 50), ("b", 60, 0, 30)])
    assert found.finished_whole == [("a", 50)]
    assert not found.chunks and not found.has_regions
