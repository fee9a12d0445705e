"""What compression cannot be combined with, told in one line before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_kvcompress.config import (
    KVCompressConfig,
    KVCompressConfigError,
    as_settings,
    is_misspelt_setting,
    nearest,
)
from vllm_kvcompress.model_layers import (
    CHUNKED,
    FULL,
    LayerKind,
    has_alibi,
    has_quantized_cache,
    mixed_layers,
    read_layers,
)
from vllm_kvcompress.policies import make_budgets, scorer_class
from vllm_kvcompress.policies.common_options import SETTINGS
from vllm_kvcompress.vllm_integration.compat import check_vllm_version
from vllm_kvcompress.vllm_integration.platforms import choose_platform, platform_of

# No chunk leaves a single token before the compaction point, nor is the window's token alone in
# one (see scheduler.py).
_FEWEST_STEP_TOKENS = 3
# The end of a refusal of a model.
_STOCK = "; serve it without KV compression"
_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")


def prepare_engine_args(engine_args: Any) -> KVCompressConfig | None:
    """Fill in what an engine with compression needs.

    Args:
        engine_args: vLLM's EngineArgs; `worker_cls` and `block_size` are set where the user
            left them open, and the setting under `additional_config` is completed.

    Returns:
        The setting, or None if compression is not asked for (then nothing is changed).

    Raises:
        KVCompressConfigError, UnsupportedVLLMError: if it cannot work.
    """
    additional = engine_args.additional_config or {}
    # vLLM allows objects of other platforms here.
    if not isinstance(additional, Mapping):
        return None
    _check_keys(additional)
    settings = as_settings(additional.get("kv_compress"))
    if settings is None:
        return None
    check_vllm_version()
    config = KVCompressConfig.from_dict(settings)
    platform = choose_platform(engine_args.worker_cls)
    engine_args.worker_cls = platform.worker
    if engine_args.block_size is None:
        engine_args.block_size = platform.block_size
    elif engine_args.block_size % platform.block_unit:
        raise KVCompressConfigError(
            f"--block-size must be a multiple of {platform.block_unit}, got "
            f"{engine_args.block_size}; try "
            f"{-(-engine_args.block_size // platform.block_unit) * platform.block_unit}"
        )
    config.check_block_size(engine_args.block_size)
    engine_args.additional_config = {**additional, "kv_compress": config.to_dict()}
    return config


def _check_keys(additional: Mapping[str, Any]) -> None:
    """Refuse keys that look like ours: with them the engine would run uncompressed."""
    for key in additional:
        if is_misspelt_setting(key):
            part = nearest(key.lower().replace("-", "_").removeprefix("kv_compress_"), SETTINGS)
            wanted = f'{{"kv_compress": {{"{part}": ...}}}}' if part else "'kv_compress'"
            raise KVCompressConfigError(
                f"unknown key {key!r} in additional_config; did you mean {wanted}?"
            )


def check_engine_config(vllm_config: Any, config: KVCompressConfig) -> None:
    """Refuse models and features that compression does not work with.

    Raises:
        KVCompressConfigError: naming the first of them.
    """
    config.check_block_size(vllm_config.cache_config.block_size)
    _refuse(_model_problems(vllm_config))
    _refuse(_feature_problems(vllm_config, config))
    platform = platform_of(vllm_config.parallel_config.worker_cls)
    layers = _full_layers(vllm_config)
    check_table_shape(config, layers.num_layers, layers.num_kv_heads)
    # Before vLLM's own answer to such heads, another attention backend.
    platform.check_heads(layers.head_size, layers.num_queries_per_kv)
    _refuse(platform.refusals(vllm_config))
    _use_own_scheduler(vllm_config.scheduler_config)
    if config.option("suffix_tokens"):
        _refuse_prompt_logprobs(vllm_config)
    platform.use_attention(vllm_config.attention_config)


def _model_problems(vllm_config: Any) -> tuple[tuple[bool, str], ...]:
    """Models that do not work, as (whether this is one, what it is)."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    text_config = model.hf_text_config
    windows = getattr(text_config, "sliding_window", None) is not None and getattr(
        text_config, "use_sliding_window", True
    )
    layer_types = getattr(text_config, "layer_types", None) or ()
    return (
        (model.runner_type != "generate", f"pooling models (runner {model.runner_type!r}){_STOCK}"),
        (model.use_mla, f"MLA models, whose cache has no KV heads{_STOCK}"),
        (model.is_encoder_decoder, f"encoder-decoder models{_STOCK}"),
        (model.is_diffusion, f"diffusion language models{_STOCK}"),
        (model.is_attention_free, f"attention-free models{_STOCK}"),
        (model.is_hybrid, f"hybrid state-space models{_STOCK}"),
        (
            windows and FULL not in layer_types,
            f"models with sliding-window layers only{_STOCK}",
        ),
        (CHUNKED in layer_types, f"models whose layers attend in chunks{_STOCK}"),
        (
            has_alibi(text_config),
            f"ALiBi, which needs every key's position in the cache{_STOCK}",
        ),
        (
            windows and vllm_config.scheduler_config.disable_hybrid_kv_cache_manager,
            "sliding-window layers without vLLM's hybrid KV cache manager; drop "
            "--disable-hybrid-kv-cache-manager",
        ),
        (
            model.is_mm_prefix_lm,
            "attention in both directions among an image's tokens; for text alone, add "
            "--language-model-only",
        ),
        (model.rswa_window is not None, f"R-SWA, windows beside whole prefixes{_STOCK}"),
        (
            cache.cache_dtype == "auto" and has_quantized_cache(model.hf_config),
            f"quantized KV caches, which this checkpoint asks for{_STOCK}",
        ),
    )


def _feature_problems(vllm_config: Any, config: KVCompressConfig) -> tuple[tuple[bool, str], ...]:
    """Features that do not work, as (whether one is asked for, what it is)."""
    from vllm import envs

    model, parallel, cache = (
        vllm_config.model_config,
        vllm_config.parallel_config,
        vllm_config.cache_config,
    )
    return (
        (
            vllm_config.kv_transfer_config is not None,
            "a KV transfer connector; drop --kv-transfer-config",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism; use --tensor-parallel-size instead of --pipeline-parallel-size",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            "decode context parallelism; drop --decode-context-parallel-size",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            "prefill context parallelism; drop --prefill-context-parallel-size",
        ),
        (
            vllm_config.speculative_config is not None,
            "speculative decoding; drop --speculative-config",
        ),
        (
            # vLLM 0.33 has the other one only.
            parallel.distributed_executor_backend == "ray"
            and not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True),
            "vLLM's first Ray executor, which passes workers by; unset "
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND",
        ),
        (
            cache.cache_dtype not in _CACHE_DTYPES,
            f"KV cache dtype {cache.cache_dtype!r}; use --kv-cache-dtype "
            f"{', '.join(_CACHE_DTYPES[:-1])} or {_CACHE_DTYPES[-1]}",
        ),
        (
            cache.kv_sharing_fast_prefill,
            "prefill without the layers that share a KV cache; drop --kv-sharing-fast-prefill",
        ),
        (
            "rotary" in scorer_class(config.recipe.scorer).needs
            and model.using_transformers_backend(),
            f"{config.method} on the transformers backend, whose position encoding it cannot "
            "read; choose another method",
        ),
        (
            _step_tokens(vllm_config.scheduler_config) < _FEWEST_STEP_TOKENS,
            f"steps of fewer than {_FEWEST_STEP_TOKENS} tokens of a prompt; raise "
            "--max-num-batched-tokens or --long-prefill-token-threshold",
        ),
    )


def _refuse(problems: tuple[tuple[bool, str], ...]) -> None:
    """Raise KVCompressConfigError with the first that is there, of (whether it is, what it is)."""
    for is_problem, what in problems:
        if is_problem:
            raise KVCompressConfigError(f"KV compression does not support {what}")


def _full_layers(vllm_config: Any) -> LayerKind:
    """The layers that are compressed, on one rank, as far as the model's config says.

    Raises:
        KVCompressConfigError: if vLLM would group them with others, or their heads differ.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    text_config = model.hf_text_config
    is_sharing = bool(getattr(text_config, "num_kv_shared_layers", None))
    # That backend gives every layer a cache.
    is_sharing &= not model.using_transformers_backend()
    if is_sharing or all(mixed_layers(text_config)):
        layers = read_layers(text_config, parallel.tensor_parallel_size, is_sharing)
        layers.check_groups()
        return layers.full
    num_kv_heads = model.get_num_kv_heads(parallel)
    return LayerKind(
        model.get_num_layers(parallel),
        num_kv_heads,
        model.get_head_size(),
        model.get_num_attention_heads(parallel) // num_kv_heads,
    )


def _step_tokens(scheduler_config: Any) -> int:
    """Most tokens of one request in a step."""
    limits = [
        scheduler_config.max_num_batched_tokens,
        scheduler_config.max_num_scheduled_tokens,
        scheduler_config.long_prefill_token_threshold,
    ]
    return min(limit for limit in limits if limit)


def check_table_shape(config: KVCompressConfig, num_layers: int, num_kv_heads: int) -> None:
    """Raise KVCompressConfigError if a static budget table does not fit a rank's layers, heads."""
    try:
        make_budgets(config).check_model(num_layers, num_kv_heads)
    except ValueError as error:
        raise KVCompressConfigError(f"KV compression: {error}") from None


def _refuse_prompt_logprobs(vllm_config: Any) -> None:
    """Have vLLM refuse single requests that ask for them."""
    name = "NoPromptLogprobsV2" if vllm_config.use_v2_model_runner else "NoPromptLogprobs"
    path = f"vllm_kvcompress.vllm_integration.request_checks:{name}"
    model = vllm_config.model_config
    others = [other for other in model.logits_processors or () if other != path]
    model.logits_processors = [*others, path]


def _use_own_scheduler(scheduler_config: Any) -> None:
    """Name the scheduler that ends a chunk at the compaction point."""
    name = (
        "KVCompressAsyncScheduler" if scheduler_config.async_scheduling else "KVCompressScheduler"
    )
    path = f"vllm_kvcompress.vllm_integration.scheduler.scheduler.{name}"
    if scheduler_config.scheduler_cls not in (None, path):
        raise KVCompressConfigError(
            "KV compression brings its own scheduler class and cannot use "
            f"{scheduler_config.scheduler_cls!r}; drop --scheduler-cls"
        )
    scheduler_config.scheduler_cls = path
