"""The shape of a model's KV cache, read from its config alone."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.config import KVCompressConfigError
from vllm_kvcompress.memory import cdiv

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# As vLLM asks for them, in this order.
_KV_HEAD_KEYS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num")
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
_FULL, _WINDOWED = "full_attention", "sliding_attention"
_FULL_ATTENTION = {_FULL, "attention"}


@dataclass(frozen=True)
class ModelShape:
    """What decides the size of a model's KV cache, on one tensor-parallel rank.

    Attributes:
        num_layers, num_kv_heads, head_size: of the layers with full attention.
        dtype: of the cached numbers, a key of `DTYPE_BYTES`.
        num_windowed_layers: layers with a sliding window beside them, which stay as they are.
        window_tokens: tokens that these see; 0 if there are none.
        max_len: most tokens of a prompt and its output, or None if the config does not say.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: str
    num_windowed_layers: int = 0
    window_tokens: int = 0
    max_len: int | None = None

    def window_blocks(self, num_tokens: int, block_size: int) -> int:
        """Most blocks that the windowed layers of a request of `num_tokens` hold.

        vLLM puts them into groups of `num_layers`, each with blocks of its own.
        """
        # A window may begin anywhere in its first block.
        seen = min(cdiv(num_tokens, block_size), cdiv(self.window_tokens - 1, block_size) + 1)
        return cdiv(self.num_windowed_layers, self.num_layers) * seen

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block of `block_size` tokens: keys and values of its layers and heads."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_size
        return per_token * DTYPE_BYTES[self.dtype] * block_size


def read_shape(model: str, cache_dtype: str = "auto", tensor_parallel_size: int = 1) -> ModelShape:
    """The KV-cache shape of a model on one rank.

    Args:
        model: folder with a config.json, or a hub name.
        cache_dtype: a key of `DTYPE_BYTES`; 'auto' = the model's, as vLLM would serve it.
        tensor_parallel_size: ranks that the KV heads are split over, or copied to if they are
            fewer.

    Raises:
        KVCompressConfigError: if the model cannot be read, compressed or split.
    """
    config, text_config = _read_configs(model)
    problem = _problem(config, text_config)
    if problem is not None:
        raise KVCompressConfigError(f"KV compression does not support {problem}")
    num_layers = getattr(text_config, "num_hidden_layers", None)
    if not num_layers:
        raise KVCompressConfigError("the model's config does not say how many layers there are")
    num_full, num_windowed = _mixed_layers(text_config)
    window_tokens = 0
    if num_windowed:
        num_layers, window_tokens = num_full, text_config.sliding_window
        _check_groups(num_full, num_windowed)
    num_heads = text_config.num_attention_heads
    head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads
    num_kv_heads = _local_kv_heads(num_heads, _num_kv_heads(text_config), tensor_parallel_size)
    if cache_dtype == "auto":
        cache_dtype = _served_dtype(config, text_config)
    return ModelShape(
        num_layers,
        num_kv_heads,
        head_size,
        cache_dtype,
        num_windowed,
        window_tokens,
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
    if _mixed_layers(text_config)[1]:
        layer_types -= {_WINDOWED}
        has_window = False
    else:
        has_window = getattr(text_config, "sliding_window", None) is not None
    attention = getattr(text_config, "attn_config", None)
    quantization = getattr(config, "quantization_config", None) or {}
    problems = (
        (getattr(text_config, "kv_lora_rank", None), "MLA models, whose cache has no KV heads"),
        (config.is_encoder_decoder, "encoder-decoder models"),
        (not getattr(text_config, "num_attention_heads", None), "attention-free models"),
        (
            (has_window and getattr(text_config, "use_sliding_window", True))
            or _WINDOWED in layer_types,
            "models with sliding-window layers only",
        ),
        (
            layer_types - _FULL_ATTENTION,
            "models with other layers than full attention "
            f"({', '.join(sorted(layer_types - _FULL_ATTENTION))})",
        ),
        (
            text_config.model_type == "bloom"
            or getattr(text_config, "alibi", False)
            or getattr(attention, "alibi", False),
            "ALiBi, which needs every key's position in the cache",
        ),
        (
            getattr(text_config, "num_kv_shared_layers", 0),
            "layers that share another layer's KV cache",
        ),
        (
            isinstance(quantization, dict) and quantization.get("kv_cache_scheme"),
            "quantized KV caches, which this checkpoint asks for",
        ),
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


def _mixed_layers(text_config: Any) -> tuple[int, int]:
    """Layers with full attention and with a window, in a model that has both; else 0, 0."""
    layer_types = list(getattr(text_config, "layer_types", None) or ())
    counts = layer_types.count(_FULL), layer_types.count(_WINDOWED)
    has_window = getattr(text_config, "sliding_window", None) is not None
    return counts if has_window and all(counts) else (0, 0)


def _check_groups(num_full: int, num_windowed: int) -> None:
    """Refuse what an engine refuses of how vLLM groups layers over one pool of blocks.

    Groups have as many layers as the rarer kind, or as the other if that has less than half more.
    """
    fewest, most = sorted((num_full, num_windowed))
    group_size = most if 2 * most < 3 * fewest else fewest
    if num_full != group_size:
        how = "several groups" if num_full > group_size else "a group that it pads"
        raise KVCompressConfigError(
            f"KV compression does not support models whose layers with full attention vLLM puts "
            f"into {how}: {num_full} of them beside {num_windowed} with a sliding window"
        )


def _num_kv_heads(text_config: Any) -> int:
    is_falcon = text_config.model_type == "falcon"
    if is_falcon and text_config.multi_query and not text_config.new_decoder_architecture:
        # Its num_kv_heads is then not in use.
        return 1
    attention = getattr(text_config, "attn_config", None)
    found = [getattr(text_config, key, None) for key in _KV_HEAD_KEYS]
    found.append(getattr(attention, "kv_n_heads", None))
    return next(filter(None, found), text_config.num_attention_heads)


def _local_kv_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> int:
    if num_heads % num_ranks:
        raise KVCompressConfigError(
            f"{num_heads} attention heads cannot be split over {num_ranks} ranks"
        )
    if max(num_kv_heads, num_ranks) % min(num_kv_heads, num_ranks):
        raise KVCompressConfigError(
            f"{num_kv_heads} KV heads cannot be split over {num_ranks} ranks"
        )
    return max(1, num_kv_heads // num_ranks)


def _served_dtype(config: Any, text_config: Any) -> str:
    dtype = getattr(config, "dtype", None) or getattr(text_config, "dtype", None) or "float32"
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise KVCompressConfigError(
            f"the model's dtype {name} is no dtype of a KV cache; "
            f"give --kv-cache-dtype ({', '.join(DTYPE_BYTES)})"
        )
    # vLLM serves float32 checkpoints in half precision unless told otherwise.
    return "bfloat16" if name == "float32" else name
