"""What values do to a layer's output, read from pages."""

from __future__ import annotations

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.dispatch import by_native, by_triton, choose
from vllm_kvcompress.ops.limits import check_scales
from vllm_kvcompress.ops.structs import Pool, Prompts
from vllm_kvcompress.ops.window import reference
from vllm_kvcompress.ops.window.checks import check_layers, check_prompt_pool, check_prompts
from vllm_kvcompress.ops.window.memory import empty_scores


def paged_value_effect(
    output_root: torch.Tensor,
    pool: Pool,
    prompts: Prompts,
    layer: int,
    *,
    backend: str = "triton",
) -> torch.Tensor:
    """`ops.value_effect` of every rated token's value, read from pages.

    Args:
        output_root: [n, H, d, d] or [H, d, d] of `output_root`, in the type to multiply in: bf16,
            fp16 or fp32. 'native' multiplies in float32, whatever its type.
        pool, prompts, layer: as in `window_scores`.
        backend: 'triton', 'native' (compiled, CPU) or 'reference'.

    Returns:
        [R, n * H, max_rated] float32, entries past num_rated undefined. No host sync, graph-safe,
        deterministic.

    Raises:
        ValueError: on shapes or types that do not fit.
        RuntimeError: if the backend cannot run here.
    """
    check(
        output_root.dim() in (3, 4)
        and output_root.shape[-2] == output_root.shape[-1]
        and output_root.shape[-3] == pool.num_kv_heads
        and output_root.is_contiguous(),
        f"want a contiguous output root [n, {pool.num_kv_heads}, d, d], "
        f"got {tuple(output_root.shape)}",
    )
    if output_root.dim() == 3:
        output_root = output_root[None]
    num_scored = output_root.shape[0]
    order = pool.order
    # A root's rows are to the pool what a query's are: of each KV head one.
    root_rows = output_root[0].transpose(0, 1)
    offsets = None if order is None else order.value_offsets
    check_prompt_pool(pool, root_rows, offsets, backend)
    check_prompts(prompts, len(prompts.rows))
    check_layers(layer, num_scored, pool.num_layers, backend)
    check_scales(pool.value_scale, pool.num_streams)
    size = (len(prompts.rows), num_scored * pool.num_kv_heads, prompts.max_rated)
    effect = empty_scores(*size, device=pool.pages.device, backend=backend)
    choose(_EFFECT, backend)(output_root, pool, prompts, layer, effect)
    return effect


def _by_native(
    output_root: torch.Tensor, pool: Pool, prompts: Prompts, layer: int, effect: torch.Tensor
) -> None:
    by_native("paged_value_effect", only="cpu")(
        pool.pages,
        output_root[0],
        prompts.rows.descriptors,
        prompts.rows.block_table,
        prompts.num_rated,
        None if pool.order is None else pool.order.value_offsets,
        pool.value_scale,
        effect,
        layer=layer,
        num_layers=pool.num_layers,
    )


def _by_triton(
    output_root: torch.Tensor, pool: Pool, prompts: Prompts, layer: int, effect: torch.Tensor
) -> None:
    by_triton("value_effect")(
        pool.pages,
        output_root,
        prompts.rows.descriptors,
        prompts.rows.block_table,
        prompts.num_rated,
        pool.value_scale,
        effect,
        layer=layer,
        num_layers=pool.num_layers,
    )


_EFFECT = {"triton": _by_triton, "native": _by_native, "reference": reference.value_effect}
