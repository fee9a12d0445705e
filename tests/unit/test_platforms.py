"""Which platform an engine gets, and what it may be told by its worker's class."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from plain_platform.platform import Plain

from vllm_kvcompress.config import DEFAULT_BLOCK_SIZE, KVCompressConfigError
from vllm_kvcompress.vllm_integration import platforms
from vllm_kvcompress.vllm_integration.platforms import PLATFORMS, choose_platform, platform_of
from vllm_kvcompress.vllm_integration.platforms.cpu.worker import KVCompressCPUWorker
from vllm_kvcompress.vllm_integration.platforms.cuda.worker import KVCompressCUDAWorker
from vllm_kvcompress.vllm_integration.validate import prepare_engine_args


def test_a_worker_class_and_its_platform_name_each_other():
    by_worker = {platform.worker: type(platform) for platform in PLATFORMS}
    for worker in (KVCompressCPUWorker, KVCompressCUDAWorker):
        path = f"{worker.__module__}.{worker.__qualname__}"
        assert type(worker.platform) is by_worker[path]
        assert platform_of(path).worker == path
    assert {p.name: p.block_size for p in PLATFORMS} == DEFAULT_BLOCK_SIZE


def test_vllms_platform_is_taken_where_nobody_says_another(monkeypatch):
    monkeypatch.setattr(platforms, "PLATFORMS", (Plain(),))
    assert choose_platform("auto").name == "plain"
    monkeypatch.setattr(Plain, "is_current", lambda self: False)
    with pytest.raises(KVCompressConfigError, match="vLLM's plain platforms only, not on "):
        choose_platform("auto")


def test_a_worker_class_may_bring_its_platform():
    args = SimpleNamespace(
        worker_cls="plain_platform.worker.PlainWorker",
        block_size=None,
        additional_config={"kv_compress": {"method": "snapkv", "ratio": 0.5}},
    )
    prepare_engine_args(args)
    assert args.worker_cls == "plain_platform.worker.PlainWorker"
    assert args.block_size == Plain.block_size


@pytest.mark.parametrize(
    "worker_cls",
    [
        "no.such.Worker",
        "plain_platform.worker.NoWorker",
        "Worker",
        "",
        "vllm.LLM",
        "an_own_worker.Worker",
        "a_broken_module.Worker",
    ],
)
def test_another_worker_class_is_refused(monkeypatch, tmp_path, worker_cls):
    (tmp_path / "a_broken_module.py").write_text("raise RuntimeError('nothing works')")
    # One that has the platform of the worker that it is made of.
    (tmp_path / "an_own_worker.py").write_text(
        "from plain_platform.worker import PlainWorker\nclass Worker(PlainWorker): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for choose in (choose_platform, platform_of):
        with pytest.raises(KVCompressConfigError, match=r"drop --worker-cls$"):
            choose(worker_cls)


def test_the_worker_of_another_platform_is_refused():
    for worker in (KVCompressCPUWorker, KVCompressCUDAWorker):
        path = f"{worker.__module__}.{worker.__qualname__}"
        if worker.platform.is_current():
            assert choose_platform(path).worker == path
        else:
            with pytest.raises(KVCompressConfigError, match=r"drop --worker-cls$"):
                choose_platform(path)
