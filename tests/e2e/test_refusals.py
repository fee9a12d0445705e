"""What cannot work is refused with one line before any process starts."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_kvcompress import KVCompressConfigError
from vllm_kvcompress.config import KVCompressConfig, is_misspelt_setting
from vllm_kvcompress.vllm_integration.platforms.cuda.platform import CUDA
from vllm_kvcompress.vllm_integration.validate import check_engine_config

DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}
WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 128,
    "dtype": "bfloat16",
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 128,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}
FULL, WINDOWED = "full_attention", "sliding_attention"


def gemma4(layer_types: list[str], **changes) -> dict:
    """Six query heads and two KV heads of size 64, but 128 in layers with full attention."""
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "hidden_size": 192,
        "intermediate_size": 64,
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "global_head_dim": 128,
        "sliding_window": 128,
        "vocab_size": 128,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
        "max_position_embeddings": 512,
        "dtype": "bfloat16",
        **changes,
    }


def gemma3(layer_types: list[str], **changes) -> dict:
    """As `gemma4`, heads of all layers being alike."""
    return {
        **gemma4(layer_types, **changes),
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 64,
    }


BLOOM = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 128,
    "dtype": "bfloat16",
}
PER_LAYER = {"1": {"head_dim": 128}, "3": {"head_dim": 256}}
REFUSED = {
    "mla": (DEEPSEEK, "MLA models, whose cache has no KV heads; serve it without KV compression$"),
    "encoder-decoder": (WHISPER, "encoder-decoder"),
    "sliding-window": (MISTRAL, "sliding-window"),
    "alibi": (BLOOM, "ALiBi, which needs every key's position in the cache; serve it without"),
    "several groups": (
        gemma3([WINDOWED] + [FULL] * 3),
        "vLLM puts into several groups: 3 of them beside 1 with a sliding window$",
    ),
    "padded group": (
        gemma3([WINDOWED, FULL] * 5 + [WINDOWED]),
        "into a group that it pads: 5 of them beside 6 with a sliding window$",
    ),
    "padded by one layer": (
        gemma4([WINDOWED] * 3 + [FULL], global_head_dim=32),
        "into a group that it pads: 1 of them beside 3 with a sliding window$",
    ),
    "other heads": (
        gemma4([WINDOWED, FULL] * 2, per_layer_config=PER_LAYER),
        "the same KV heads in every layer of a kind; found 2 of size 128, 2 of size 256$",
    ),
}


def _engine_config(model: str, kv_compress, **settings):
    from vllm.engine.arg_utils import EngineArgs

    settings.setdefault("max_model_len", 256)
    return EngineArgs(
        model=model, additional_config={"kv_compress": kv_compress}, **settings
    ).create_engine_config()


def _model_of(config: dict, folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


GOOD = {"method": "snapkv", "budget": 128}


@pytest.mark.parametrize(
    ("kv_compress", "message"),
    [
        ({"method": "best"}, "unknown KV-compression method 'best'; known: snapkv, pyramidkv"),
        ({"methd": "snapkv"}, "unknown key 'methd' in kv_compress; did you mean 'method'"),
        ("pyramid", "unknown KV-compression method 'pyramid' .did you mean 'pyramidkv'"),
        (7, "kv_compress must be a mapping, a method's name or true, got int 7"),
        ({"method": "h2o", "budget": 63}, r"63 is smaller than .* \(32 \+ 32 = 64 tokens\)"),
        ({"method": "snapkv", "ratio": 1.0}, r"ratio must be in \[0, 1\).*1.0"),
        ({"method": "snapkv", "ratio": -0.1}, r"ratio must be in \[0, 1\).*-0.1"),
        ({"method": "snapkv", "ratio": 0.5, "budget": 99}, r"\(99\) and ratio \(0.5\) exclude"),
        ({"method": "snapkv", "beta": 3.0}, "unknown option 'beta' .* it takes: .*pool_kernel"),
        ({"method": "snapkv", "pool_kernel": 4}, "'pool_kernel' must be one of"),
        ({"method": "tova", "budgets": "ada"}, "cannot be combined .* all heads of a layer alike"),
        ({"method": "tova", "suffix_tokens": -1}, "'suffix_tokens' must be at least 0"),
        ({"method": "tova", "budgets": "static"}, "budgets 'static' need the option 'table'"),
        (
            {"method": "tova", "budgets": "static", "table": [1, 2, 3]},
            "the budget table has 3 layers, the model 30",
        ),
        (
            {"method": "tova", "budgets": "static", "table": [[1, 2]] * 30},
            "the budget table has 2 heads, the model 3",
        ),
        (
            {"method": "tova", "budgets": "static", "table": "no/such/file.json"},
            "names a file that cannot be read .No such file",
        ),
    ],
)
def test_bad_setting(model, kv_compress, message) -> None:
    with pytest.raises(KVCompressConfigError, match=message) as error:
        _engine_config(model, kv_compress)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pipeline_parallel_size": 2},
            "pipeline parallelism; use --tensor-parallel-size instead of --pipeline-parallel-size$",
        ),
        (
            {"kv_cache_dtype": "fp8"},
            "KV cache dtype 'fp8'; use --kv-cache-dtype auto, float16, bfloat16 or float32$",
        ),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "a KV transfer connector; drop --kv-transfer-config$",
        ),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding; drop --speculative-config$",
        ),
        ({"worker_cls": "some.other.Worker"}, "cannot use 'some.other.Worker'; drop --worker-cls$"),
        (
            {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
            "cannot use 'vllm.v1.worker.cpu_worker.CPUWorker'; drop --worker-cls$",
        ),
        ({"block_size": 24}, "must be a multiple of 16, got 24; try 32$"),
        ({"runner": "pooling"}, "pooling models .*; serve it without KV compression$"),
        ({"tensor_parallel_size": 9, "decode_context_parallel_size": 3}, "decode context"),
    ],
)
def test_feature_that_does_not_combine(model, settings, message) -> None:
    with pytest.raises(KVCompressConfigError, match=message) as error:
        _engine_config(model, GOOD, **settings)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None and error.value.__context__ is None


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("kv_compres", "'kv_compress'"),
        ("kv-compress", "'kv_compress'"),
        ("kvCompression", "'kv_compress'"),
        ("kv_compress_budget", '{"kv_compress": {"budget": ...}}'),
        ("kv_compress_ration", '{"kv_compress": {"ratio": ...}}'),
    ],
)
def test_misspelt_key_of_additional_config(model, key, meant) -> None:
    from vllm.engine.arg_utils import EngineArgs

    message = f"unknown key {key!r} in additional_config; did you mean {meant}?"
    arguments = EngineArgs(model=model, max_model_len=256, additional_config={key: "span"})
    with pytest.raises(KVCompressConfigError, match=f"^{re.escape(message)}$"):
        arguments.create_engine_config()


def test_keys_of_others_are_left_alone() -> None:
    import dataclasses

    from vllm.engine.arg_utils import AsyncEngineArgs

    others = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    assert len(others) > 100
    for name in (*others, "compress", "kv_cache", "kv_connector", "gdn_prefill_backend", 7):
        assert not is_misspelt_setting(name)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"kv_compress_budgte": 5},
            "unknown argument 'kv_compress_budgte' (did you mean 'kv_compress_budget'?); there are "
            "kv_compress, kv_compress_budget, kv_compress_ratio, kv_compress_window, "
            "kv_compress_options",
        ),
        ({"kv_compres": "span"}, "unknown argument 'kv_compres' (did you mean 'kv_compress'?)"),
        ({"kv_compress": "span", "additional_config": {"kv_compres": 1}}, "unknown key 'kv_compr"),
        (
            {"kv_compress": "span", "additional_config": {"kv_compress": "h2o"}},
            "KV-compression method is given twice: 'h2o' and 'span'; give one",
        ),
        (
            {"kv_compress_budget": 64, "additional_config": {"kv_compress": False}},
            "kv_compress is false in additional_config, but a setting is given beside it",
        ),
        (
            {"kv_compress": False, "additional_config": {"kv_compress": True}},
            "kv_compress is False, but additional_config has a kv_compress; drop one of them",
        ),
        ({"kv_compress_budget": 39}, "budget 39 is smaller than"),
    ],
)
def test_offline_mistake_is_one_exception(model, keywords, message) -> None:
    from vllm_kvcompress import LLM

    children = multiprocessing.active_children()
    with pytest.raises(KVCompressConfigError) as error:
        LLM(model, max_model_len=256, **keywords)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None and error.value.__context__ is None
    assert multiprocessing.active_children() == children


@pytest.mark.parametrize(
    ("keywords", "setting"),
    [
        ({}, None),
        ({"kv_compress": False, "kv_compress_budget": 512}, None),
        ({"additional_config": {"kv_compress": False}}, None),
        ({"kv_compress": True}, {"method": "span", "budget": 2048}),
        ({"kv_compress_ratio": 0.5}, {"method": "span", "ratio": 0.5}),
        ({"additional_config": {"kv_compress": True}}, {"method": "span", "budget": 2048}),
        (
            {"kv_compress": "h2o", "additional_config": {"kv_compress": {"budget": 99}}},
            {"method": "h2o", "budget": 99},
        ),
    ],
)
def test_offline_ways_to_ask(monkeypatch, keywords, setting) -> None:
    import vllm

    from vllm_kvcompress import LLM

    passed = {}
    monkeypatch.setattr(vllm.LLM, "__init__", lambda self, **given: passed.update(given))
    LLM("model", **keywords)
    got = passed["additional_config"].get("kv_compress") or None
    if setting is None:
        assert got is None
    else:
        assert {key: got.get(key) for key in setting} == setting


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_model_that_cannot_be_compressed(config, message, tmp_path) -> None:
    model = _model_of(config, tmp_path)
    with pytest.raises(KVCompressConfigError, match=message) as error:
        _engine_config(model, GOOD, skip_tokenizer_init=True, block_size=32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kv_compress", "settings", "message"),
    [
        (GOOD, {"kv_sharing_fast_prefill": True}, "drop --kv-sharing-fast-prefill$"),
        (
            {"method": "expected-attention", "budget": 128},
            {"model_impl": "transformers"},
            "expected-attention on the transformers backend, .*; choose another method$",
        ),
    ],
)
def test_method_or_layers_that_do_not_combine(model, kv_compress, settings, message) -> None:
    with pytest.raises(KVCompressConfigError, match=message) as error:
        _engine_config(model, kv_compress, **settings)
    assert "\n" not in str(error.value)


def test_table_is_of_the_layers_that_are_compressed(tmp_path) -> None:
    # Of the four layers with full attention one has no cache of its own.
    config = gemma4([WINDOWED, FULL] * 4, num_kv_shared_layers=2)
    model = _model_of(config, tmp_path)
    setting = {**GOOD, "budgets": "static", "table": [1.0, 2.0, 3.0]}
    _engine_config(model, setting, skip_tokenizer_init=True)
    setting["table"] = [1.0] * 4
    with pytest.raises(KVCompressConfigError, match="has 4 layers, the model 3"):
        _engine_config(model, setting, skip_tokenizer_init=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_head_dim": 512}, "64, 80, 96, 128, 256 on a GPU; those .* have 512$"),
        (
            {"num_attention_heads": 34},
            "at most 16 query heads per KV head on a GPU; this model has 17$",
        ),
        ({}, None),
    ],
)
def test_heads_that_a_gpu_cannot_take(changes, message, tmp_path) -> None:
    model = _model_of(gemma4([WINDOWED, FULL] * 2, **changes), tmp_path)
    vllm_config = _engine_config(model, GOOD, skip_tokenizer_init=True)
    # As on a GPU. vLLM has chosen Triton's attention, where heads differ and there is no FA 4.
    vllm_config.parallel_config.worker_cls = CUDA.worker
    if message is None:
        vllm_config.attention_config.backend = None
    setting = KVCompressConfig.from_dict(GOOD)
    if message is None:
        check_engine_config(vllm_config, setting)
    else:
        with pytest.raises(KVCompressConfigError, match=message):
            check_engine_config(vllm_config, setting)


def test_compression_brings_its_own_scheduler(model) -> None:
    own = "vllm_kvcompress.vllm_integration.scheduler.scheduler.KVCompressScheduler"
    assert _engine_config(model, GOOD).scheduler_config.scheduler_cls == own
    again = _engine_config(model, GOOD, scheduler_cls=own)
    assert again.scheduler_config.scheduler_cls == own
    with pytest.raises(KVCompressConfigError, match=r"cannot use 'some\.other\.Scheduler'"):
        _engine_config(model, GOOD, scheduler_cls="some.other.Scheduler")


def test_with_asynchronous_scheduling_it_brings_the_asynchronous_scheduler() -> None:
    from types import SimpleNamespace

    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from vllm_kvcompress.vllm_integration.validate import _use_own_scheduler

    # vLLM turns it off on CPUs, so that no engine of these tests can have it.
    scheduler = SimpleNamespace(async_scheduling=True, scheduler_cls=None)
    _use_own_scheduler(scheduler)
    assert issubclass(resolve_obj_by_qualname(scheduler.scheduler_cls), AsyncScheduler)


def test_table_from_a_file_is_checked_against_the_model(model, tmp_path) -> None:
    table = tmp_path / "table.json"
    setting = {**GOOD, "budgets": "static", "table": str(table)}
    table.write_text(json.dumps([1.5] * 30))
    _engine_config(model, setting)
    table.write_text(json.dumps([1.5] * 29))
    with pytest.raises(KVCompressConfigError, match="has 29 layers, the model 30") as error:
        _engine_config(model, setting)
    assert "\n" not in str(error.value)


def test_unsupported_vllm_version(model, monkeypatch) -> None:
    import vllm

    from vllm_kvcompress.vllm_integration.compat import UnsupportedVLLMError

    for version in ("0.31.2", "0.34.0", "dev"):
        monkeypatch.setattr(vllm, "__version__", version)
        with pytest.raises(UnsupportedVLLMError, match=f"<0.34,>=0.32.0; found vLLM {version}"):
            _engine_config(model, GOOD)


def test_settings_that_are_fine_reach_the_engine_config(model) -> None:
    config = _engine_config(model, {**GOOD, "pool_kernel": 5, "options": {"pool_kind": "avg"}})
    assert config.additional_config["kv_compress"]["options"]["pool_kernel"] == 5
    assert config.additional_config["kv_compress"]["options"]["pool_kind"] == "avg"
    assert config.cache_config.block_size == 32
    assert config.parallel_config.worker_cls.endswith("KVCompressCPUWorker")
    kept = _engine_config(model, GOOD, block_size=64)
    assert kept.cache_config.block_size == 64


def _end_of_serve(*arguments: str) -> str:
    """What `vllm serve` prints last of all, which must be a line of ours and no traceback."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "COLUMNS": "80"}
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr + result.stdout
    assert "EngineCore" not in result.stderr + result.stdout
    *others, last = result.stderr.strip().splitlines()
    assert not [line for line in others if "KVCompressConfigError" in line or "usage:" in line]
    return last


def test_serve_stops_with_one_last_line(model) -> None:
    last = _end_of_serve(model, "--kv-compress", "snapkv", "--kv-compress-budget", "40")
    assert last == (
        "vllm: error: KV-compression budget 40 is smaller than the tokens always kept plus one "
        "page (16 + 32 = 48 tokens); give 48 or more"
    )


def test_serve_tells_where_the_model_goes(model) -> None:
    last = _end_of_serve("--kv-compress", model)
    assert (
        f" serve: error: argument --kv-compress: {model!r} looks like a model, not a "
        "KV-compression method; put MODEL before --kv-compress (methods: snapkv, "
    ) in last


def test_serve_refuses_a_feature_in_one_line(model) -> None:
    last = _end_of_serve(model, "--kv-compress", "--kv-cache-dtype", "fp8")
    assert last.startswith("vllm: error: KV compression does not support KV cache dtype 'fp8'; use")


def test_serve_refuses_a_model_in_one_line(tmp_path) -> None:
    model = _model_of(gemma3([WINDOWED] + [FULL] * 3), tmp_path)
    last = _end_of_serve(model, "--kv-compress", "--skip-tokenizer-init")
    assert last == (
        "vllm: error: KV compression does not support models whose layers with full attention "
        "vLLM puts into several groups: 3 of them beside 1 with a sliding window"
    )
