"""Three ranks of one KV head each: budgets per rank, one snapshot of all heads."""

from __future__ import annotations

import itertools
import os

import pytest


@pytest.fixture(scope="module")
def engine(start_engine):
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
    with pytest.MonkeyPatch.context() as patch:
        # vLLM asks for a memory node per rank unless threads are bound by hand.
        bind = "|".join(str(next(cores)) for _ in range(3))
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
        yield start_engine(
            kv_compress="ada-snapkv",
            kv_compress_budget=512,
            tensor_parallel_size=3,
            kv_cache_memory_bytes=96 << 20,
        )


def test_heads_of_all_ranks_are_compressed_and_counted(engine, needle) -> None:
    from vllm import SamplingParams

    chats, codes = zip(*(needle(seed) for seed in range(30, 34)), strict=True)
    outputs = engine.chat(list(chats), SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    records = engine.kv_compress_stats()["requests"]
    assert len(records) == 4
    for record in records:
        kept = record["kept_per_head"]
        assert [len(layer) for layer in kept] == [3] * 30
        # A rank shares among its own heads, and here has one.
        assert all(tokens == record["kept_tokens"] for layer in kept for tokens in layer)
        assert 512 - 32 < record["kept_tokens"] <= 512
    found = sum(c in o.outputs[0].text for c, o in zip(codes, outputs, strict=True))
    assert found >= 1
