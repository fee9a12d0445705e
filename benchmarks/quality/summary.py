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

from quality.intervals import bootstrap, mean_interval, mean_of_means

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
    """One row per group of `GROUP`, sorted, and one over all scored tasks of a setting.

    Scores are means with a 95 % interval; kept tokens are what the engine really kept, as a
    share of the part of the prompt that was compacted. Over all tasks every task counts the
    same; a setting whose tasks are not those of its full cache gets no such row.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in GROUP)].append(row)
    settings: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = defaultdict(dict)
    for key, group in groups.items():
        task = key[GROUP.index("task")]
        if task not in PROBES:
            settings[_with_task(key, ALL_TASKS)][task] = group
    full = {_but_method(key): group for key, group in groups.items() if _is_full(key)}
    full_tasks = {_but_method(key): by_task for key, by_task in settings.items() if _is_full(key)}
    out = [
        _summary(dict(zip(GROUP, key, strict=True)), group, full.get(_but_method(key), []))
        for key, group in groups.items()
    ]
    for key, by_task in settings.items():
        reference = full_tasks.get(_but_method(key), {})
        if not reference or set(by_task) == set(reference):
            out.append(_overall(dict(zip(GROUP, key, strict=True)), by_task, reference))
    return sorted(out, key=lambda row: tuple(str(row[name]) for name in GROUP))


def _with_task(key: tuple[Any, ...], task: str) -> tuple[Any, ...]:
    i = GROUP.index("task")
    return (*key[:i], task, *key[i + 1 :])


def _but_method(key: tuple[Any, ...]) -> tuple[Any, ...]:
    return key[: GROUP.index("method")]


def _is_full(key: tuple[Any, ...]) -> bool:
    return key[GROUP.index("method")] == "full"


def _summary(
    row: dict[str, Any], group: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    row |= _sizes(row, group)
    if row["task"] == "prose":
        kl = [r["kl"] for r in group]
        row["kl"] = fmean(kl)
        row["kl_low"], row["kl_high"] = bootstrap(kl)
        row["perplexity"] = _perplexity(group)
        row["full_perplexity"] = _perplexity(full) if full else None
        return row
    scores = [r["score"] for r in group]
    row["score"] = fmean(scores)
    # Agreement is a share of a text even where all shares happen to be whole.
    row["low"], row["high"] = (bootstrap if row["task"] == "summary" else mean_interval)(scores)
    row["full_score"] = fmean(r["score"] for r in full) if full else None
    return row


def _overall(
    row: dict[str, Any],
    by_task: dict[str, list[dict[str, Any]]],
    full: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    row |= _sizes(row, [r for group in by_task.values() for r in group])
    scores = [[r["score"] for r in group] for group in by_task.values()]
    row["score"] = fmean(map(fmean, scores))
    row["low"], row["high"] = mean_of_means(scores)
    if full:
        row["full_score"] = fmean(fmean(r["score"] for r in group) for group in full.values())
    return row


def _sizes(row: dict[str, Any], group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sizes = {"n": len(group), "kept_asked": 1 - row["ratio"]}
    # An endpoint does not tell what it keeps.
    if all(r["kept_tokens"] is not None for r in group):
        sizes["kept_fraction"] = fmean(
            (r["kept_tokens"] - r["suffix_tokens"]) / (r["prompt_len"] - r["suffix_tokens"])
            for r in group
        )
        sizes["kept_tokens"] = fmean(r["kept_tokens"] for r in group)
    sizes["prompt_tokens"] = fmean(r["prompt_len"] for r in group)
    return sizes


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
