"""Which methods, how much removed, which question mode: what a quality run goes through."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies.recipes import RECIPES

MODES = ("aware", "agnostic")


@dataclass(frozen=True)
class Method:
    """A method with its options, as named on the command line.

    Attributes:
        label: how it is written: NAME or NAME:option=value,option=value.
        name: of the recipe.
        window: tokens of the scoring window; None = the method's own.
        options: of the recipe.
    """

    label: str
    name: str
    window: int | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read NAME[:option=value,...]; values are JSON or bare words, `window` among them.

        Raises:
            KVCompressConfigError: if the method or an option does not exist.
        """
        name, _, rest = text.partition(":")
        options: dict[str, Any] = {}
        for item in filter(None, rest.split(",")):
            key, _, value = item.partition("=")
            try:
                options[key] = json.loads(value)
            except json.JSONDecodeError:
                options[key] = value
        window = options.pop("window", None)
        method = cls(text, name, window, options)
        KVCompressConfig.from_dict(method.setting(0.5))
        return method

    def setting(self, ratio: float, suffix_tokens: int = 0) -> dict[str, Any]:
        """The mapping for `KVCompressConfig.from_dict`.

        Args:
            ratio: fraction removed.
            suffix_tokens: tokens at the prompt's end that are computed after compaction.
        """
        options = {**self.options, "suffix_tokens": suffix_tokens}
        return {"method": self.name, "window": self.window, "ratio": ratio, "options": options}


def parse_methods(text: str) -> list[Method]:
    """Methods separated by blanks or semicolons; 'all' = every recipe with its defaults."""
    words = text.replace(";", " ").split()
    names = [name for word in words for name in (RECIPES if word == "all" else [word])]
    return [Method.parse(name) for name in dict.fromkeys(names)]
