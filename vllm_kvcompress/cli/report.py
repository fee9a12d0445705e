"""The text of `vllm-kvcompress plan`."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Sequence

from vllm_kvcompress.cli.planning import PagePlan, Plan, RequestPlan
from vllm_kvcompress.cli.sizes import format_size
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies.builtin import budgets_class

_WIDTH = 100
_NO_BREAK = "\N{NO-BREAK SPACE}"


def as_text(plan: Plan) -> str:
    """The whole plan for a human, ending without a line break."""
    parts = [_head(plan), _tokens_and_blocks(plan), _memory(plan)]
    parts += [_pages(plan, request) for request in plan.requests]
    return "\n\n".join(parts)


def setting(config: KVCompressConfig) -> str:
    """The method and how much it keeps."""
    if config.ratio is not None:
        return f"{config.method}, remove {config.ratio:.1%} of each prompt"
    return f"{config.method}, keep {config.budget} tokens"


def _head(plan: Plan) -> str:
    config, shape = plan.config, plan.shape
    where = " on each rank" if plan.tensor_parallel_size > 1 else ""
    window = f"window {config.window} tokens"
    if config.recent_tokens < config.window:
        window += f" (the last {config.recent_tokens} always kept)"
    has_windows = shape.num_windowed_layers > 0
    layers = f"{shape.num_layers} layers" + (" with full attention" if has_windows else "")
    lines = [
        f"setting  {setting(config)}, {window}",
        f"model    {layers}, {shape.num_kv_heads} KV heads{where}, head size "
        f"{shape.head_size}, {shape.dtype}",
        f"block    {plan.block_size} tokens of all {'these ' if has_windows else ''}layers and "
        f"heads, {format_size(plan.block_bytes)}{where}",
    ]
    if has_windows:
        blocks = max(request.window_blocks for request in plan.requests)
        lines += [
            f"windows  {shape.num_windowed_layers} more layers, of {shape.window_tokens} tokens "
            f"each, stay as they are; a request holds up to",
            f"         {blocks} blocks ({format_size(blocks * plan.block_bytes)}) for them, beside "
            "the blocks and in the memory below",
        ]
    if plan.pool_bytes is not None:
        lines.append(
            f"pool     {format_size(plan.pool_bytes)}{where}, {plan.pool_blocks} blocks "
            "beside vLLM's null block"
        )
    return "\n".join(lines)


def _tokens_and_blocks(plan: Plan) -> str:
    rows: list[Sequence[object]] = [
        ("prompt", "output", "asked to keep", "kept", "region", "tail, output", "uncompressed"),
        ("tokens", "tokens", "tokens per head", "tokens per head", "blocks", "blocks", "blocks"),
    ]
    for request in plan.requests:
        rows.append(
            (
                request.prompt_len,
                request.output_len,
                request.kept_tokens_asked,
                request.kept_tokens,
                request.region_blocks,
                request.dense_blocks,
                request.full_blocks,
            )
        )
    return _table(rows)


def _memory(plan: Plan) -> str:
    rows: list[Sequence[object]] = [
        ("prompt", "compressed", "uncompressed", "saved", "in prefill"),
        ("tokens", "memory", "memory", "memory", "memory"),
    ]
    has_pool = plan.pool_bytes is not None
    if has_pool:
        rows = [(*rows[0], "compressed", "uncompressed"), (*rows[1], "fit pool", "fit pool")]
    for request in plan.requests:
        row: tuple[object, ...] = (
            request.prompt_len,
            format_size(request.held_bytes),
            format_size(request.full_bytes),
            f"{1 - request.held_bytes / request.full_bytes:.1%}",
            format_size(request.prefill_bytes),
        )
        rows.append((*row, request.fits, request.full_fits) if has_pool else row)
    lines = [_table(rows)]
    if has_pool:
        lines.append("Fitting: one request in prefill, the others at the end of their output.")
    return "\n".join(lines)


def _pages(plan: Plan, request: RequestPlan) -> str:
    pages = request.pages
    title = f"prompt of {request.prompt_len} tokens: "
    if pages is None:
        return title + "stays dense, nothing is evicted"
    budgets = plan.config.option("budgets")
    title += f"{pages.total} pages in the region, {request.region_blocks} per KV head on average"
    lines = [f"budgets {budgets}: {budgets_class(budgets).summary}"]
    lines.append(_shares(pages, plan.shape.num_kv_heads))
    if request.region_blocks > 1 and _is_flat_pyramid(plan, pages):
        lines.append("the prompt is shorter than twice what it keeps: no pyramid")
    return "\n".join([title, *map(_indented, lines)])


def _shares(pages: PagePlan, num_heads: int) -> str:
    bounds = f"{min(pages.least)} to {max(pages.most)} pages"
    if pages.mean_per_layer is None:
        return f"decided by scores for all layers together; one head gets {bounds}"
    if pages.per_head is None:
        total = _per_layer(mean * num_heads for mean in pages.mean_per_layer)
        return f"pages shared by the heads of a layer: {total}; one head gets {bounds}"
    means = _per_layer(pages.mean_per_layer)
    if pages.least == pages.most:
        return f"pages of every KV head: {means}"
    return f"pages per KV head on average: {means}; one head gets {bounds}"


def _is_flat_pyramid(plan: Plan, pages: PagePlan) -> bool:
    # A beta of 1 asks for a flat one; other budgets have none.
    if dict(plan.config.options).get("beta", 1) == 1 or plan.shape.num_layers == 1:
        return False
    return pages.mean_per_layer is not None and len(set(pages.mean_per_layer)) == 1


def _indented(text: str) -> str:
    lines = textwrap.fill(
        text, width=_WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )
    return lines.replace(_NO_BREAK, " ")


def _per_layer(values: Iterable[float]) -> str:
    """Numbers from the first layer to the last, runs of equal ones joined."""
    runs = [(value, len(list(run))) for value, run in itertools.groupby(values)]
    if len(runs) == 1:
        return f"{_number(runs[0][0])} in every layer"
    times = f"{_NO_BREAK}x{_NO_BREAK}"
    parts = [_number(value) + (f"{times}{count}" if count > 1 else "") for value, count in runs]
    return ", ".join(parts)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.1f}"


def _table(rows: Sequence[Sequence[object]]) -> str:
    """Right-aligned columns."""
    cells = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )
