"""What to keep: scorers (one paper per file), budgets, and the named recipes."""

from __future__ import annotations

from vllm_kvcompress.policies.recipes import RECIPES, Recipe
from vllm_kvcompress.policies.registry import make_budgets, make_scorer, scorer_class

__all__ = ["RECIPES", "Recipe", "make_budgets", "make_scorer", "scorer_class"]
