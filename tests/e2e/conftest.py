"""Real engines and a real model, shared by the tests of a module."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from devices import DTYPES, ON_A_GPU
from in_process_engines import SHUTDOWN_S
from tiny_models import tiny_llama

_SUBJECTS = ("The miller", "A quiet clerk", "The old captain", "Her neighbour", "The gardener")
_VERBS = ("walked to", "wrote a letter about", "remembered", "painted", "complained about")
_OBJECTS = (
    "the harbour",
    "the broken clock",
    "a field of barley",
    "the winter market",
    "the bridge",
)
_ENDINGS = (
    "before the rain came",
    "without a word",
    "as he did each spring",
    "and went home early",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e" in Path(str(item.path)).parts:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def model() -> str:
    """Folder of SmolLM2-135M-Instruct, made by scripts/setup.sh."""
    default = Path(__file__).parents[2] / ".cache" / "models" / "smollm2"
    path = Path(os.environ.get("KVC_MODEL", default))
    if not (path / "config.json").exists():
        pytest.fail(f"no model at {path}: run scripts/test.sh, which builds it, or set KVC_MODEL")
    return str(path)


@pytest.fixture(scope="session")
def prose() -> Callable[[int, int], str]:
    """`prose(seed, sentences)`: made-up sentences, the same for the same arguments."""

    def make(seed: int, sentences: int) -> str:
        pick = random.Random(seed).choice
        return " ".join(
            f"{pick(_SUBJECTS)} {pick(_VERBS)} {pick(_OBJECTS)} {pick(_ENDINGS)}."
            for _ in range(sentences)
        )

    return make


@pytest.fixture(scope="session")
def needle(prose: Callable[[int, int], str]) -> Callable[..., tuple[list[dict], str]]:
    """`needle(seed, sentences)`: a chat whose long context hides a code, and the code."""

    def make(seed: int, sentences: int = 110) -> tuple[list[dict], str]:
        code = str(random.Random(1000 + seed).randint(10_000, 99_999))
        before = sentences // 3
        text = (
            f"{prose(seed, before)} The secret code of the vault is {code}. "
            f"{prose(seed + 500, sentences - before)}\n"
            "What is the secret code of the vault? Answer with the number only."
        )
        return [{"role": "user", "content": text}], code

    return make


@pytest.fixture(scope="module", params=["cpu", ON_A_GPU])
def device(request) -> Iterator[str]:
    """Where engines of this module run (see devices.py); the installed vLLM has a CPU or a GPU."""
    from cuda_on_cpu import use_cuda_side
    from plain_platform.platform import Plain
    from vllm.platforms import current_platform

    from vllm_kvcompress.vllm_integration import platforms

    wanted = "cuda" if request.param == "cuda" else "cpu"
    if current_platform.device_type != wanted:
        pytest.skip(f"this vLLM runs on {current_platform.device_type}, not on {wanted}")
    with pytest.MonkeyPatch.context() as patch:
        if request.param in ("cuda_on_cpu", "plain"):
            _engines_in_process(patch)
        if request.param == "cuda_on_cpu":
            use_cuda_side(patch)
        elif request.param == "plain":
            patch.setattr(platforms, "PLATFORMS", (Plain(),))
        yield request.param


@pytest.fixture(scope="module")
def dtype(device: str) -> str:
    """Of models whose texts are compared."""
    return DTYPES[device]


@pytest.fixture(scope="module")
def engines_in_process():
    """Engines of this process (see `in_process_engines`): a scheduler can be given settings."""
    with pytest.MonkeyPatch.context() as patch:
        _engines_in_process(patch)
        yield


def _engines_in_process(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # This process and its later children may go on using every core.
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.fixture(scope="module")
def start_engine(model: str, device: str):
    """Start an offline engine with test-sized defaults; all are shut down with the module."""
    engines = []

    def start(**settings):
        from vllm_kvcompress import LLM

        defaults = {
            "max_model_len": 2560,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 256 << 20,
            "block_size": 32,
            "enforce_eager": True,
            "disable_log_stats": False,
        }
        engine = LLM(model, **{**defaults, **settings})
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.llm_engine.engine_core.shutdown(timeout=SHUTDOWN_S)
    if torch.distributed.is_initialized():
        # An engine in this process; the next one wants a process without.
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def llama(model, tmp_path_factory):
    """Folder of a tiny model of random weights."""
    return tiny_llama(tmp_path_factory.mktemp("llama"), model)


def metric(engine, name: str) -> float:
    """Current value of one of vLLM's own gauges or counters."""
    values = [m.value for m in engine.get_metrics() if m.name == name]
    assert values, f"vLLM has no metric {name}"
    return sum(values)


@pytest.fixture(scope="session")
def read_metric() -> Callable[..., float]:
    return metric
