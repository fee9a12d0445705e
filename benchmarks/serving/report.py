"""From single runs to one row per cell and variant; CSV, JSON and PNG."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CELL = ("input_len", "output_len", "pool")
# Column: key in a run's result.
MEASURES = {
    "output_tok_s": "output_throughput",
    "total_tok_s": "total_token_throughput",
    "ttft_p50_ms": "p50_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_p50_ms": "p50_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
    "itl_p50_ms": "p50_itl_ms",
    "itl_p90_ms": "p90_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
    "peak_running": "peak_running",
    "mean_kv_use": "mean_kv_use",
    "preemptions": "preemptions",
}
COLUMNS = (
    *CELL,
    "pool_tokens",
    "variant",
    "removed",
    "block_size",
    "runs",
    *MEASURES,
    "ratio",
    "ratio_low",
    "ratio_high",
    "decode_tok_s",
    "decode_ratio",
)


def summarise(runs: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """One row per cell and variant: medians over its runs, and output tok/s over the baseline's.

    Args:
        runs: rows with the fields of `CELL`, variant, removed, pool_tokens, block_size and result.
        baseline: variant that ratios are against; in every cell.

    Returns:
        Rows with `COLUMNS`; ratio is of the medians, ratio_low and ratio_high the worst and best
        run against the best and worst of the baseline. decode_tok_s is that of a step without
        prompts, in which as many requests run as ever did; decode_ratio is of its medians.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((*(run[key] for key in CELL), run["variant"]), []).append(run)
    rows = []
    for (*cell, _), group in groups.items():
        speeds = [run["result"]["output_throughput"] for run in group]
        base = [run["result"]["output_throughput"] for run in groups[(*cell, baseline)]]
        row = {key: group[0][key] for key in COLUMNS if key in group[0]}
        row["runs"] = len(group)
        for column, key in MEASURES.items():
            row[column] = round(median(run["result"][key] for run in group), 4)
        row["ratio"] = round(median(speeds) / median(base), 4)
        row["ratio_low"] = round(min(speeds) / max(base), 4)
        row["ratio_high"] = round(max(speeds) / min(base), 4)
        own, other = (
            median(map(_decode_tok_s, runs)) for runs in (group, groups[(*cell, baseline)])
        )
        row["decode_tok_s"], row["decode_ratio"] = round(own, 4), round(own / other, 4)
        rows.append(row)
    return rows


def _decode_tok_s(run: dict[str, Any]) -> float:
    """Requests running at the peak over the median time between two tokens of a request."""
    return 1000 * run["result"]["peak_running"] / run["result"]["p50_itl_ms"]


def write(rows: list[dict[str, Any]], environment: dict[str, Any], folder: Path, name: str) -> None:
    """NAME.csv, NAME.json and NAME.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    text = json.dumps({"run": environment, "rows": rows}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    plot(rows, folder / f"{name}.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Output tok/s over the baseline's against the prompt's length, one panel per pool.

    Where a line crosses 1, compression stops paying.
    """
    pools = list(dict.fromkeys(row["pool"] for row in rows))
    colors = {v: f"C{i}" for i, v in enumerate(dict.fromkeys(row["variant"] for row in rows))}
    lines = {}
    figure, panels = plt.subplots(
        1, len(pools), figsize=(5.5 * len(pools), 4.5), sharey=True, squeeze=False
    )
    for axes, pool in zip(panels[0], pools, strict=True):
        here = [row for row in rows if row["pool"] == pool]
        for variant in dict.fromkeys(row["variant"] for row in here):
            points = sorted(
                (row["input_len"], row["ratio"], row["ratio_low"], row["ratio_high"])
                for row in here
                if row["variant"] == variant
            )
            lengths, middle, low, high = zip(*points, strict=True)
            below = [m - x for m, x in zip(middle, low, strict=True)]
            above = [x - m for m, x in zip(middle, high, strict=True)]
            style = {"color": colors[variant], "marker": "o", "capsize": 3}
            lines[variant] = axes.errorbar(lengths, middle, yerr=[below, above], **style)
        axes.axhline(1.0, color="black", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["input_len"] for row in here}))
        axes.get_xaxis().set_major_formatter("{x:.0f}")
        axes.set_xlabel("prompt tokens")
        axes.set_title(f"pool: {pool}")
    panels[0][0].set_ylabel("output tokens/s, ratio to stock")
    panels[0][-1].legend(lines.values(), lines, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
