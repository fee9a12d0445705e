"""What the scheduler tells the workers of a step beside vLLM's own fields."""

from __future__ import annotations

from collections.abc import Container
from typing import Any


def tell_whole_ids(scheduler_output: Any, whole_ids: set[str]) -> None:
    """Tell workers which requests of a step are never compressed.

    vLLM's own fields do not say that a request is a session. It pickles the output with whatever
    attributes it has.
    """
    scheduled = scheduler_output.num_scheduled_tokens
    scheduler_output.kv_compress_whole_ids = whole_ids & scheduled.keys()


def told_whole_ids(scheduler_output: Any) -> Container[str]:
    """Requests of a step that are never compressed, as the scheduler told."""
    return getattr(scheduler_output, "kv_compress_whole_ids", ())
