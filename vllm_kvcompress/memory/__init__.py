"""Where kept tokens live: arithmetic shared by the scheduler's and the worker's side."""

from vllm_kvcompress.memory.cache_shape import CacheShape
from vllm_kvcompress.memory.geometry import (
    NULL_BLOCK,
    Geometry,
    RequestGeometry,
    cdiv,
    shared_geometry,
)
from vllm_kvcompress.memory.retention import Retention, Schedule

__all__ = [
    "NULL_BLOCK",
    "CacheShape",
    "Geometry",
    "RequestGeometry",
    "Retention",
    "Schedule",
    "cdiv",
    "shared_geometry",
]
