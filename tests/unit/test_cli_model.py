"""What `vllm-kvcompress plan` reads from a model's config, and which models it refuses."""

from __future__ import annotations

import pytest
from cli_runs import FULL, LLAMA, MIXED, WINDOWED, one_line_error, write_model

from vllm_kvcompress.cli.model import ModelShape, _max_len, _read_configs, read_shape
from vllm_kvcompress.config import KVCompressConfigError


@pytest.mark.parametrize(
    ("changes", "cache_dtype", "expected"),
    [
        ({}, "auto", ModelShape(4, 2, 8, "bfloat16", max_len=2048)),
        ({"dtype": "float16"}, "auto", ModelShape(4, 2, 8, "float16", max_len=2048)),
        # vLLM serves these in half precision.
        ({"dtype": "float32"}, "auto", ModelShape(4, 2, 8, "bfloat16", max_len=2048)),
        ({"dtype": None}, "auto", ModelShape(4, 2, 8, "bfloat16", max_len=2048)),
        ({}, "float32", ModelShape(4, 2, 8, "float32", max_len=2048)),
        ({"head_dim": None}, "auto", ModelShape(4, 2, 8, "bfloat16", max_len=2048)),
        ({"num_key_value_heads": None}, "auto", ModelShape(4, 4, 8, "bfloat16", max_len=2048)),
    ],
)
def test_shape_of_a_model(tmp_path, changes, cache_dtype, expected):
    config = {key: value for key, value in {**LLAMA, **changes}.items() if value is not None}
    assert read_shape(write_model(tmp_path / "model", config), cache_dtype) == expected


def test_shape_of_the_language_model_of_a_multimodal_one(tmp_path):
    text = {**LLAMA, "num_hidden_layers": 3}
    del text["dtype"]
    config = {"model_type": "llava", "dtype": "float16", "text_config": text}
    shape = ModelShape(3, 2, 8, "float16", max_len=2048)
    assert read_shape(write_model(tmp_path / "model", config)) == shape


@pytest.mark.parametrize(
    ("changes", "max_len"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 4096),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 512,
                }
            },
            2048,
        ),
        ({"model_max_length": 700}, 700),
        ({"model_type": "bloom"}, None),
    ],
)
def test_length_of_a_model(tmp_path, changes, max_len):
    _, text_config = _read_configs(write_model(tmp_path / "model", {**LLAMA, **changes}))
    assert _max_len(text_config) == max_len


@pytest.mark.parametrize(
    ("config", "num_kv_heads"),
    [
        ({"new_decoder_architecture": False, "multi_query": True}, 1),
        ({"new_decoder_architecture": False, "multi_query": False}, 4),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2),
    ],
)
def test_kv_heads_of_falcon(tmp_path, config, num_kv_heads):
    falcon = {"model_type": "falcon", "num_attention_heads": 4, "hidden_size": 32, **config}
    assert read_shape(write_model(tmp_path / "model", falcon)).num_kv_heads == num_kv_heads


@pytest.mark.parametrize(
    ("num_heads", "ranks", "message"),
    [
        (4, 3, "4 attention heads cannot be split over 3 ranks"),
        (6, 3, "2 KV heads cannot be split over 3 ranks"),
    ],
)
def test_heads_that_cannot_be_split(tmp_path, num_heads, ranks, message):
    config = {**LLAMA, "num_attention_heads": num_heads, "hidden_size": 8 * num_heads}
    with pytest.raises(KVCompressConfigError, match=message):
        read_shape(write_model(tmp_path / "model", config), tensor_parallel_size=ranks)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "deepseek_v3"}, "MLA models"),
        ({"model_type": "t5"}, "encoder-decoder models"),
        ({"model_type": "mamba"}, "attention-free models"),
        ({"model_type": "jamba"}, "other layers than full attention (linear_attention)"),
        ({"model_type": "llama4"}, "(chunked_attention)"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding-window layers"),
        (
            {**LLAMA, **MIXED, "num_hidden_layers": 4, "layer_types": [WINDOWED] + [FULL] * 3},
            "into several groups: 3 of them beside 1 with a sliding window",
        ),
        (
            {**LLAMA, **MIXED, "num_hidden_layers": 7, "layer_types": [WINDOWED] * 4 + [FULL] * 3},
            "into a group that it pads: 3 of them beside 4",
        ),
        ({**LLAMA, **MIXED, "layer_types": [WINDOWED] * 6}, "sliding-window layers only"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "mpt"}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        (
            {**LLAMA, "quantization_config": {"kv_cache_scheme": {"num_bits": 8}}},
            "quantized KV caches",
        ),
        ({**LLAMA, "dtype": "float8_e4m3fn"}, "float8_e4m3fn is no dtype of a KV cache"),
        ({**LLAMA, "num_hidden_layers": "four"}, "cannot read the config of model"),
        ({"model_type": "no such model"}, "cannot read the config of model"),
        ({}, "cannot read the config of model"),
    ],
)
def test_models_that_cannot_be_compressed(capsys, tmp_path, config, message):
    folder = write_model(tmp_path / "model", config)
    error = one_line_error(capsys, "plan", folder, "--kv-compress", "snapkv", "--prompt-len", "9")
    assert message in error


@pytest.mark.parametrize("sliding_window", [None, 64])
def test_windows_that_are_not_in_use_are_no_problem(tmp_path, sliding_window):
    config = {
        **LLAMA,
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": sliding_window,
    }
    assert read_shape(write_model(tmp_path / "model", config)).num_layers == 4


def test_a_folder_without_a_config(capsys, tmp_path):
    error = one_line_error(
        capsys, "plan", str(tmp_path), "--kv-compress", "snapkv", "--prompt-len", "9"
    )
    assert "cannot read the config of model" in error
