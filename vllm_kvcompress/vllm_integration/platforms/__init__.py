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
            `platform`, and is that platform's worker, brings one that is not in the list.

    Raises:
        KVCompressConfigError: if vLLM's platform is none of ours, or the class is no worker of it.
    """
    current = next((platform for platform in PLATFORMS if platform.is_current()), None)
    if worker_cls == "auto":
        if current is None:
            raise _no_platform()
        return current
    platform = platform_of(worker_cls)
    if platform in PLATFORMS and platform is not current:
        raise _no_worker(worker_cls)
    return platform


def platform_of(worker_cls: Any) -> Platform:
    """The platform of a worker class.

    Args:
        worker_cls: its path.

    Raises:
        KVCompressConfigError: if it is the worker of no platform.
    """
    for platform in PLATFORMS:
        if worker_cls == platform.worker:
            return platform
    outside = _outside_platform(worker_cls)
    if outside is None:
        raise _no_worker(worker_cls)
    return outside


def _outside_platform(worker_cls: Any) -> Platform | None:
    """What a class of somebody else's says; None if it cannot be had, or says nothing."""
    try:
        found = pkgutil.resolve_name(worker_cls)
    # Whatever goes wrong in there, the class is none that can be used.
    except Exception:
        return None
    platform = getattr(found, "platform", None)
    if not isinstance(platform, Platform):
        return None
    # A subclass of a worker has its platform, but is not what the platform would start.
    path = f"{found.__module__}.{found.__qualname__}"
    return platform if path == platform.worker else None


def _no_worker(worker_cls: Any) -> KVCompressConfigError:
    return KVCompressConfigError(
        f"KV compression brings its own worker class and cannot use {worker_cls!r}; drop "
        "--worker-cls"
    )


def _no_platform() -> KVCompressConfigError:
    from vllm.platforms import current_platform

    names = " and ".join(platform.name for platform in PLATFORMS)
    return KVCompressConfigError(
        f"this release of vllm-kvcompress runs on vLLM's {names} platforms only, not on "
        f"{current_platform.device_name}"
    )
