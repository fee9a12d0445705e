"""Results of single samples in one JSON-lines file, so that a run can be cut off and go on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KEY = ("engine", "model", "method", "ratio", "mode", "block_size", "seed", "task", "sample_id")


class Store:
    """Appends rows to a file and knows which keys are there.

    Args:
        path: of the file; created with its folder when missing.

    Raises:
        SystemExit: if a line of the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = path.read_text().splitlines()
            for number, line in enumerate(lines, 1):
                try:
                    self.rows.append(json.loads(line))
                except json.JSONDecodeError:
                    if number < len(lines):
                        raise SystemExit(f"{path}, line {number} is not JSON") from None
                    # The run before was cut off inside its last line.
                    path.write_text("".join(f"{good}\n" for good in lines[:-1]))
        self._keys = {self._key(row) for row in self.rows}

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in KEY)

    def has(self, **key: Any) -> bool:
        """Whether a row with exactly this key is there."""
        return self._key(key) in self._keys

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows; each must have every field of `KEY`."""
        with self.path.open("a") as file:
            for row in rows:
                file.write(json.dumps(row, sort_keys=True) + "\n")
                self.rows.append(row)
                self._keys.add(self._key(row))
