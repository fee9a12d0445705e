"""Copies of what is kept: into regions, and of entries from anywhere to anywhere."""

from vllm_kvcompress.ops.move.compact import compact, select_and_compact
from vllm_kvcompress.ops.move.entries import move_entries

__all__ = ["compact", "move_entries", "select_and_compact"]
