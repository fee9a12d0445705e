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


def make_model(folder: Path, tokenizer: str, config: object) -> str:
    """A random causal language model of a transformers config, in float32; returns its folder.

    Args:
        folder: to write to.
        tokenizer: model folder whose tokenizer it gets.
        config: with at least its tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            # As drawn, no token would matter more than another.
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(8)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
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
