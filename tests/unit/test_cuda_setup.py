"""What the CUDA side of the seam decides without a device: settings, rows, chunks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.memory import Geometry
from vllm_kvcompress.vllm_integration import validate, worker_cuda
from vllm_kvcompress.vllm_integration.batch_cuda import EMPTY_SLOT, DeviceRequests, plan_step
from vllm_kvcompress.vllm_integration.scheduler import chunk_tokens

CONFIG = KVCompressConfig("snapkv", budget=64, window=16)


def engine_config(**changes):
    """As much of vLLM's configuration as the checks read."""
    config = {
        "model_config": SimpleNamespace(
            hf_text_config=SimpleNamespace(),
            runner_type="generate",
            use_mla=False,
            is_encoder_decoder=False,
            is_attention_free=False,
            is_hybrid=False,
            is_diffusion=False,
            get_num_layers=lambda parallel: 2,
            get_num_kv_heads=lambda parallel: 2,
        ),
        "parallel_config": SimpleNamespace(
            worker_cls=validate.CUDA_WORKER,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
        ),
        "cache_config": SimpleNamespace(block_size=16, cache_dtype="auto"),
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
        ({"cache_config__cache_dtype": "fp8"}, "KV cache dtype 'fp8'"),
        ({"scheduler_config__long_prefill_token_threshold": 2}, "fewer than 3 tokens"),
        ({"scheduler_config__max_num_batched_tokens": 2}, "fewer than 3 tokens"),
    ],
    ids=str,
)
def test_what_does_not_work_is_refused(change, message):
    with pytest.raises(KVCompressConfigError, match=message):
        validate.check_engine_config(engine_config(**change), CONFIG)


def test_model_runner_v2_is_for_gpus():
    config = engine_config(parallel_config__worker_cls=validate.CPU_WORKER)
    with pytest.raises(KVCompressConfigError, match="Model Runner V2"):
        validate.check_engine_config(config, CONFIG)


@pytest.mark.parametrize(
    ("missing", "wanted", "expected"),
    [
        (100, 100, 100),
        (100, 300, 100),
        (100, 40, 40),
        (100, 99, 98),
        (100, 1, 0),
        (3, 2, 0),
        (3, 3, 3),
        (2, 1, 0),
        (2, 9, 2),
        (0, 7, 7),
        (-5, 1, 1),
    ],
)
def test_chunks_never_have_or_leave_a_single_token(missing, wanted, expected):
    assert chunk_tokens(missing, wanted) == expected


def test_rows_of_both_model_runners():
    batch = SimpleNamespace(
        req_ids=["b", "a"], num_prompt_tokens=np.array([7, 9, 0, 0]), num_reqs=2
    )
    ids, lens = worker_cuda._rows_of_v1(SimpleNamespace(input_batch=batch))(None)
    assert (ids, lens.tolist()) == (["b", "a"], [7, 9])
    states = SimpleNamespace(
        index_to_req_id={3: "a", 0: "b", 2: "c"},
        prompt_len=SimpleNamespace(np=np.array([7, 0, 5, 9])),
    )
    names = worker_cuda._rows_of_v2(SimpleNamespace(req_states=states))
    ids, lens = names(SimpleNamespace(req_idx=np.array([0, 3])))
    assert (ids, lens.tolist()) == (["b", "a"], [7, 9])


def requests_of(config=CONFIG, max_num_reqs=4):
    return DeviceRequests(Geometry(config, 16), 2, max_num_reqs)


def plan(requests, rows, num_padded=0, **options):
    """`rows` are (id, prompt length, tokens before, new tokens)."""
    starts = np.cumsum([0, *(new for *_, new in rows)] + [0] * num_padded)
    seq_lens = np.array([before + new for _, _, before, new in rows] + [0] * num_padded)
    names = [name for name, *_ in rows], np.array([length for _, length, *_ in rows])
    return plan_step(requests, 16, *names, starts, seq_lens, **options)


def test_a_step_of_every_kind_of_row():
    requests = requests_of()
    # 104 tokens: blocks 0 to 4 compete, 2 blocks of region at block 6.
    requests.take_slot(requests.get_or_create("decoding", 104))
    requests.take_slot(requests.get_or_create("resumed", 100))
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
    assert found.numbers[:, 0].tolist() == found.numbers[:, 3].tolist() == [0, 0, 0, 0]
    assert found.numbers[:, 1].tolist() == [2, 6, 5, requests.get_or_create("decoding", 104).slot]
    assert found.numbers[:, 4].tolist() == [2, 6, 0, EMPTY_SLOT]
    assert found.numbers[:, 5].tolist() == [0, 0, 0, 0]
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
    taken = {requests.take_slot(requests.get_or_create(name, 104)) for name in "ab"}
    assert taken == {1, 2}
    requests.forget("a")
    requests.forget("unknown")
    again = requests.get_or_create("c", 104)
    assert requests.take_slot(again) == requests.take_slot(again) == 1
    # The same id with another prompt is another request.
    requests.get_or_create("b", 90)
    assert requests.take_slot(requests.get_or_create("d", 104)) == 2


def test_dense_prompts_are_told():
    found = plan(requests_of(), [("a", 50, 0, 50), ("b", 60, 0, 30)])
    assert found.finished_dense == [("a", 50)]
    assert not found.chunks and not found.has_regions
