"""Counts and log lines of finished prompts."""

import logging

import pytest
import torch

pytest.importorskip("vllm")

from vllm_kvcompress.memory import RequestGeometry
from vllm_kvcompress.vllm_integration import metrics
from vllm_kvcompress.vllm_integration.metrics import (
    CompressionStats,
    external_request_id,
    merge_rank_stats,
)

GEOMETRY = RequestGeometry(
    prompt_len=200, block_size=16, first_kept_block=11, num_region_blocks=2, compact_len=200
)
# Compacted at the same point, 30 tokens before the prompt's end.
SUFFIX_GEOMETRY = RequestGeometry(
    prompt_len=230, block_size=16, first_kept_block=11, num_region_blocks=2, compact_len=200
)


@pytest.mark.parametrize(
    ("internal", "external"),
    [
        ("0-a74c0dd9", "0"),
        ("chatcmpl-abc-12345678", "chatcmpl-abc"),
        ("2_7-a74c0dd9", "7"),
        ("plain", "plain"),
    ],
)
def test_external_request_id(internal: str, external: str) -> None:
    assert external_request_id(internal) == external


def test_counts_of_compressed_and_dense_prompts() -> None:
    stats = CompressionStats(log=False)
    stats.record_compressed("0-a74c0dd9", GEOMETRY, torch.tensor([[1, 3], [2, 2]]))
    stats.record_dense("1-a74c0dda", 40)
    snapshot = stats.snapshot()
    compressed, dense = snapshot["requests"]
    # 200 - 11 * 16 = 24 dense prompt tokens beside the pages.
    assert compressed["kept_per_head"] == [[40, 72], [56, 56]]
    assert compressed["evicted_per_head"] == [[160, 128], [144, 144]]
    assert compressed["kept_tokens"] == 56
    assert compressed["evicted_tokens"] == 144
    assert compressed["blocks_returned"] == 11
    assert dense["kept_per_head"] is None
    assert snapshot["totals"] == {
        "prompts": 2,
        "compressed_prompts": 1,
        "recomputed_prompts": 0,
        "prompt_tokens": 240,
        "kept_tokens": 96,
        "evicted_tokens": 144,
        "one_shot_prompts": 0,
        "blocks_returned": 11,
        "blocks_not_taken": 0,
        "region_blocks": 2,
    }


def test_tokens_after_the_compaction_point_count_as_kept() -> None:
    stats = CompressionStats(log=False)
    stats.record_compressed("0-a74c0dd9", SUFFIX_GEOMETRY, torch.tensor([[1, 3]]))
    (record,) = stats.snapshot()["requests"]
    assert record["kept_per_head"] == [[70, 102]]
    assert record["evicted_per_head"] == [[160, 128]]
    assert (record["prompt_len"], record["kept_tokens"], record["evicted_tokens"]) == (230, 86, 144)


def test_blocks_that_were_never_taken_are_not_returned() -> None:
    stats = CompressionStats(log=False)
    pages = torch.tensor([[1, 3], [2, 2]])
    stats.record_compressed("0-a74c0dd9", GEOMETRY, pages, is_one_shot=True)
    stats.record_compressed("1-a74c0dd9", GEOMETRY, pages)
    snapshot = stats.snapshot()
    one_shot, usual = snapshot["requests"]
    assert (one_shot["one_shot"], usual["one_shot"]) == (True, False)
    assert (one_shot["blocks_returned"], one_shot["blocks_not_taken"]) == (0, 11)
    assert (usual["blocks_returned"], usual["blocks_not_taken"]) == (11, 0)
    totals = snapshot["totals"]
    assert totals["one_shot_prompts"] == 1
    assert (totals["blocks_returned"], totals["blocks_not_taken"]) == (11, 11)


def test_only_the_newest_records_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(metrics, "MAX_REQUEST_RECORDS", 3)
    stats = CompressionStats(log=False)
    for i in range(5):
        stats.record_dense(f"{i}-a74c0dd9", 10)
    snapshot = stats.snapshot()
    assert [record["request_id"] for record in snapshot["requests"]] == ["2", "3", "4"]
    assert snapshot["totals"]["prompts"] == 5


def test_one_line_per_request_and_one_per_interval() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger(metrics.logger.name)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        stats = CompressionStats(log_interval_s=3600)
        stats.record_compressed("0-a74c0dd9", GEOMETRY, torch.tensor([[2, 2]]))
        stats.record_dense("1-a74c0dda", 40)
        stats.close()
        stats.close()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    messages = [(record.levelname, record.getMessage()) for record in records]
    assert [level for level, _ in messages] == ["DEBUG", "DEBUG", "INFO"]
    assert messages[0][1] == (
        "kv-compress: request 0-a74c0dd9: prompt 200 tokens, kept 56 per head, evicted 144, "
        "11 blocks returned, 0 never taken, 2 blocks of region"
    )
    assert messages[2][1] == (
        "kv-compress: 2 prompts (1 compressed, 0 in one shot), 96 of 240 prompt tokens kept "
        "per head (60.0% evicted), 11 blocks returned to the pool, 0 never taken, "
        "2 blocks of regions taken"
    )


def test_ranks_are_joined_head_by_head() -> None:
    ranks = []
    for pages in ([[1, 3]], [[2, 2]]):
        stats = CompressionStats(log=False)
        stats.record_compressed("0-a74c0dd9", GEOMETRY, torch.tensor(pages))
        ranks.append(stats.snapshot())
    merged = merge_rank_stats(ranks)
    assert merged["requests"][0]["kept_per_head"] == [[40, 72, 56, 56]]
    assert merged["requests"][0]["evicted_per_head"] == [[160, 128, 144, 144]]
    assert merged["totals"]["prompts"] == 1
