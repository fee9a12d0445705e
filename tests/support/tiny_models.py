"""Models with random weights, small enough to run in no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WINDOWED, FULL = "sliding_attention", "full_attention"
# Of every builder below; heads as CPU and GPU kernels take them.
_COMMON = {
    "vocab_size": 49152,
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def make_model(folder: Path, tokenizer: str, config: Any) -> str:
    """A random causal language model of a transformers config, in float32; returns its folder.

    Args:
        folder: to write to.
        tokenizer: model folder whose tokenizer it gets.
        config: with at least its tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    # Their logits are not divided by the root of the head size.
    is_unscaled = config.model_type in ("gemma3n_text", "gemma4_text")
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            # As drawn, no token would matter more than another.
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(8)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                if is_unscaled:
                    weight.mul_(0.5)
                else:
                    weight.add_(1)
            elif name.endswith("sinks"):
                # From hardly anything to most of the attention, other in every head and layer.
                weight.copy_(torch.linspace(-2.0, 18.0, len(weight))[torch.randperm(len(weight))])
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def tiny_llama(folder: Path, tokenizer: str, **changes: Any) -> str:
    """Three layers of full attention, GQA 3:1."""
    from transformers import LlamaConfig

    config = LlamaConfig(**{**_COMMON, "num_hidden_layers": 3, **changes})
    return make_model(folder, tokenizer, config)


def tiny_qwen3(folder: Path, tokenizer: str, **changes: Any) -> str:
    """Three layers whose queries and keys are normalised, GQA 3:1."""
    from transformers import Qwen3Config

    config = Qwen3Config(**{**_COMMON, "num_hidden_layers": 3, **changes})
    return make_model(folder, tokenizer, config)


def tiny_gemma3(folder: Path, tokenizer: str, layer_types: list[str], **changes: Any) -> str:
    """Windows of 128 tokens and full attention, as `layer_types` mixes them, GQA 3:1."""
    from transformers import Gemma3TextConfig

    settings = {
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "sliding_window": 128,
        "query_pre_attn_scalar": 64,
    }
    return make_model(folder, tokenizer, Gemma3TextConfig(**{**_COMMON, **settings, **changes}))


def tiny_gpt_oss(folder: Path, tokenizer: str, sliding_window: int | None, **changes: Any) -> str:
    """Four layers with attention sinks and four experts, every other with a window; GQA 3:1.

    Args:
        folder, tokenizer: as in `make_model`.
        sliding_window: tokens; None = full attention in all layers.
        changes: of the config.
    """
    from transformers import GptOssConfig

    settings = {
        "num_hidden_layers": 4,
        "layer_types": [FULL if sliding_window is None else WINDOWED, FULL] * 2,
        "sliding_window": sliding_window,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    return make_model(folder, tokenizer, GptOssConfig(**{**_COMMON, **settings, **changes}))


def tiny_gemma4(
    folder: Path, tokenizer: str, layer_types: list[str], head_size: int = 128, **changes: Any
) -> str:
    """As `tiny_gemma3`, but heads of the full-attention layers have a size of their own.

    Args:
        folder, tokenizer: as in `make_model`.
        layer_types: the last has full attention.
        head_size: of the layers with full attention; others have 64.
        changes: of the config; `num_kv_shared_layers` makes the last layers share.
    """
    from transformers import Gemma4TextConfig

    settings = {
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "sliding_window": 128,
        "global_head_dim": head_size,
        "vocab_size_per_layer_input": 49152,
        "hidden_size_per_layer_input": 16,
    }
    return make_model(folder, tokenizer, Gemma4TextConfig(**{**_COMMON, **settings, **changes}))


def tiny_gemma3n(
    folder: Path, tokenizer: str, layer_types: list[str], num_shared: int, **changes: Any
) -> str:
    """As `tiny_gemma3`, with layers at the end that read the keys of earlier ones.

    Args:
        folder, tokenizer: as in `make_model`.
        layer_types: the last two of those with keys of their own have a window and full attention.
        num_shared: layers at the end that have none.
        changes: of the config.
    """
    from transformers import Gemma3nTextConfig

    settings = {
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "sliding_window": 128,
        "num_kv_shared_layers": num_shared,
        "intermediate_size": 256,
        "activation_sparsity_pattern": [0.0] * len(layer_types),
        "vocab_size_per_layer_input": 49152,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 16,
    }
    return make_model(folder, tokenizer, Gemma3nTextConfig(**{**_COMMON, **settings, **changes}))
