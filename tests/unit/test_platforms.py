"""Which platform an engine gets, and what it may be told by its worker's class."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from plain_platform.platform import Plain
from plain_platform.worker import PlainWorker

from vllm_kvcompress.config import DEFAULT_BLOCK_SIZE, KVCompressConfigError
from vllm_kvcompress.vllm_integration import platforms
from vllm_kvcompress.vllm_integration.platforms import PLATFORMS, choose_platform
from vllm_kvcompress.vllm_integration.platforms.cpu.worker import KVCompressCPUWorker
from vllm_kvcompress.vllm_integration.platforms.cuda.worker import KVCompressCUDAWorker
from vllm_kvcompress.vllm_integration.validate import prepare_engine_args


def test_a_worker_class_and_its_platform_name_each_other():
    by_worker = {platform.worker: type(platform) for platform in PLATFORMS}
    for worker in (KVCompressCPUWorker, KVCompressCUDAWorker):
        path = f"{worker.__module__}.{worker.__qualname__}"
        assert type(worker.platform) is by_worker[path]
        assert choose_platform(path).worker == path
    assert {p.name: p.block_size for p in PLATFORMS} == DEFAULT_BLOCK_SIZE


def test_vllms_platform_is_taken_where_nobody_says_another(monkeypatch):
    monkeypatch.setattr(platforms, "PLATFORMS", (Plain(),))
    assert choose_platform("auto").name == "plain"
    monkeypatch.setattr(Plain, "is_current", lambda self: False)
    with pytest.raises(KVCompressConfigError, match="vLLM's plain platforms only, not on "):
        choose_platform("auto")


@pytest.mark.parametrize("worker_cls", ["plain_platform.worker.PlainWorker", PlainWorker])
def test_a_worker_class_may_bring_its_platform(worker_cls):
    args = SimpleNamespace(
        worker_cls=worker_cls,
        block_size=None,
        additional_config={"kv_compress": {"method": "snapkv", "ratio": 0.5}},
    )
    prepare_engine_args(args)
    assert args.worker_cls == "plain_platform.worker.PlainWorker"
    assert args.block_size == Plain.block_size


@pytest.mark.parametrize(
    "worker_cls",
    ["no.such.Worker", "plain_platform.worker.NoWorker", "Worker", "", "vllm.LLM", int],
)
def test_a_worker_class_without_a_platform_is_refused(worker_cls):
    with pytest.raises(KVCompressConfigError, match=r"drop --worker-cls$"):
        choose_platform(worker_cls)
