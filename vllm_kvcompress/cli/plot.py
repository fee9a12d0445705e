"""The picture of `vllm-kvcompress plan --plot`."""

from __future__ import annotations

from typing import Any

from vllm_kvcompress.cli import report
from vllm_kvcompress.cli.planning import Plan, RequestPlan
from vllm_kvcompress.config import KVCompressConfigError

_MIB = 2**20


def draw(plan: Plan, path: str) -> None:
    """Write pages per layer and memory per request to a PNG file.

    Raises:
        KVCompressConfigError: if matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise KVCompressConfigError(
            "--plot needs matplotlib: pip install 'vllm-kvcompress[plot]'"
        ) from None
    # Not pyplot, which would look for a screen.
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_pages(left, plan)
    _draw_memory(right, plan)
    figure.suptitle(report.setting(plan.config))
    try:
        figure.savefig(path, format="png", dpi=110)
    except OSError as error:
        raise KVCompressConfigError(f"cannot write {path!r}: {error.strerror}") from None


def _draw_pages(axes: Any, plan: Plan) -> None:
    layers = range(plan.shape.num_layers)
    for request in plan.requests:
        pages = request.pages
        if pages is None:
            continue
        means = pages.mean_per_layer or [request.region_blocks] * len(layers)
        (line,) = axes.step(layers, means, where="mid", label=f"{request.prompt_len} tokens")
        if pages.least != pages.most:
            axes.fill_between(
                layers, pages.least, pages.most, step="mid", alpha=0.15, color=line.get_color()
            )
    axes.set(
        xlabel="layer",
        ylabel="pages per KV head",
        title=_pages_title(plan),
        ylim=(0, None),
    )
    if axes.lines:
        _put_legend_below(axes, title="prompt")


def _pages_title(plan: Plan) -> str:
    regions = [request.pages for request in plan.requests if request.pages is not None]
    if not regions:
        return "all prompts stay dense, nothing is evicted"
    if all(pages.least == pages.most for pages in regions):
        return "region of every KV head"
    if all(pages.per_head is not None for pages in regions):
        return "region: mean over KV heads, and the least and most of them"
    return "region: mean, and what scores can give to one KV head"


def _put_legend_below(axes: Any, **settings: Any) -> None:
    # Inside the axes it would hide what is drawn.
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, fontsize="small", **settings
    )


def _draw_memory(axes: Any, plan: Plan) -> None:
    bars = {
        "uncompressed": [request.full_bytes for request in plan.requests],
        "while the prompt is computed": [request.prefill_bytes for request in plan.requests],
        "compressed": [request.held_bytes for request in plan.requests],
    }
    width = 0.8 / len(bars)
    for i, (label, sizes) in enumerate(bars.items()):
        places = [place + (i - 1) * width for place in range(len(sizes))]
        axes.bar(places, [size / _MIB for size in sizes], width, label=label)
    axes.set_xticks(range(len(plan.requests)), [_tick(request) for request in plan.requests])
    axes.set(xlabel="prompt + output tokens", ylabel="MiB", title="KV memory of one request")
    _put_legend_below(axes)


def _tick(request: RequestPlan) -> str:
    return f"{request.prompt_len} + {request.output_len}"
