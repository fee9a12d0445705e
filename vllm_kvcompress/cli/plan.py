"""`vllm-kvcompress plan`: what a setting keeps and how much memory that is, without an engine."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.memory import Geometry, cdiv
from vllm_kvcompress.policies.recipes import BUDGETS
from vllm_kvcompress.vllm_integration.cli import add_flags, merge_flags

DEFAULT_BLOCK_SIZE = 16
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True)
class ModelShape:
    """What decides the size of a model's KV cache, on one tensor-parallel rank.

    Attributes:
        num_layers, num_kv_heads, head_size: of the attention layers.
        element_bytes: bytes of one cached number.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    element_bytes: int

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block: keys and values of all layers and heads."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_size
        return per_token * self.element_bytes * block_size


@dataclass(frozen=True)
class RequestPlan:
    """One request of a given size under a setting.

    Attributes:
        prompt_len, output_len: tokens.
        compressed: whether anything is evicted.
        kept_asked, kept_tokens: prompt tokens per KV head and layer, on average.
        region_blocks, dense_blocks: blocks held from compaction to the end of the output.
        full_blocks: what the request holds without compression.
        prefill_blocks: most blocks held at once, in the step that compacts.
        bytes, full_bytes, prefill_bytes: the same as memory on one rank.
        pages_per_layer: pages of the region per KV head of each layer, where the setting alone
            decides; else None.
        most_pages: most pages one head can get; all candidates of the prompt.
        fits, full_fits: requests of this kind that a pool holds, if one is given.
    """

    prompt_len: int
    output_len: int
    compressed: bool
    kept_asked: int
    kept_tokens: int
    region_blocks: int
    dense_blocks: int
    full_blocks: int
    prefill_blocks: int
    bytes: int
    full_bytes: int
    prefill_bytes: int
    pages_per_layer: list[int] | None
    most_pages: int
    fits: int | None
    full_fits: int | None


def add_parser(commands: Any) -> None:
    """Add the subcommand to an argparse subparsers object."""
    parser = commands.add_parser(
        "plan",
        help="what a setting keeps, its memory per request, and how many fit a pool",
        description="Loads no weights and needs no vLLM.",
    )
    parser.add_argument("model", help="folder with config.json, or hub name")
    add_flags(parser)
    parser.add_argument(
        "--prompt-len", type=int, nargs="+", required=True, metavar="TOKENS", help="prompt length"
    )
    parser.add_argument("--output-len", type=int, default=256, help="generated tokens")
    parser.add_argument(
        "--block-size",
        type=int,
        default=DEFAULT_BLOCK_SIZE,
        help="tokens per page (default 16, as on CUDA; an engine on CPU takes 32)",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=("auto", *_DTYPE_BYTES),
        help="auto = the model's",
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument(
        "--pool", type=_bytes, metavar="SIZE", help="KV memory per rank, e.g. 20GiB"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--plot", metavar="FILE", help="draw budgets and memory to a PNG")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print (and draw) the plan.

    Raises:
        KVCompressConfigError: if model or setting cannot work.
    """
    merge_flags(arguments)
    raw = (getattr(arguments, "additional_config", None) or {}).get("kv_compress")
    if raw is None:
        raise KVCompressConfigError("plan needs --kv-compress METHOD")
    for name in ("block_size", "tensor_parallel_size"):
        if getattr(arguments, name) < 1:
            raise KVCompressConfigError(f"{name} must be at least 1")
    if min(arguments.prompt_len) < 1 or arguments.output_len < 0:
        raise KVCompressConfigError("prompts need at least one token, outputs none or more")
    config = KVCompressConfig.from_dict(raw)
    shape = read_shape(arguments.model, arguments.kv_cache_dtype, arguments.tensor_parallel_size)
    geometry = Geometry(config, arguments.block_size)
    plans = [
        plan_request(geometry, shape, prompt_len, arguments.output_len, arguments.pool)
        for prompt_len in arguments.prompt_len
    ]
    if arguments.json:
        print(
            json.dumps(
                {
                    "setting": config.to_dict(),
                    "block_size": arguments.block_size,
                    "model": asdict(shape),
                    "requests": [asdict(plan) for plan in plans],
                },
                indent=1,
            )
        )
    else:
        print(_as_text(config, arguments.block_size, shape, plans))
    if arguments.plot:
        from vllm_kvcompress.cli.plot import draw

        draw(config, plans, arguments.plot)


def read_shape(model: str, cache_dtype: str, tensor_parallel_size: int) -> ModelShape:
    """The KV-cache shape of a model on one rank, from its config.

    Raises:
        KVCompressConfigError: if the model cannot be read or compressed.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise KVCompressConfigError(f"cannot read the model's config: {first_line}") from None
    if getattr(config, "is_encoder_decoder", False):
        raise KVCompressConfigError("KV compression does not support encoder-decoder models")
    if getattr(config, "kv_lora_rank", None):
        raise KVCompressConfigError(
            "KV compression does not support MLA models, whose cache has no KV heads"
        )
    layer_types = set(getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    if layer_types - {"full_attention"} or (windowed and not layer_types):
        raise KVCompressConfigError(
            "KV compression needs full attention in every layer; this model has "
            + (", ".join(sorted(layer_types)) if layer_types else "sliding windows")
        )
    num_heads = getattr(config, "num_attention_heads", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    if not num_heads or not num_layers:
        raise KVCompressConfigError("this model's config names no attention heads and layers")
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    if tensor_parallel_size > num_kv_heads or num_kv_heads % tensor_parallel_size:
        raise KVCompressConfigError(
            f"{num_kv_heads} KV heads cannot be split over {tensor_parallel_size} ranks"
        )
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    dtype = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
    if cache_dtype != "auto":
        dtype = cache_dtype
    elif dtype == "float32":
        # As vLLM does: --dtype auto serves float32 checkpoints in half precision.
        dtype = "bfloat16"
    return ModelShape(
        num_layers, num_kv_heads // tensor_parallel_size, head_size, _DTYPE_BYTES[dtype]
    )


def plan_request(
    geometry: Geometry, shape: ModelShape, prompt_len: int, output_len: int, pool: int | None
) -> RequestPlan:
    """Blocks and memory of one request; `pool` in bytes."""
    config, block_size = geometry.config, geometry.block_size
    request = geometry.of(prompt_len)
    total_len = prompt_len + output_len
    full_blocks = cdiv(total_len, block_size)
    # The row keeps its freed places; what is held is the rest.
    held = geometry.of(prompt_len).num_row_blocks(total_len) - request.first_kept_block
    prefill_blocks = request.num_row_blocks(request.compact_len)
    pages = None
    if request.is_compressed and config.option("budgets") in ("uniform", "pyramid", "static"):
        pages = _layer_pages(config, request.num_region_blocks, shape, request.first_kept_block)
    block_bytes = shape.block_bytes(block_size)
    num_blocks = None if pool is None else pool // block_bytes
    fits = None
    if num_blocks is not None:
        # One of them is being computed while the others are compact.
        extra = max(0, prefill_blocks - held)
        fits = max(0, (num_blocks - extra) // held)
    return RequestPlan(
        prompt_len=prompt_len,
        output_len=output_len,
        compressed=request.is_compressed,
        kept_asked=min(prompt_len, geometry.kept_tokens_asked(request.compact_len)),
        kept_tokens=request.num_kept_tokens if request.is_compressed else prompt_len,
        region_blocks=request.num_region_blocks,
        dense_blocks=held - request.num_region_blocks,
        full_blocks=full_blocks,
        prefill_blocks=prefill_blocks,
        bytes=held * block_bytes,
        full_bytes=full_blocks * block_bytes,
        prefill_bytes=prefill_blocks * block_bytes,
        pages_per_layer=pages,
        most_pages=request.first_kept_block,
        fits=fits,
        full_fits=None if num_blocks is None else num_blocks // full_blocks,
    )


def _layer_pages(
    config: KVCompressConfig, mean_pages: int, shape: ModelShape, max_pages: int
) -> list[int] | None:
    # Imported here, because it loads torch.
    from vllm_kvcompress.policies.budgets import check_table, layer_pages

    options = dict(config.options)
    table = options.get("table")
    if table is not None:
        try:
            check_table(table, shape.num_layers, shape.num_kv_heads)
        except ValueError as error:
            raise KVCompressConfigError(f"KV compression: {error}") from None
        if isinstance(table[0], tuple):
            return None
    return layer_pages(options["budgets"], mean_pages, shape.num_layers, max_pages, options)


def _as_text(
    config: KVCompressConfig, block_size: int, shape: ModelShape, plans: list[RequestPlan]
) -> str:
    asked = f"ratio {config.ratio}" if config.ratio is not None else f"budget {config.budget}"
    lines = [
        f"{config.method}, {asked}, window {config.window}, {block_size}-token pages, "
        f"{shape.num_layers} layers x {shape.num_kv_heads} KV heads x {shape.head_size}, "
        f"{shape.element_bytes} bytes per number",
        "",
        f"{'prompt':>8} {'output':>7} {'kept asked':>11} {'kept':>7} {'memory':>10} {'full':>10} "
        f"{'saved':>6} {'at prefill':>11} {'fit pool':>9} {'full fit':>9}",
    ]
    for plan in plans:
        lines.append(
            f"{plan.prompt_len:>8} {plan.output_len:>7} {plan.kept_asked:>11} "
            f"{plan.kept_tokens:>7} {_size(plan.bytes):>10} {_size(plan.full_bytes):>10} "
            f"{1 - plan.bytes / plan.full_bytes:>6.0%} {_size(plan.prefill_bytes):>11} "
            f"{_or_dash(plan.fits):>9} {_or_dash(plan.full_fits):>9}"
        )
    for plan in plans:
        lines += ["", f"prompt of {plan.prompt_len} tokens: {_describe(config, plan)}"]
    return "\n".join(lines)


def _describe(config: KVCompressConfig, plan: RequestPlan) -> str:
    if not plan.compressed:
        return "stays dense, nothing is evicted"
    blocks = f"{plan.region_blocks} region blocks and {plan.dense_blocks} dense ones. "
    if plan.pages_per_layer is not None:
        runs = re.sub(r"\b(\d+)(?:, \1\b)+", _run, ", ".join(map(str, plan.pages_per_layer)))
        return f"{blocks}Pages per KV head, layer by layer: {runs}"
    summary = BUDGETS[config.option("budgets")].summary
    return (
        f"{blocks}{plan.region_blocks} pages per KV head on average ({summary}); each head gets "
        f"1 to {plan.most_pages}"
    )


def _run(match: re.Match[str]) -> str:
    return f"{match.group(1)} x {match.group(0).count(',') + 1}"


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (e.g. 20GiB)")
    return int(float(match.group(1)) * _UNITS[match.group(2)])
