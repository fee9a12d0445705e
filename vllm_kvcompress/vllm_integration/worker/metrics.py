"""Counts of what was kept and evicted, per request and in total, and their log lines."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_kvcompress.memory import RequestGeometry
from vllm_kvcompress.ops.transfers import HostCopy

# Under "vllm", whose logging configuration would not reach a logger of our own name.
logger = init_logger(f"vllm.{__name__}")

LOG_INTERVAL_S = 10.0
MAX_REQUEST_RECORDS = 10_000


@dataclass(frozen=True)
class _ComingPages:
    """[N, L, H] pages of prompts that were compacted together, and the records to put them in."""

    pages: HostCopy
    records: list[dict[str, Any]]
    geometries: Sequence[RequestGeometry]

    def take(self) -> None:
        """Complete the records; waits for the pages."""
        pages = self.pages.take()
        for record, geometry, own in zip(self.records, self.geometries, pages, strict=True):
            kept = own * geometry.block_size + geometry.num_dense_prompt_tokens
            record["kept_per_head"] = kept.astype(np.int32)


class CompressionStats:
    """One worker's counts.

    What only the device knows, the pages of each head, comes to the host in its own time: nobody
    waits for it but `snapshot`, and no tensor of the device is kept.

    Args:
        log_interval_s: seconds between INFO summaries; only intervals in which a prompt
            finished are logged.
        log: whether this worker logs (one rank does).
        budget: tokens kept per head, which the summaries name where prompts are not longer; None
            if a ratio is set. May be changed at any time.
    """

    def __init__(
        self,
        log_interval_s: float = LOG_INTERVAL_S,
        log: bool = True,
        budget: int | None = None,
    ) -> None:
        self.budget = budget
        # Of this interval: the longest prompt that stayed dense, tokens.
        self._longest_dense = 0
        # By internal id, in the order in which the prompts were first computed.
        self._requests: dict[str, dict[str, Any]] = {}
        # What is on its way, oldest first.
        self._coming: deque[_ComingPages] = deque()
        self._totals = _zero_totals()
        self._interval_totals = _zero_totals()
        self._interval_s = log_interval_s
        self._log = log
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def record_whole(self, request_id: str, prompt_len: int) -> None:
        """A prompt that stays whole has been computed, or the next part of a session's."""
        self._record(
            {
                "request_id": request_id,
                "prompt_len": prompt_len,
                "compressed": False,
                "kept_tokens": float(prompt_len),
                "evicted_tokens": 0.0,
                "one_shot": False,
                "blocks_returned": 0,
                "blocks_not_taken": 0,
                "region_blocks": 0,
                "kept_per_head": None,
                "evicted_per_head": None,
            }
        )

    def record_compressed(
        self,
        request_ids: Sequence[str],
        geometries: Sequence[RequestGeometry],
        num_pages: torch.Tensor,
        is_one_shot: bool = False,
    ) -> None:
        """Prompts have been compacted together.

        Args:
            request_ids: [N] vLLM's internal ids.
            geometries: [N] of the requests.
            num_pages: [N, L, H] integers, region pages kept by each head, on any device.
            is_one_shot: whether what was evicted never had blocks.
        """
        records = []
        for request_id, geometry in zip(request_ids, geometries, strict=True):
            records.append(
                {
                    "request_id": request_id,
                    "prompt_len": geometry.prompt_len,
                    "compressed": True,
                    "kept_tokens": float(geometry.num_kept_tokens),
                    "evicted_tokens": float(geometry.prompt_len - geometry.num_kept_tokens),
                    "one_shot": is_one_shot,
                    "blocks_returned": 0 if is_one_shot else geometry.first_kept_block,
                    "blocks_not_taken": geometry.first_kept_block if is_one_shot else 0,
                    "region_blocks": geometry.num_region_blocks,
                }
            )
            self._record(records[-1])
        coming = _ComingPages(HostCopy(num_pages), records, geometries)
        with self._lock:
            self._coming.append(coming)
            while self._coming and self._coming[0].pages.has_arrived():
                self._coming.popleft().take()

    def snapshot(self) -> dict[str, Any]:
        """Plain data: `totals`, and `requests` oldest first (the last 10,000).

        A request counts from the step that computes the end of its prompt, and once only, also
        if it is preempted and computed again (`num_prefills` and `recomputed_prompts` tell) or
        its prompt grows (a streaming-input session).
        Each request has request_id (the caller's), internal_id (vLLM's), prompt_len, compressed,
        kept_tokens and evicted_tokens (mean over layers and heads), one_shot (whether what was
        evicted never had blocks), blocks_returned to the pool or else blocks_not_taken,
        region_blocks, num_prefills, and kept_per_head and evicted_per_head as [layer][head]
        token counts (None for a dense one).
        """
        with self._lock:
            while self._coming:
                self._coming.popleft().take()
            requests = [dict(record) for record in self._requests.values()]
            totals = dict(self._totals)
        for record in requests:
            kept = record["kept_per_head"]
            if kept is not None:
                record["kept_per_head"] = kept.tolist()
                record["evicted_per_head"] = (record["prompt_len"] - kept).tolist()
            record["internal_id"] = record["request_id"]
            record["request_id"] = external_request_id(record["internal_id"])
        return {"totals": totals, "requests": requests}

    def flush(self) -> None:
        """Log what is pending and stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._log_interval()

    def _record(self, record: dict[str, Any]) -> None:
        with self._lock:
            known = self._requests.get(record["request_id"])
            num_grown = 0 if known is None else record["prompt_len"] - known["prompt_len"]
            record["num_prefills"] = 1 if known is None else known["num_prefills"] + (not num_grown)
            self._requests[record["request_id"]] = record
            if len(self._requests) > MAX_REQUEST_RECORDS:
                del self._requests[next(iter(self._requests))]
            for totals in (self._totals, self._interval_totals):
                if num_grown:
                    totals["prompt_tokens"] += num_grown
                    totals["kept_tokens"] += num_grown
                    continue
                if known is not None:
                    totals["recomputed_prompts"] += 1
                    continue
                totals["prompts"] += 1
                totals["compressed_prompts"] += record["compressed"]
                totals["prompt_tokens"] += record["prompt_len"]
                totals["kept_tokens"] += record["kept_tokens"]
                totals["evicted_tokens"] += record["evicted_tokens"]
                totals["one_shot_prompts"] += record["one_shot"]
                totals["blocks_returned"] += record["blocks_returned"]
                totals["blocks_not_taken"] += record["blocks_not_taken"]
                totals["region_blocks"] += record["region_blocks"]
            if not record["compressed"]:
                self._longest_dense = max(self._longest_dense, record["prompt_len"])
            if self._log and self._timer is None:
                self._timer = threading.Timer(self._interval_s, self._log_interval)
                self._timer.daemon = True
                self._timer.start()
        if self._log:
            logger.debug(
                "kv-compress: request %s: prompt %d tokens, kept %.0f per head, evicted %.0f, "
                "%d blocks returned, %d never taken, %d blocks of region",
                record["request_id"],
                record["prompt_len"],
                record["kept_tokens"],
                record["evicted_tokens"],
                record["blocks_returned"],
                record["blocks_not_taken"],
                record["region_blocks"],
            )

    def _log_interval(self) -> None:
        with self._lock:
            totals, self._interval_totals = self._interval_totals, _zero_totals()
            longest_dense, self._longest_dense = self._longest_dense, 0
            self._timer = None
        if totals["prompts"] == 0:
            return
        num_dense = totals["prompts"] - totals["compressed_prompts"]
        dense = f", {num_dense} stayed dense" if num_dense else ""
        if num_dense and self.budget is not None and longest_dense <= self.budget:
            dense += f": not longer than the budget of {self.budget}"
        logger.info(
            "kv-compress: %d prompts (%d compressed, %d in one shot%s), %d of %d prompt tokens "
            "kept per head (%.1f%% evicted), %d blocks returned to the pool, %d never taken, "
            "%d blocks of regions taken",
            totals["prompts"],
            totals["compressed_prompts"],
            totals["one_shot_prompts"],
            dense,
            totals["kept_tokens"],
            totals["prompt_tokens"],
            100 * totals["evicted_tokens"] / totals["prompt_tokens"],
            totals["blocks_returned"],
            totals["blocks_not_taken"],
            totals["region_blocks"],
        )


def _zero_totals() -> dict[str, Any]:
    return {
        "prompts": 0,
        "compressed_prompts": 0,
        "one_shot_prompts": 0,
        "recomputed_prompts": 0,
        "prompt_tokens": 0,
        "kept_tokens": 0.0,
        "evicted_tokens": 0.0,
        "blocks_returned": 0,
        "blocks_not_taken": 0,
        "region_blocks": 0,
    }


def external_request_id(internal_id: str) -> str:
    """The id the caller knows: without vLLM's random suffix and the sample index of n > 1."""
    match = re.fullmatch(r"(?:\d+_)?(.+)-[0-9a-f]{8}", internal_id)
    return match.group(1) if match else internal_id


def merge_rank_stats(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the snapshots of all tensor-parallel ranks: counts agree, heads are side by side.

    Args:
        ranks: `CompressionStats.snapshot()` of each rank, in rank order.

    Returns:
        One snapshot whose counts per head cover every rank's heads.
    """
    merged = {"totals": ranks[0]["totals"], "requests": [dict(r) for r in ranks[0]["requests"]]}
    for other in ranks[1:]:
        for mine, theirs in zip(merged["requests"], other["requests"], strict=True):
            for key in ("kept_per_head", "evicted_per_head"):
                if mine[key] is not None:
                    mine[key] = [a + b for a, b in zip(mine[key], theirs[key], strict=True)]
    return merged
