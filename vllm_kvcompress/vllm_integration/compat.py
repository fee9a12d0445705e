"""Which vLLM this release works with.

Names of vLLM that the seam relies on, by file:

* `engine/arg_utils.py`: `EngineArgs.add_cli_args`, `.from_cli_args`, `.create_engine_config`
  (wrapped in `register.py`, which says why), `.additional_config`, `.worker_cls`, `.block_size`.
* `v1/attention/backends/cpu_attn.py`: the CPU backend, its builder, impl and metadata.
* `v1/attention/backends/registry.py`: `AttentionBackendEnum`, `register_backend`; the cache of
  `v1/attention/selector.py`.
* `v1/kv_cache_interface.py`: `FullAttentionSpec`; `v1/kv_cache_layout.py`: `KVCacheLayout.BLHNC`.
* `v1/kv_cache_spec_registry.py`: `KVCacheSpecRegistry`.
* `v1/core/single_type_kv_cache_manager.py`: `FullAttentionManager` and its hooks.
* `v1/worker/cpu_worker.py`: `CPUWorker`; the model runner's `input_batch` (V1).
"""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

SUPPORTED_VLLM = SpecifierSet(">=0.32.0,<0.33")


class UnsupportedVLLMError(RuntimeError):
    """The installed vLLM is outside the range this release was built for."""


def check_vllm_version() -> None:
    """Raise UnsupportedVLLMError unless the installed vLLM is supported."""
    import vllm

    # Not the distribution's version: that goes by more than one name.
    found = vllm.__version__
    try:
        is_supported = SUPPORTED_VLLM.contains(Version(found), prereleases=True)
    except InvalidVersion:
        # A source tree without build metadata calls itself "dev".
        is_supported = False
    if not is_supported:
        own = metadata.version("vllm-kvcompress")
        raise UnsupportedVLLMError(
            f"vllm-kvcompress {own} works with vLLM {SUPPORTED_VLLM}; found vLLM {found}"
        )
