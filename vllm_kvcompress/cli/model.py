"""The shape of a model's KV cache, read from its config alone."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.config import KVCompressConfigError
from vllm_kvcompress.memory import PageFormat, cdiv
from vllm_kvcompress.memory.page_format import ELEMENT_BYTES
from vllm_kvcompress.model_layers import (
    FULL,
    WINDOWED,
    has_alibi,
    has_quantized_cache,
    mixed_layers,
    read_layers,
)

_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# Of these the config gives the length after scaling.
_SCALED_ROPES = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
_FULL_ATTENTION = {FULL, "attention"}


@dataclass(frozen=True)
class ModelShape:
    """What decides the size of a model's KV cache, on one tensor-parallel rank.

    Attributes:
        num_layers, num_kv_heads, head_size: of the layers with full attention and a cache of their
            own.
        dtype: of the cached numbers, a key of `ELEMENT_BYTES`.
        num_windowed_layers: layers with a sliding window beside them, which stay as they are.
        window_tokens: tokens that these see; 0 if there are none.
        windowed_per_block: most of these that share blocks; 0 if there are none.
        max_len: most tokens of a prompt and its output, or None if the config does not say.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: str
    num_windowed_layers: int = 0
    window_tokens: int = 0
    windowed_per_block: int = 0
    max_len: int | None = None

    def window_blocks(self, num_tokens: int, block_size: int) -> int:
        """Most blocks that the windowed layers of a request of `num_tokens` hold.

        vLLM puts them into groups, each with blocks of its own.
        """
        if not self.num_windowed_layers:
            return 0
        # A window may begin anywhere in its first block.
        seen = min(cdiv(num_tokens, block_size), cdiv(self.window_tokens - 1, block_size) + 1)
        return cdiv(self.num_windowed_layers, self.windowed_per_block) * seen

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block of `block_size` tokens: keys and values of its layers and heads."""
        page = PageFormat(self.dtype, block_size, self.head_size)
        return self.num_layers * self.num_kv_heads * page.num_bytes


def read_shape(model: str, cache_dtype: str = "auto", tensor_parallel_size: int = 1) -> ModelShape:
    """The KV-cache shape of a model on one rank.

    Args:
        model: folder with a config.json, or a hub name.
        cache_dtype: a key of `ELEMENT_BYTES`; 'auto' = the model's, as vLLM would serve it.
        tensor_parallel_size: ranks that the KV heads are split over, or copied to if they are
            fewer.

    Raises:
        KVCompressConfigError: if the model cannot be read, compressed or split.
    """
    config, text_config = _read_configs(model)
    problem = _problem(config, text_config)
    if problem is not None:
        raise KVCompressConfigError(f"KV compression does not support {problem}")
    layers = read_layers(text_config, tensor_parallel_size)
    layers.check_groups()
    if cache_dtype == "auto":
        cache_dtype = _served_dtype(config, text_config)
    full, windowed = layers.full, layers.windowed
    return ModelShape(
        full.num_layers,
        full.num_kv_heads,
        full.head_size,
        cache_dtype,
        windowed.num_layers,
        text_config.sliding_window if windowed.num_layers else 0,
        layers.windowed_per_block,
        _max_len(text_config),
    )


def _read_configs(model: str) -> tuple[Any, Any]:
    from transformers import AutoConfig

    try:
        # Not asked whether it may run the model's own code: it may not.
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        return config, config.get_text_config()
    except Exception as error:
        # Any kind: every config class checks its values in its own way.
        reason = textwrap.shorten(str(error), width=300, placeholder=" ...")
        message = f"cannot read the config of model {model!r}: {reason}"
        raise KVCompressConfigError(message) from None


def _problem(config: Any, text_config: Any) -> str | None:
    """What the engine would refuse, in the words of its own refusal where it has some."""
    layer_types = set(
        getattr(text_config, "layer_types", None)
        or getattr(text_config, "layers_block_type", None)
        or ()
    )
    if mixed_layers(text_config)[1]:
        layer_types -= {WINDOWED}
        has_window = False
    else:
        has_window = getattr(text_config, "sliding_window", None) is not None
    problems = (
        (getattr(text_config, "kv_lora_rank", None), "MLA models, whose cache has no KV heads"),
        (config.is_encoder_decoder, "encoder-decoder models"),
        (not getattr(text_config, "num_attention_heads", None), "attention-free models"),
        (
            (has_window and getattr(text_config, "use_sliding_window", True))
            or WINDOWED in layer_types,
            "models with sliding-window layers only",
        ),
        (
            layer_types - _FULL_ATTENTION,
            "models with other layers than full attention "
            f"({', '.join(sorted(layer_types - _FULL_ATTENTION))})",
        ),
        (has_alibi(text_config), "ALiBi, which needs every key's position in the cache"),
        (has_quantized_cache(config), "quantized KV caches, which this checkpoint asks for"),
    )
    return next((words for is_problem, words in problems if is_problem), None)


def _max_len(text_config: Any) -> int | None:
    """Most tokens that vLLM lets a request have by default, as far as the config says."""
    lengths = [getattr(text_config, key, None) for key in _LENGTH_KEYS]
    known = [length for length in lengths if length]
    if not known:
        return None
    length = getattr(text_config, "model_max_length", None) or min(known)
    # Gemma 3's length is that after scaling.
    if "gemma3" not in text_config.model_type:
        length *= _rope_factor(getattr(text_config, "rope_parameters", None) or {})
    return int(length)


def _rope_factor(parameters: dict[str, Any]) -> float:
    """What the positions are stretched by beyond the length that the config gives."""
    # Kinds of layers may have their own.
    kinds = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
    factors = [kind.get("factor") for kind in kinds if kind.get("rope_type") not in _SCALED_ROPES]
    return max(filter(None, factors), default=1.0)


def _served_dtype(config: Any, text_config: Any) -> str:
    dtype = getattr(config, "dtype", None) or getattr(text_config, "dtype", None) or "float32"
    name = str(dtype).removeprefix("torch.")
    if name not in ELEMENT_BYTES:
        raise KVCompressConfigError(
            f"the model's dtype {name} is no dtype of a KV cache; "
            f"give --kv-cache-dtype ({', '.join(ELEMENT_BYTES)})"
        )
    # vLLM serves float32 checkpoints in half precision unless told otherwise.
    return "bfloat16" if name == "float32" else name
