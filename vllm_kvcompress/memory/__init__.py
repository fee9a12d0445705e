"""Where kept tokens live: arithmetic shared by the scheduler's and the worker's side."""

from vllm_kvcompress.memory.cache_shape import CacheShape
from vllm_kvcompress.memory.compressed_row import CompressedRow, RowState
from vllm_kvcompress.memory.geometry import (
    Geometry,
    RequestGeometry,
    cdiv,
    shared_geometry,
)
from vllm_kvcompress.memory.page_format import PageFormat
from vllm_kvcompress.memory.retention import Retention, Schedule

__all__ = [
    "CacheShape",
    "CompressedRow",
    "Geometry",
    "PageFormat",
    "RequestGeometry",
    "Retention",
    "RowState",
    "Schedule",
    "cdiv",
    "shared_geometry",
]
