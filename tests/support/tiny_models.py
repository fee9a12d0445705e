"""Models with random weights, small enough to run in no time."""

from __future__ import annotations

from pathlib import Path

import torch


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
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)
