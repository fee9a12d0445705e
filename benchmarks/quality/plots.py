"""Pictures of a quality run, as PNG."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS = "vllm-kvcompress"
_STYLES = ("-o", "--s", "-.^", ":D")


def lines(
    rows: Sequence[dict[str, Any]], task: str, mode: str, value: str, title: str, path: Path
) -> None:
    """A value against the fraction really kept, one line per method.

    Args:
        rows: summary rows.
        task, mode: which of them.
        value: column, 'score' or 'kl'.
        title: of the picture.
        path: PNG to write.
    """
    chosen = [
        row
        for row in rows
        # An endpoint does not tell what it keeps.
        if row["task"] == task and row["mode"] == mode and "kept_fraction" in row
    ]
    by_method: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in chosen:
        if row["method"] != "full":
            by_method[row["engine"], row["method"]].append(row)
    if not by_method:
        return
    figure, axes = plt.subplots(figsize=(9, 5.5))
    if value == "score":
        full = {row["engine"]: row[value] for row in chosen if row["method"] == "full"}
        for engine, level in full.items():
            is_ours = engine == OURS
            label = "full cache" if is_ours else f"full cache ({engine})"
            axes.axhline(
                level, color="black", linewidth=1, linestyle="-" if is_ours else ":", label=label
            )
    colours = plt.get_cmap("tab20")
    for i, ((engine, method), points) in enumerate(sorted(by_method.items())):
        points = sorted(points, key=lambda row: row["kept_fraction"])
        axes.plot(
            [row["kept_fraction"] for row in points],
            [row[value] for row in points],
            _STYLES[i // 20 % len(_STYLES)] if engine == OURS else ":x",
            color=colours(i % 20),
            markersize=4,
            label=method if engine == OURS else f"{method} ({engine})",
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("fraction of the prompt's tokens kept per head")
    if value == "kl":
        axes.set_yscale("log")
    axes.set_ylabel({"score": "score", "kl": "KL from the full cache, nats per token"}[value])
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncol=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def heatmaps(rows: Iterable[dict[str, Any]], ratio: float, mode: str, path: Path) -> None:
    """Needle score over prompt length and needle depth, one panel per engine and method.

    Args:
        rows: single results; panels in their order, full caches first.
        ratio: fraction removed (of all but 'full').
        mode: 'aware' or 'agnostic'.
        path: PNG to write.
    """
    cells: dict[str, dict[tuple[int, float], list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["method"] != "full"):
        if row["task"] != "needle" or row["mode"] != mode:
            continue
        if row["method"] != "full" and abs(row["ratio"] - ratio) > 1e-9:
            continue
        ours = row["engine"] == OURS
        panel = row["method"] if ours else f"{row['method']} ({row['engine']})"
        place = (row["meta"]["length"], row["meta"]["depth"])
        cells.setdefault(panel, {}).setdefault(place, []).append(row["score"])
    shown = list(cells)
    if not shown:
        return
    lengths = sorted({length for grid in cells.values() for length, _ in grid})
    depths = sorted({depth for grid in cells.values() for _, depth in grid})
    columns = min(5, len(shown))
    num_rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        num_rows, columns, figsize=(2.6 * columns, 2.5 * num_rows), squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, method in zip(axes.flat, shown, strict=False):
        grid = [
            [fmean(cells[method].get((length, depth), [float("nan")])) for length in lengths]
            for depth in depths
        ]
        axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_title(method, fontsize=8)
        axis.set_xticks(range(len(lengths)), [str(x) for x in lengths], fontsize=6)
        axis.set_yticks(range(len(depths)), [f"{x:.0%}" for x in depths], fontsize=6)
    figure.suptitle(f"Needle found, {ratio:.2%} removed ({mode}); prompt tokens by depth", size=10)
    _save(figure, path)


def kept_per_head(kept: dict[str, list[list[int]]], title: str, path: Path) -> None:
    """Tokens that each head of each layer keeps of one prompt, one panel per method.

    Args:
        kept: method label to [layer][head] counts.
        title: of the picture.
        path: PNG to write.
    """
    figure, axes = plt.subplots(1, len(kept), figsize=(1.9 * len(kept) + 1, 5), squeeze=False)
    highest = max(max(map(max, counts)) for counts in kept.values())
    for axis, (method, counts) in zip(axes.flat, kept.items(), strict=True):
        image = axis.imshow(counts, vmin=0, vmax=highest, cmap="viridis", aspect="auto")
        axis.set_title(method, fontsize=8)
        axis.set_xlabel("KV head", fontsize=7)
        axis.set_xticks(range(len(counts[0])))
        axis.tick_params(labelsize=6)
    axes[0][0].set_ylabel("layer", fontsize=7)
    figure.suptitle(title, size=10)
    figure.colorbar(image, ax=list(axes.flat), label="tokens kept")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
