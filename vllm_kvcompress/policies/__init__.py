"""What to keep: scorers (one paper per file), budgets, and the named recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvcompress.policies.recipes import RECIPES, SCORER_OPTIONS, Recipe

if TYPE_CHECKING:
    from vllm_kvcompress.config import KVCompressConfig
    from vllm_kvcompress.policies.base import Scorer

__all__ = ["RECIPES", "Recipe", "make_scorer"]


def make_scorer(config: KVCompressConfig) -> Scorer:
    """The scorer that `config.method` names, with its options set."""
    # Imported here so that the recipes can be read without torch.
    from vllm_kvcompress.policies.knorm import KNorm
    from vllm_kvcompress.policies.random import Random
    from vllm_kvcompress.policies.snapkv import SnapKV
    from vllm_kvcompress.policies.streamingllm import StreamingLLM

    scorers: dict[str, type[Scorer]] = {
        "snapkv": SnapKV,
        "streamingllm": StreamingLLM,
        "knorm": KNorm,
        "random": Random,
    }
    name = config.recipe.scorer
    options = dict(config.options)
    return scorers[name](**{key: options[key] for key in SCORER_OPTIONS[name]})
