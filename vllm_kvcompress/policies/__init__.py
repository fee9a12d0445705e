"""What to keep: scorers (one paper per file), budgets, and the named recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvcompress.policies.recipes import RECIPES, SCORERS, Recipe

if TYPE_CHECKING:
    from vllm_kvcompress.config import KVCompressConfig
    from vllm_kvcompress.policies.base import Scorer

__all__ = ["RECIPES", "Recipe", "make_scorer", "scorer_class"]


def scorer_class(name: str) -> type[Scorer]:
    """The class behind a key of `recipes.SCORERS`."""
    # Imported here so that the recipes can be read without torch.
    from vllm_kvcompress.policies.chunkkv import ChunkKV
    from vllm_kvcompress.policies.criticalkv import CriticalKV
    from vllm_kvcompress.policies.defensivekv import DefensiveKV
    from vllm_kvcompress.policies.expected_attention import ExpectedAttention
    from vllm_kvcompress.policies.h2o import H2O
    from vllm_kvcompress.policies.keydiff import KeyDiff
    from vllm_kvcompress.policies.knorm import KNorm
    from vllm_kvcompress.policies.random import Random
    from vllm_kvcompress.policies.snapkv import SnapKV
    from vllm_kvcompress.policies.span import Span
    from vllm_kvcompress.policies.span_keydiff import SpanKeyDiff
    from vllm_kvcompress.policies.streamingllm import StreamingLLM
    from vllm_kvcompress.policies.tova import TOVA

    classes: dict[str, type[Scorer]] = {
        "chunkkv": ChunkKV,
        "critical": CriticalKV,
        "defensive": DefensiveKV,
        "expected-attention": ExpectedAttention,
        "h2o": H2O,
        "keydiff": KeyDiff,
        "knorm": KNorm,
        "random": Random,
        "snapkv": SnapKV,
        "span": Span,
        "span-keydiff": SpanKeyDiff,
        "streamingllm": StreamingLLM,
        "tova": TOVA,
    }
    return classes[name]


def make_scorer(config: KVCompressConfig) -> Scorer:
    """The scorer that `config.method` names, with its options set."""
    name = config.recipe.scorer
    options = dict(config.options)
    # 'first_stage' is the selection's business: it depends on each head's budget.
    names = [key for key in SCORERS[name].options if key != "first_stage"]
    return scorer_class(name)(**{key: options[key] for key in names})
