"""Counts and log lines of finished prompts."""

import logging
from types import SimpleNamespace

import pytest
import torch
from reachable import tensors_of

pytest.importorskip("vllm")

from vllm_kvcompress.memory import RequestGeometry
from vllm_kvcompress.ops import transfers
from vllm_kvcompress.vllm_integration.worker import metrics
from vllm_kvcompress.vllm_integration.worker.metrics import (
    CompressionStats,
    external_request_id,
    merge_rank_stats,
)
from vllm_kvcompress.vllm_integration.worker.worker import CompressionWorker

GEOMETRY = RequestGeometry(
    prompt_len=200, block_size=16, first_kept_block=11, num_region_blocks=2, compact_len=200
)
# Compacted at the same point, 30 tokens before the prompt's end.
SUFFIX_GEOMETRY = RequestGeometry(
    prompt_len=230, block_size=16, first_kept_block=11, num_region_blocks=2, compact_len=200
)


def compress(stats, request_id, geometry, pages, **kwargs):
    """Record a prompt that was compacted alone; `pages` are [L, H]."""
    stats.record_compressed([request_id], [geometry], torch.as_tensor(pages)[None], **kwargs)


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
    compress(stats, "0-a74c0dd9", GEOMETRY, [[1, 3], [2, 2]])
    stats.record_whole("1-a74c0dda", 40)
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
    compress(stats, "0-a74c0dd9", SUFFIX_GEOMETRY, [[1, 3]])
    (record,) = stats.snapshot()["requests"]
    assert record["kept_per_head"] == [[70, 102]]
    assert record["evicted_per_head"] == [[160, 128]]
    assert (record["prompt_len"], record["kept_tokens"], record["evicted_tokens"]) == (230, 86, 144)


def test_blocks_that_were_never_taken_are_not_returned() -> None:
    stats = CompressionStats(log=False)
    pages = [[1, 3], [2, 2]]
    compress(stats, "0-a74c0dd9", GEOMETRY, pages, is_one_shot=True)
    compress(stats, "1-a74c0dd9", GEOMETRY, pages)
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
        stats.record_whole(f"{i}-a74c0dd9", 10)
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
        compress(stats, "0-a74c0dd9", GEOMETRY, [[2, 2]])
        stats.record_whole("1-a74c0dda", 40)
        stats.flush()
        stats.flush()
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
        "kv-compress: 2 prompts (1 compressed, 0 in one shot, 1 stayed dense), "
        "96 of 240 prompt tokens kept per head (60.0% evicted), 11 blocks returned to the pool, "
        "0 never taken, 2 blocks of regions taken"
    )


def test_a_budget_that_does_nothing_is_said(monkeypatch) -> None:
    lines = []
    monkeypatch.setattr(metrics.logger, "info", lambda text, *values: lines.append(text % values))
    stats = CompressionStats(log_interval_s=3600, budget=2048)
    for lengths in ([40, 2048, 300], [40, 2049], [30]):
        for prompt_len in lengths:
            stats.record_whole(f"{len(lines)}-{prompt_len}", prompt_len)
        stats.flush()
    stats.budget = None
    stats.record_whole("last", 30)
    stats.flush()
    beginnings = [line.split("), ")[0] for line in lines]
    said = ": not longer than the budget of 2048"
    assert beginnings == [
        f"kv-compress: 3 prompts (0 compressed, 0 in one shot, 3 stayed dense{said}",
        # Longer than the budget: dense for another reason.
        "kv-compress: 2 prompts (0 compressed, 0 in one shot, 2 stayed dense",
        f"kv-compress: 1 prompts (0 compressed, 0 in one shot, 1 stayed dense{said}",
        "kv-compress: 1 prompts (0 compressed, 0 in one shot, 1 stayed dense",
    ]


class StockWorker:
    """The stock worker's part of a step."""

    def execute_model(self, scheduler_output):
        return scheduler_output


class Worker(CompressionWorker, StockWorker):
    """A worker without a model; only its counts are looked at."""

    def __init__(self) -> None:
        self._engine = None
        self._stats = CompressionStats(log_interval_s=3600)


def test_counts_are_logged_when_nothing_runs_any_more(monkeypatch) -> None:
    # A command that runs a batch ends its workers right after the last answer.
    lines = []
    monkeypatch.setattr(metrics.logger, "info", lambda text, *values: lines.append(text % values))
    worker = Worker()
    worker._stats.record_whole("0-a74c0dd9", 40)
    worker.execute_model(SimpleNamespace(total_num_scheduled_tokens=1))
    assert lines == []
    for _ in range(2):
        worker.execute_model(SimpleNamespace(total_num_scheduled_tokens=0))
    (line,) = lines
    assert line.startswith("kv-compress: 1 prompts (0 compressed")


def test_ranks_are_joined_head_by_head() -> None:
    ranks = []
    for pages in ([[1, 3]], [[2, 2]]):
        stats = CompressionStats(log=False)
        compress(stats, "0-a74c0dd9", GEOMETRY, pages)
        ranks.append(stats.snapshot())
    merged = merge_rank_stats(ranks)
    assert merged["requests"][0]["kept_per_head"] == [[40, 72, 56, 56]]
    assert merged["requests"][0]["evicted_per_head"] == [[160, 128, 144, 144]]
    assert merged["totals"]["prompts"] == 1


# Devices, which are ahead of or behind the host.


class Device:
    """Stands in for a GPU: what is copied from it is on the host when it says so."""

    def __init__(self, monkeypatch):
        self.copies = []
        monkeypatch.setattr(transfers, "_start_copy", self.start_copy)

    def start_copy(self, values):
        copy = Copy(values)
        self.copies.append(copy)
        return copy.host, copy


class Copy:
    """One copy, and the event behind it."""

    def __init__(self, values):
        # Not the tensor, which the device may use for something else.
        self.contents, self.num_waits = values.tolist(), 0
        self.host = torch.full_like(values, -1)

    def arrive(self):
        if self.contents is not None:
            self.host.copy_(torch.tensor(self.contents))
            self.contents = None

    def query(self):
        return self.contents is None

    def synchronize(self):
        self.num_waits += self.contents is not None
        self.arrive()


def test_pages_come_to_the_host_in_their_own_time(monkeypatch):
    device, stats = Device(monkeypatch), CompressionStats(log=False)
    both = torch.tensor([[[1, 3], [2, 2]], [[4, 1], [1, 2]]], dtype=torch.int32)
    stats.record_compressed(["a", "b"], [GEOMETRY, SUFFIX_GEOMETRY], both)
    compress(stats, "c", GEOMETRY, [[3, 1], [0, 4]])
    stats.record_whole("dense", 40)
    assert len(device.copies) == 2
    # The first is there, which the next one finds out.
    device.copies[0].arrive()
    compress(stats, "d", GEOMETRY, [[2, 2], [2, 2]])
    waiting = {id(tensor) for tensor in tensors_of(stats)}
    assert waiting == {id(copy.host) for copy in device.copies[1:]}
    assert [copy.num_waits for copy in device.copies] == [0, 0, 0]
    found = {r["internal_id"]: r for r in stats.snapshot()["requests"]}
    assert [copy.num_waits for copy in device.copies] == [0, 1, 1]
    assert tensors_of(stats) == []
    assert {name: r["kept_per_head"] for name, r in found.items()} == {
        "a": [[40, 72], [56, 56]],
        "b": [[118, 70], [70, 86]],
        "c": [[72, 40], [24, 88]],
        "d": [[56, 56], [56, 56]],
        "dense": None,
    }
    assert found["b"]["evicted_per_head"] == [[112, 160], [160, 144]]
    assert stats.snapshot()["requests"] == list(found.values())


def test_a_prompt_computed_again_has_its_last_pages(monkeypatch):
    device, stats = Device(monkeypatch), CompressionStats(log=False)
    compress(stats, "a", GEOMETRY, [[1, 3]])
    compress(stats, "a", GEOMETRY, [[2, 2]])
    device.copies[0].arrive()
    (record,) = stats.snapshot()["requests"]
    assert (record["kept_per_head"], record["num_prefills"]) == ([[56, 56]], 2)


def test_pages_of_a_dropped_record_are_no_harm(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_REQUEST_RECORDS", 1)
    Device(monkeypatch)
    stats = CompressionStats(log=False)
    compress(stats, "a", GEOMETRY, [[1, 3]])
    compress(stats, "b", GEOMETRY, [[2, 2]])
    (record,) = stats.snapshot()["requests"]
    assert (record["internal_id"], record["kept_per_head"]) == ("b", [[56, 56]])


def test_a_copy_is_of_what_there_was():
    values = torch.tensor([1, 2])
    copy = transfers.HostCopy(values)
    values.fill_(0)
    assert copy.has_arrived() and copy.take().tolist() == [1, 2]


def test_no_tensor_is_kept_of_prompts_that_have_been_computed():
    stats, pages = CompressionStats(log=False), torch.tensor([[[1, 3], [2, 2]]])
    for i in range(5):
        stats.record_compressed([f"r{i}"], [GEOMETRY], pages)
        pages.fill_(2)
    assert tensors_of(stats) == []
    kept = [r["kept_per_head"] for r in stats.snapshot()["requests"]]
    assert kept == [[[40, 72], [56, 56]]] + 4 * [[[56, 56], [56, 56]]]


def test_a_tensor_without_contents_is_told():
    stats = CompressionStats(log=False)
    stats.record_compressed(["a"], [GEOMETRY], torch.empty(1, 2, 2, device="meta"))
    assert tensors_of(stats) == []
    with pytest.raises(RuntimeError, match="'meta' has no contents"):
        stats.snapshot()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_keeps_nothing_and_is_not_waited_for():
    stats, pages = CompressionStats(log=False), torch.tensor([[[1, 3], [2, 2]]], device="cuda")
    stats.record_compressed(["first"], [GEOMETRY], pages)
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # The device is busy for a while, and the source is used again behind the copies.
        torch.cuda._sleep(100_000_000)
        for i in range(50):
            stats.record_compressed([f"r{i}"], [GEOMETRY], pages)
            pages.fill_(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == before
    assert not any(tensor.is_cuda for tensor in tensors_of(stats))
    kept = [r["kept_per_head"] for r in stats.snapshot()["requests"]]
    assert kept == 2 * [[[40, 72], [56, 56]]] + 49 * [[[56, 56], [56, 56]]]
    assert tensors_of(stats) == []
