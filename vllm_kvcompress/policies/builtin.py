"""Classes of this package by their names in the manifest, imported when they are asked for."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.policies.recipes import BUDGETS

if TYPE_CHECKING:
    from vllm_kvcompress.policies.budgets.base import Budgets


def budgets_class(name: str) -> type[Budgets]:
    """The class of budgets, by a key of `recipes.BUDGETS`; KeyError if there are none such."""
    return load_class("budgets", BUDGETS[name])


@functools.cache
def load_class(folder: str, place: str) -> Any:
    """The class at `module:Class` in a folder of policies."""
    module, _, name = place.partition(":")
    return getattr(import_module(f"vllm_kvcompress.policies.{folder}.{module}"), name)
