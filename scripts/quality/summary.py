"""From single results to one row per method, ratio, mode and task; CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import exp
from pathlib import Path
from statistics import fmean
from typing import Any

from quality.intervals import bootstrap, mean_interval

GROUP = ("engine", "model", "block_size", "mode", "task", "method", "ratio")
COLUMNS = (
    *GROUP,
    "n",
    "score",
    "low",
    "high",
    "full_score",
    "kl",
    "kl_low",
    "kl_high",
    "perplexity",
    "full_perplexity",
    "kept_asked",
    "kept_fraction",
    "kept_tokens",
    "prompt_tokens",
)
# Tasks whose mean is the overall score; the others are probes of their own.
ALL_TASKS = "all tasks"
PROBES = ("prose", "summary")


def summarise(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per group of `GROUP`, sorted, and one per method over all scored tasks.

    Scores are means with a 95 % interval; kept tokens are what the engine really kept, as a
    share of the part of the prompt that was compacted.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in GROUP)].append(row)
        if row["task"] not in PROBES:
            overall = {**row, "task": ALL_TASKS}
            groups[tuple(overall[name] for name in GROUP)].append(row)
    full = {
        key[:-2]: group for key, group in groups.items() if key[GROUP.index("method")] == "full"
    }
    out = []
    for key, group in sorted(groups.items(), key=lambda item: tuple(map(str, item[0]))):
        out.append(_summary(dict(zip(GROUP, key, strict=True)), group, full.get(key[:-2], [])))
    return out


def _summary(
    row: dict[str, Any], group: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    row["n"] = len(group)
    row["kept_asked"] = 1 - row["ratio"]
    # An endpoint does not tell what it keeps.
    if all(r["kept_tokens"] is not None for r in group):
        row["kept_fraction"] = fmean(
            (r["kept_tokens"] - r["suffix_tokens"]) / (r["prompt_len"] - r["suffix_tokens"])
            for r in group
        )
        row["kept_tokens"] = fmean(r["kept_tokens"] for r in group)
    row["prompt_tokens"] = fmean(r["prompt_len"] for r in group)
    if row["task"] == "prose":
        kl = [r["kl"] for r in group]
        row["kl"] = fmean(kl)
        row["kl_low"], row["kl_high"] = bootstrap(kl)
        row["perplexity"] = _perplexity(group)
        row["full_perplexity"] = _perplexity(full) if full else None
    else:
        scores = [r["score"] for r in group]
        row["score"] = fmean(scores)
        row["low"], row["high"] = mean_interval(scores)
        row["full_score"] = fmean(r["score"] for r in full) if full else None
    return row


def _perplexity(group: Sequence[dict[str, Any]]) -> float:
    return exp(fmean(r["nll"] for r in group))


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as CSV, numbers to 5 significant digits."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _short(row.get(name)) for name in COLUMNS})


def write_json(path: Path, rows: Sequence[dict[str, Any]], run: dict[str, Any]) -> None:
    """The same rows with what was run: versions, command, seed, texts."""
    short = [{name: _short(row[name]) for name in COLUMNS if name in row} for row in rows]
    path.write_text(json.dumps({"run": run, "rows": short}, indent=1) + "\n")


def _short(value: Any) -> Any:
    if value is None:
        return ""
    return float(f"{value:.5g}") if isinstance(value, float) else value
