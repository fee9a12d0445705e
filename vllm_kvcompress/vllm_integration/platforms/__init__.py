"""The platforms there are, each a folder of its own."""

from __future__ import annotations

import pkgutil
from typing import Any

from vllm_kvcompress.config import KVCompressConfigError
from vllm_kvcompress.vllm_integration.platforms.base import Platform
from vllm_kvcompress.vllm_integration.platforms.cpu.platform import CPU
from vllm_kvcompress.vllm_integration.platforms.cuda.platform import CUDA

PLATFORMS: tuple[Platform, ...] = (CPU(), CUDA())


def choose_platform(worker_cls: Any) -> Platform:
    """The platform of an engine that is to be started.

    Args:
        worker_cls: vLLM's setting: 'auto', or a path. A class of somebody else's that says its
            `platform` brings one that is not in the list.

    Raises:
        KVCompressConfigError: if vLLM's platform is none of ours, or the class cannot compress.
    """
    if worker_cls == "auto":
        return _current_platform()
    for platform in PLATFORMS:
        if worker_cls == platform.worker:
            return platform
    outside = _platform_of_class(worker_cls)
    if outside is None:
        raise KVCompressConfigError(
            "KV compression brings its own worker class and cannot use "
            f"{worker_cls!r}; drop --worker-cls"
        )
    return outside


def _current_platform() -> Platform:
    for platform in PLATFORMS:
        if platform.is_current():
            return platform
    from vllm.platforms import current_platform

    raise KVCompressConfigError(
        f"this release of vllm-kvcompress runs on vLLM's {_all_names()} platforms only, not on "
        f"{current_platform.device_name}"
    )


def _all_names() -> str:
    return " and ".join(platform.name for platform in PLATFORMS)


def _platform_of_class(worker_cls: Any) -> Platform | None:
    """What a worker class says; None if there is no such class, or it does not say."""
    if isinstance(worker_cls, str):
        try:
            worker_cls = pkgutil.resolve_name(worker_cls)
        except (ImportError, AttributeError, ValueError):
            return None
    platform = getattr(worker_cls, "platform", None)
    return platform if isinstance(platform, Platform) else None
