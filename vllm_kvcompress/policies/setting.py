"""What policies read of a setting, which names them: `config.KVCompressConfig` has it all."""

from __future__ import annotations

from typing import Any, Protocol

from vllm_kvcompress.policies.recipes import Recipe


class Setting(Protocol):
    """A validated setting."""

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """Name and value of all options of its method."""

    @property
    def recipe(self) -> Recipe:
        """Scorer and budgets that its method names."""

    @property
    def granularity(self) -> str:
        """'page' or 'token'."""

    def option(self, name: str) -> Any:
        """The value of one option."""
