"""`vllm.LLM` with compression as keyword arguments and its counts as a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import vllm

from vllm_kvcompress.config import (
    KVCompressConfig,
    KVCompressConfigError,
    as_settings,
    did_you_mean,
    is_misspelt_setting,
    join_settings,
    merge_settings,
)
from vllm_kvcompress.vllm_integration.compat import check_vllm_version
from vllm_kvcompress.vllm_integration.register import register
from vllm_kvcompress.vllm_integration.scheduler.manager import compressing_manager
from vllm_kvcompress.vllm_integration.worker.metrics import merge_rank_stats

_KEYWORDS = (
    "kv_compress",
    "kv_compress_budget",
    "kv_compress_ratio",
    "kv_compress_window",
    "kv_compress_options",
)


class LLM(vllm.LLM):
    """An offline engine; every argument of `vllm.LLM` works as there.

    Args:
        model: as in `vllm.LLM`.
        kv_compress: method name, see `vllm serve --help=KVCompress`, or True for the default
            method, which a budget or a ratio alone means too; None or False = stock vLLM.
        kv_compress_budget: tokens kept per KV head and layer on average, window included.
        kv_compress_ratio: fraction of each prompt removed, in [0, 1); excludes the budget.
        kv_compress_window: last prompt tokens, whose queries score the rest; None = the
            method's own.
        kv_compress_options: options of the method.
        kwargs: passed to `vllm.LLM`.

    Raises:
        KVCompressConfigError: if a setting cannot work.
        UnsupportedVLLMError: if the installed vLLM is outside the supported range.
    """

    def __init__(
        self,
        model: str,
        *,
        kv_compress: str | bool | None = None,
        kv_compress_budget: int | None = None,
        kv_compress_ratio: float | None = None,
        kv_compress_window: int | None = None,
        kv_compress_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        check_vllm_version()
        register()
        for name in kwargs:
            if is_misspelt_setting(name):
                raise KVCompressConfigError(
                    f"unknown argument {name!r}{did_you_mean(name, _KEYWORDS)}; there are "
                    f"{', '.join(_KEYWORDS)}"
                )
        given = {
            "budget": kv_compress_budget,
            "ratio": kv_compress_ratio,
            "window": kv_compress_window,
            "options": dict(kv_compress_options) if kv_compress_options else None,
        }
        given = {key: value for key, value in given.items() if value is not None}
        additional = dict(kwargs.pop("additional_config", None) or {})
        settings = _settings(kv_compress, given, additional.get("kv_compress"))
        if settings is not None:
            additional["kv_compress"] = KVCompressConfig.from_dict(settings).to_dict()
        super().__init__(model=model, additional_config=additional, **kwargs)

    def kv_compress_reconfigure(self, **settings: Any) -> None:
        """Compress the prompts to come by another setting, without a new engine (experimental).

        For comparing methods: the prefix cache stays, so a prompt that was computed under one
        method is only computed from its window on under the next.

        Args:
            settings: method, budget or ratio, window, options, as in `KVCompressConfig`. Prompt
                logprobs beside `suffix_tokens` are refused only if the engine was started with it.

        Raises:
            KVCompressConfigError: if a setting cannot work, or needs what this engine was not
                started with: the engine must run in this process (environment variable
                VLLM_ENABLE_V1_MULTIPROCESSING=0), with a region at least as large.
            RuntimeError: if requests are still running.
        """
        self._require_compression()
        if "method" not in settings:
            raise KVCompressConfigError("kv_compress_reconfigure needs a method")
        config = KVCompressConfig.from_dict(settings)
        core = getattr(self.llm_engine.engine_core, "engine_core", None)
        if core is None:
            raise KVCompressConfigError(
                "kv_compress_reconfigure needs the engine in this process: set "
                "VLLM_ENABLE_V1_MULTIPROCESSING=0"
            )
        manager = compressing_manager(core.scheduler.kv_cache_manager.coordinator)
        geometry = config.geometry(manager.block_size)
        max_len = self.llm_engine.vllm_config.model_config.max_model_len
        at_start = KVCompressConfig.from_dict(self._setting())
        room = at_start.geometry(manager.block_size).max_request_blocks(max_len)
        if geometry.max_request_blocks(max_len) > room:
            raise KVCompressConfigError(
                f"the new setting needs rows of {geometry.max_request_blocks(max_len)} blocks, "
                f"the engine was started with {room}; start it with a larger budget"
            )
        before = manager.kv_cache_spec.kv_compress
        manager.reconfigure(config)
        try:
            self.collective_rpc("kv_compress_reconfigure", args=(config.to_dict(),))
        except Exception:
            # The workers refuse before they change anything; scheduler and workers must agree.
            manager.reconfigure(before)
            raise

    def kv_compress_stats(self) -> dict[str, Any]:
        """What was kept and evicted so far.

        Returns:
            `totals`, and `requests` oldest first; see `metrics.CompressionStats.snapshot`.

        Raises:
            KVCompressConfigError: if this engine runs without compression.
        """
        self._require_compression()
        return merge_rank_stats(self.collective_rpc("kv_compress_stats"))

    def _setting(self) -> Any:
        """What the engine was started with; nothing if that is no compression."""
        additional: Any = self.llm_engine.vllm_config.additional_config
        return additional.get("kv_compress")

    def _require_compression(self) -> None:
        if not self._setting():
            raise KVCompressConfigError("this engine runs without KV compression")


def _settings(switch: Any, given: dict[str, Any], configured: Any) -> dict[str, Any] | None:
    """What `kv_compress`, the arguments beside it and additional_config say together.

    Returns:
        None if that is no compression. `kv_compress=False` is that, whatever stands beside it.

    Raises:
        KVCompressConfigError: if they contradict each other.
    """
    if switch is False:
        if as_settings(configured) is not None:
            raise KVCompressConfigError(
                "kv_compress is False, but additional_config has a kv_compress; drop one of them"
            )
        return None
    asked = as_settings(switch)
    if asked is None and not given:
        return as_settings(configured)
    return join_settings(configured, merge_settings(asked or {}, given))
