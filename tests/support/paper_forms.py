"""Settings of methods as their papers have them."""

from __future__ import annotations

from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies.recipes import RECIPES


def paper_options(method):
    """Options for a method's published form, keeping single tokens."""
    form = {} if RECIPES[method].published is None else {"published": True}
    return {**form, "granularity": "token"}


def token_config(method, **options):
    """A method in its published form, keeping single tokens; options override either."""
    options = {**paper_options(method), **options}
    return KVCompressConfig(method, budget=999, options=tuple(options.items()))
