"""What is compared: stock vLLM and settings of this plugin."""

from __future__ import annotations

import json
from dataclasses import dataclass

from quality.settings import Method


@dataclass(frozen=True)
class Variant:
    """One way to start the server.

    Attributes:
        label: as written on the command line: `stock`, `stock@BLOCK_SIZE`, or
            `METHOD[:option=value,...]@REMOVED`.
        method: None for stock vLLM.
        ratio: fraction of each prompt removed; 0 = nothing.
        block_size: where it differs from the run's.
    """

    label: str
    method: Method | None = None
    ratio: float = 0.0
    block_size: int | None = None

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read a label.

        Raises:
            ValueError: if it is not of one of the forms above.
            KVCompressConfigError: if the method or an option does not exist.
        """
        name, _, number = text.partition("@")
        if name == "stock":
            return cls(text, block_size=int(number) if number else None)
        if not number:
            raise ValueError(f"{text!r} does not say how much is removed: METHOD@REMOVED")
        return cls(text, Method.parse(name), float(number))

    def flags(self) -> list[str]:
        """Arguments of `vllm serve`."""
        if self.method is None:
            return []
        setting = self.method.setting(self.ratio)
        flags = ["--kv-compress", setting["method"], "--kv-compress-ratio", str(self.ratio)]
        if setting["window"] is not None:
            flags += ["--kv-compress-window", str(setting["window"])]
        return [*flags, "--kv-compress-options", json.dumps(setting["options"])]
