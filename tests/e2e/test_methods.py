"""Every method and both granularities in one real engine, prompts computed in one shot."""

from __future__ import annotations

import pytest

BUDGET = 448


@pytest.fixture(scope="module")
def engine(start_engine):
    with pytest.MonkeyPatch.context() as patch:
        # Lets a test send a function to the worker.
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        yield start_engine(
            kv_compress="snapkv",
            kv_compress_budget=BUDGET,
            max_num_batched_tokens=2560,
            enable_prefix_caching=False,
        )


def _use_method(engine, raw: dict) -> None:
    """Swap the method of a running engine: same budget, so the scheduler sees no difference."""

    def swap(worker):
        from vllm_kvcompress import KVCompressConfig
        from vllm_kvcompress.compaction import Compactor

        state = worker._engine
        config = KVCompressConfig.from_dict(raw)
        state.compactor = Compactor(config, state.shape, state.compactor.order)

    engine.collective_rpc(swap)


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize(
    "method",
    ["snapkv", "pyramidkv", "ada-snapkv", "ada-pyramidkv", "streamingllm", "knorm", "random"],
)
def test_method_keeps_its_budget_and_generates(engine, needle, method, granularity) -> None:
    from vllm import SamplingParams

    _use_method(engine, {"method": method, "budget": BUDGET, "granularity": granularity})
    before = len(engine.kv_compress_stats()["requests"])
    chats = [needle(seed)[0] for seed in (1, 2)]
    outputs = engine.chat(chats, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)
    records = engine.kv_compress_stats()["requests"][before:]
    assert len(records) == 2
    for output, record in zip(outputs, records, strict=True):
        prompt_len = record["prompt_len"]
        assert prompt_len == len(output.prompt_token_ids)
        kept = record["kept_per_head"]
        tail = prompt_len - (prompt_len - 32) // 32 * 32
        pages = [[(tokens - tail) // 32 for tokens in layer] for layer in kept]
        assert all(page >= 1 for layer in pages for page in layer)
        assert sum(map(sum, pages)) == record["region_blocks"] * 30 * 3
        assert BUDGET - 32 < record["kept_tokens"] <= BUDGET
        by_layer = [sum(layer) for layer in pages]
        if "pyramid" in method:
            assert by_layer == sorted(by_layer, reverse=True)
            assert by_layer[0] > by_layer[-1]
        else:
            assert len(set(by_layer)) == 1
        uneven = any(len(set(layer)) > 1 for layer in pages)
        assert uneven == method.startswith("ada")


def test_attention_scores_find_what_a_control_loses(engine, needle) -> None:
    from vllm import SamplingParams

    chats, codes = zip(*(needle(seed) for seed in range(20, 26)), strict=True)
    found = {}
    for method in ("ada-snapkv", "random"):
        _use_method(engine, {"method": method, "budget": BUDGET})
        outputs = engine.chat(
            list(chats), SamplingParams(temperature=0, max_tokens=12), use_tqdm=False
        )
        found[method] = sum(c in o.outputs[0].text for c, o in zip(codes, outputs, strict=True))
    assert found["ada-snapkv"] > found["random"]
