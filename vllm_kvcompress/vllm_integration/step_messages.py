"""What the scheduler tells the workers of a step beside vLLM's own fields."""

from __future__ import annotations

from typing import Any, NamedTuple


class StepMessage(NamedTuple):
    """What vLLM's own fields do not say of a step's requests.

    Attributes:
        whole_ids: those that are never compressed.
        one_shot_ids: those that begin in the step and have no blocks for what they evict.
    """

    whole_ids: frozenset[str] = frozenset()
    one_shot_ids: frozenset[str] = frozenset()


_NOTHING = StepMessage()


def tell(scheduler_output: Any, message: StepMessage) -> None:
    """Put a message on a step's output, if it says anything.

    vLLM pickles the output with whatever attributes it has.
    """
    if message != _NOTHING:
        scheduler_output.kv_compress_message = message


def told(scheduler_output: Any) -> StepMessage:
    """What the scheduler has told of a step."""
    return getattr(scheduler_output, "kv_compress_message", _NOTHING)
