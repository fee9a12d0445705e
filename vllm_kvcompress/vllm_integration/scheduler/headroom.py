"""Room to grow: which compressed requests to let in now, so that they need not leave again soon.

vLLM lets a request in as soon as its prompt has blocks, and preempts the last one when a running
one needs a block that is not there. A compressed prompt has few blocks, so that many get in, whose
answers then outgrow the pool; and a preempted prompt is computed again, all of it, however small
it was in the cache. So a compressed prompt waits until enough can be generated before that.

How long answers will be is expected from those that have ended, as in LightLLM's past-future
scheduler (Gong et al., ASPLOS 2025, arXiv 2507.10150).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_kvcompress.memory import Geometry
from vllm_kvcompress.vllm_integration.scheduler.manager import request_geometry

_MOST_REMEMBERED = 1000


class OutputLengths:
    """How long answers have been lately, and what that says of those to come."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=_MOST_REMEMBERED)
        # In order, and the sum from each one on.
        self._sorted = self._sums = np.empty(0, np.int64)
        self._is_stale = False

    def add(self, num_tokens: int) -> None:
        """An answer has ended after `num_tokens`; those that never began tell nothing."""
        if num_tokens > 0:
            self._recent.append(num_tokens)
            self._is_stale = True

    def expected_rest(self, generated: np.ndarray) -> np.ndarray:
        """Tokens still to come, for answers that have some already.

        Args:
            generated: [n] tokens so far.

        Returns:
            [n] float64: the mean of what longer answers had left at that length; as much again
            for one longer than all of them; 0 where nothing is known.
        """
        if self._is_stale:
            self._sorted = np.sort(np.fromiter(self._recent, np.int64))
            self._sums = np.append(np.cumsum(self._sorted[::-1])[::-1], 0)
            self._is_stale = False
        if not len(self._sorted):
            return np.zeros(len(generated))
        first = np.searchsorted(self._sorted, generated, side="right")
        num_longer = len(self._sorted) - first
        mean = self._sums[first] / np.maximum(num_longer, 1)
        return np.where(num_longer > 0, mean - generated, generated)


def blocks_short(held: np.ndarray, rest: np.ndarray, horizon: float, block_size: int) -> int:
    """Most blocks that running requests will want at once beyond what they hold, until a time.

    Every request takes one token per step, and gives all its blocks back at its end.

    Args:
        held: [n] blocks of each request.
        rest: [n] tokens that each will still generate; 0 = unknown, taken to stay as it is.
        horizon: steps to look ahead.
        block_size: tokens per block.

    Returns:
        At least 0; up to a block per request more than they need, whose last blocks may have room.
    """
    is_growing = rest > 0
    order = np.argsort(rest[is_growing], kind="stable")
    ends = rest[is_growing][order]
    given_back = np.concatenate([[0], np.cumsum(held[is_growing][order])])
    # It is worst right before someone ends.
    times = np.append(ends[ends < horizon], horizon)
    num_gone = np.searchsorted(ends, times, side="left")
    wanted = (len(ends) - num_gone) * np.ceil(times / block_size) - given_back[num_gone]
    return max(0, int(wanted.max()))


def has_headroom(
    newcomer: Any,
    running: Sequence[Any],
    lengths: OutputLengths,
    geometry: Geometry,
    headroom: float,
    num_free: int,
    max_model_len: int,
) -> bool:
    """Whether a request will probably stay long enough to be worth its prefill.

    That is, until it ends or has generated `headroom` times the tokens that would have to be
    computed again. vLLM preempts the last one in, so the time is the newcomer's.

    Args:
        newcomer: vLLM's request, waiting or preempted.
        running: vLLM's requests that have blocks.
        lengths: of answers that have ended.
        geometry: of requests.
        headroom: the option of that name.
        num_free: free blocks.
        max_model_len: tokens of the longest request.
    """
    horizon = headroom * newcomer.num_tokens
    own = _num_blocks(newcomer, geometry)
    if own + (len(running) + 1) * math.ceil(horizon / geometry.block_size) <= num_free:
        # Even if all of them grew.
        return True
    requests = [*running, newcomer]
    generated = np.fromiter((r.num_output_tokens for r in requests), np.int64)
    limits = np.fromiter((_most_to_come(r, max_model_len) for r in requests), np.int64)
    floors = np.fromiter((_least_to_come(r) for r in requests), np.int64)
    held = np.fromiter((_num_blocks(r, geometry) for r in requests), np.int64)
    rest = np.minimum(np.maximum(lengths.expected_rest(generated), floors), limits)
    if rest[-1] > 0:
        horizon = min(horizon, rest[-1])
    short = blocks_short(held, rest, horizon, geometry.block_size)
    return own + short <= num_free


def _most_to_come(request: Any, max_model_len: int) -> int:
    longest = min(request.max_tokens, max_model_len - request.num_prompt_tokens)
    return max(0, longest - request.num_output_tokens)


def _least_to_come(request: Any) -> int:
    params = request.sampling_params
    is_certain = params.ignore_eos and not params.stop and not params.stop_token_ids
    least = request.max_tokens if is_certain else params.min_tokens
    return max(0, least - request.num_output_tokens)


def _num_blocks(request: Any, geometry: Geometry) -> int:
    """Blocks of a request once its prompt is compacted."""
    own = request_geometry(geometry, request)
    return own.num_row_blocks(request.num_tokens) - own.first_kept_block
