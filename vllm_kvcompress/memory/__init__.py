"""Where kept tokens live: arithmetic shared by the scheduler's and the worker's side."""

from vllm_kvcompress.memory.geometry import Geometry, RequestGeometry, cdiv

__all__ = ["Geometry", "RequestGeometry", "cdiv"]
