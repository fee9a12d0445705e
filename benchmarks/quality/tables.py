"""Summary rows as Markdown tables: one line per method, one column per fraction removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quality.plan import FULL_METHOD, PROSE_TASK


def write_tables(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One table per question mode and task, methods of all engines in it, the best first.

    A cell is the mean with its 95 % interval, and the share of tokens really kept. Scores stand
    under the full cache's; prose shows the KL divergence from it in nats per token.
    """
    parts = []
    for mode in sorted({row["mode"] for row in rows}, reverse=True):
        of_mode = [row for row in rows if row["mode"] == mode]
        for task in dict.fromkeys(row["task"] for row in of_mode):
            parts.append(_table(mode, task, [row for row in of_mode if row["task"] == task]))
    path.write_text("\n".join(parts))


def _table(mode: str, task: str, rows: Sequence[dict[str, Any]]) -> str:
    value = "kl" if task == PROSE_TASK else "score"
    ratios = sorted({row["ratio"] for row in rows if row["method"] != FULL_METHOD})
    cells = {(row["engine"], row["method"], row["ratio"]): row for row in rows}
    names = {key[:2] for key in cells if key[1] != FULL_METHOD}

    def rank(name: tuple[str, str]) -> tuple[float, ...]:
        found = [cells[(*name, ratio)][value] for ratio in ratios if (*name, ratio) in cells]
        mean = sum(found) / len(found)
        return (-len(found), mean if value == "kl" else -mean)

    lines = [f"## {task}, {mode}", ""]
    lines.append("| method | " + " | ".join(f"{ratio:.2%} removed" for ratio in ratios) + " |")
    lines.append("|---|" + "---|" * len(ratios))
    full = [row for row in rows if row["method"] == FULL_METHOD and value in row]
    if value == "score":
        for row in full:
            shown = f"{row['score']:.2f}, n = {row['n']}"
            lines.append(f"| full cache ({row['engine']}) | {shown} |" + " |" * (len(ratios) - 1))
    for name in sorted(names, key=lambda name: (*rank(name), name)):
        engine, method = name
        shown = [_cell(cells.get((*name, ratio)), value) for ratio in ratios]
        lines.append(f"| {method} ({engine}) | " + " | ".join(shown) + " |")
    return "\n".join([*lines, ""])


def _cell(row: dict[str, Any] | None, value: str) -> str:
    if row is None:
        return ""
    low, high = ("kl_low", "kl_high") if value == "kl" else ("low", "high")
    digits = 4 if value == "kl" else 2
    text = f"{row[value]:.{digits}f} [{row[low]:.{digits}f}, {row[high]:.{digits}f}]"
    kept = row.get("kept_fraction")
    return text if kept is None else f"{text}, {kept:.1%} kept"
