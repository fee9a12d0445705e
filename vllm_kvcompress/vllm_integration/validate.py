"""What compression cannot be combined with, told in one line before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vllm_kvcompress import ops
from vllm_kvcompress.config import (
    DEFAULT_BLOCK_SIZE,
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

CPU_WORKER = "vllm_kvcompress.vllm_integration.platforms.cpu.worker.KVCompressCPUWorker"
CUDA_WORKER = "vllm_kvcompress.vllm_integration.platforms.cuda.worker.KVCompressCUDAWorker"
# vLLM's attention kernels, on a CPU and FlashAttention's, take multiples of it.
_BLOCK_UNIT = 16
# No chunk leaves a single token before the compaction point, nor is the window's token alone in
# one (see scheduler.py).
_FEWEST_STEP_TOKENS = 3
# Which ops a CPU engine uses: 'torch', 'native' (compiled), or whichever there is.
_CPU_OPS = "VLLM_KVCOMPRESS_OPS"
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
    worker = _worker_of_platform()
    if engine_args.worker_cls not in ("auto", worker):
        raise KVCompressConfigError(
            "KV compression brings its own worker class and cannot use "
            f"{engine_args.worker_cls!r}; drop --worker-cls"
        )
    engine_args.worker_cls = worker
    if engine_args.block_size is None:
        platform = "CUDA" if worker == CUDA_WORKER else "CPU"
        engine_args.block_size = DEFAULT_BLOCK_SIZE[platform]
    elif engine_args.block_size % _BLOCK_UNIT:
        raise KVCompressConfigError(
            f"--block-size must be a multiple of {_BLOCK_UNIT}, got {engine_args.block_size}; try "
            f"{-(-engine_args.block_size // _BLOCK_UNIT) * _BLOCK_UNIT}"
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


def _worker_of_platform() -> str:
    """Our worker class for vLLM's platform.

    Raises:
        KVCompressConfigError: if there is none.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return CPU_WORKER
    if current_platform.is_cuda():
        return CUDA_WORKER
    raise KVCompressConfigError(
        "this release of vllm-kvcompress runs on vLLM's CPU and CUDA platforms only, "
        f"not on {current_platform.device_name}"
    )


def check_engine_config(vllm_config: Any, config: KVCompressConfig) -> None:
    """Refuse models and features that compression does not work with.

    Raises:
        KVCompressConfigError: naming the first of them.
    """
    config.check_block_size(vllm_config.cache_config.block_size)
    _refuse(_model_problems(vllm_config))
    _refuse(_feature_problems(vllm_config, config))
    is_cuda = vllm_config.parallel_config.worker_cls == CUDA_WORKER
    layers = _full_layers(vllm_config)
    check_table_shape(config, layers.num_layers, layers.num_kv_heads)
    if is_cuda:
        # Before vLLM's own answer to such heads, another attention backend.
        check_gpu_heads(layers.head_size, layers.num_queries_per_kv)
    _refuse((_cuda if is_cuda else _cpu)(vllm_config))
    _use_own_scheduler(vllm_config.scheduler_config)
    if config.option("suffix_tokens"):
        _refuse_prompt_logprobs(vllm_config)
    if is_cuda:
        _use_own_backend(vllm_config.attention_config)


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


def check_gpu_heads(head_size: int, num_queries_per_kv: int) -> None:
    """Raise KVCompressConfigError for heads that the GPU's kernels do not take."""
    if head_size not in ops.HEAD_SIZES:
        known = ", ".join(map(str, ops.HEAD_SIZES))
        raise KVCompressConfigError(
            f"KV compression takes heads of size {known} on a GPU; those of this model's layers "
            f"with full attention have {head_size}"
        )
    if num_queries_per_kv > ops.MAX_GROUP:
        raise KVCompressConfigError(
            f"KV compression takes at most {ops.MAX_GROUP} query heads per KV head on a GPU; "
            f"this model has {num_queries_per_kv}"
        )


def choose_cpu_ops() -> tuple[str, str | None]:
    """The backend of a CPU engine's ops: compiled ones if there are any.

    Returns:
        'native' or 'torch', and for a 'torch' that nobody asked for why it is that.

    Raises:
        KVCompressConfigError: if $VLLM_KVCOMPRESS_OPS is unknown, or asks for what is not there.
    """
    wish = os.environ.get(_CPU_OPS, "")
    if wish not in ("", "torch", "native"):
        raise KVCompressConfigError(f"${_CPU_OPS} must be 'torch' or 'native', got {wish!r}")
    if wish == "torch":
        return "torch", None
    problem = ops.native_problem("cpu")
    if problem is None:
        return "native", None
    if wish == "native":
        raise KVCompressConfigError(f"${_CPU_OPS} is 'native', but {problem}")
    return "torch", problem


def _cpu(vllm_config: Any) -> tuple[tuple[bool, str], ...]:
    """What does not work on a CPU, as (whether it is there, what it is)."""
    choose_cpu_ops()
    return ((vllm_config.use_v2_model_runner, "Model Runner V2; unset VLLM_USE_V2_MODEL_RUNNER"),)


def _cuda(vllm_config: Any) -> tuple[tuple[bool, str], ...]:
    """What does not work on a GPU, as (whether it is there, what it is)."""
    from vllm import envs

    attention, parallel = vllm_config.attention_config, vllm_config.parallel_config
    chosen = attention.backend_per_kind.get(FULL, attention.backend)
    return (
        (
            chosen is not None and chosen.name not in ("CUSTOM", "FLASH_ATTN"),
            f"the attention backend {chosen.name if chosen else None} for full-attention layers "
            "(it brings its own, on FlashAttention); drop --attention-backend",
        ),
        (parallel.use_ubatching, "microbatches; drop --enable-dbo"),
        (envs.VLLM_BATCH_INVARIANT, "batch invariance; unset VLLM_BATCH_INVARIANT"),
    )


def _step_tokens(scheduler_config: Any) -> int:
    """Most tokens of one request in a step."""
    limits = [
        scheduler_config.max_num_batched_tokens,
        scheduler_config.max_num_scheduled_tokens,
        scheduler_config.long_prefill_token_threshold,
    ]
    return min(limit for limit in limits if limit)


def _use_own_backend(attention_config: Any) -> None:
    """Name our backend for full-attention layers; windowed ones keep theirs."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention_config.backend_per_kind = {
        **attention_config.backend_per_kind,
        FULL: AttentionBackendEnum.CUSTOM,
    }


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
