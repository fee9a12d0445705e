"""Which ops a CPU engine takes, and that compiled ones keep what torch would."""

from __future__ import annotations

import compaction_prompts
import pytest
import torch
from cache_shapes import cache_shape
from compaction_prompts import assert_scores_close, make_compactor, make_prompt, on_backend
from compiled_ops import need_compiled_ops
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from plain_selection import select

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.selection import Chooser
from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.memory import RequestGeometry
from vllm_kvcompress.ops.window.plan import MAX_POOL_KERNEL
from vllm_kvcompress.policies import RECIPES, make_scorer
from vllm_kvcompress.policies.base import LayerScores
from vllm_kvcompress.policies.entries import entry_scores

PLANNED = [
    {"method": "snapkv"},
    {"method": "snapkv", "pool_kind": "avg", "window_reduce": "max", "group_reduce": "sum"},
    {"method": "kvc"},
    {"method": "span"},
    {"method": "span", "value_norm": False, "near_tokens": 1},
    {"method": "defensivekv", "value_norm": False},
]
BUDGETS = {
    "uniform": {},
    "pyramid": {"beta": 5},
    "ada": {"alpha": 0.2},
    "ada-pyramid": {},
    "joint": {"floor": 0.1},
    "static": {"table": [1, 3, 2]},
}


def config_of(case):
    return KVCompressConfig.from_dict({"budget": 28, "window": compaction_prompts.WINDOW, **case})


@pytest.fixture(scope="module")
def compiled():
    need_compiled_ops()


@pytest.mark.parametrize("case", PLANNED, ids=str)
def test_pages_are_scored_without_the_scorer(compiled, case, monkeypatch):
    config = config_of(case)
    prompt = make_prompt(config, 73)
    expected = compaction_prompts.scores_of(config, prompt)
    # Whoever calls it now fails.
    monkeypatch.setattr(type(make_scorer(config)), "score", None)
    with on_backend("native"):
        assert_scores_close(compaction_prompts.scores_of(config, prompt), expected)


@pytest.mark.parametrize("method", RECIPES)
def test_the_name_says_what_is_left_to_torch(compiled, method):
    config = config_of({"method": method})
    compiled_name = f"native ({ops.instruction_set()})"
    has_plan = make_scorer(config).window_plan() is not None
    rest = "" if has_plan else f", scores of {method!r} by torch"
    prompt = make_prompt(config, 73)
    assert make_compactor(config, prompt).ops_name == "torch"
    with on_backend("native"):
        assert make_compactor(config, prompt).ops_name == compiled_name + rest


def test_pooling_wider_than_the_ops_know_is_left_to_torch(compiled):
    config = config_of({"method": "snapkv", "pool_kernel": MAX_POOL_KERNEL + 2})
    prompt = make_prompt(config, 73)
    expected = compaction_prompts.scores_of(config, prompt)
    with on_backend("native"):
        assert "by torch" in make_compactor(config, prompt).ops_name
        assert_scores_close(compaction_prompts.scores_of(config, prompt), expected)


@hypothesis_settings(max_examples=150)
@given(data=st.data())
def test_equal_scores_keep_the_same(compiled, data):
    granularity = data.draw(st.sampled_from(["page", "token"]))
    budgets = data.draw(st.sampled_from(list(BUDGETS)))
    case = {"budgets": budgets, "granularity": granularity, **BUDGETS[budgets]}
    has_second = data.draw(st.booleans())
    config = config_of({"method": "criticalkv" if has_second else "snapkv", **case})
    num_layers, num_heads, block_size = 3, data.draw(st.integers(1, 3)), 4
    num_pages = data.draw(st.integers(2, 6))
    mean_pages = data.draw(st.integers(1, num_pages - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    kinds = data.draw(st.sampled_from([1, 3, 10**6]))

    def draw():
        size = (num_heads, num_pages * block_size)
        scores = torch.randint(kinds, size, generator=generator).float()
        return torch.where(torch.rand(size, generator=generator) < 0.1, float("inf"), scores)

    scores = [LayerScores(draw(), draw() if has_second else None) for _ in range(num_layers)]
    expected = select(scores, config, mean_pages, block_size, 7)
    # As many tokens are kept beside the region.
    geometry = RequestGeometry(
        num_pages * block_size + 7, block_size, num_pages, mean_pages, num_pages * block_size + 7
    )
    shape = cache_shape(num_layers, num_heads, 1, 2, block_size)
    entries = [entry_scores(layer, config, block_size) for layer in scores]
    first = torch.cat([layer.first for layer in entries])[None]
    second = torch.cat([layer.second for layer in entries])[None] if has_second else None
    num_entries = torch.tensor([first.shape[2]], dtype=torch.int32)
    for backend in ("torch", "native"):
        chooser = Chooser(config, shape, first.device, backend)
        choice = chooser.choose([geometry], num_entries, first, second)
        page_offsets, indices = chooser.select(choice, num_entries)
        assert choice.num_pages[0].tolist() == expected.num_pages.flatten().tolist()
        assert page_offsets[0].tolist() == expected.page_offsets.tolist()
        assert indices[0].tolist() == expected.indices.tolist()


def test_an_engine_takes_what_is_there(monkeypatch):
    from vllm_kvcompress.vllm_integration.platforms.cpu.platform import choose_ops

    monkeypatch.delenv("VLLM_KVCOMPRESS_OPS", raising=False)
    monkeypatch.setattr(ops, "native_problem", lambda device_type: None)
    assert choose_ops() == ("native", None)
    monkeypatch.setattr(ops, "native_problem", lambda device_type: f"no {device_type} ops")
    assert choose_ops() == ("torch", "no cpu ops")
    monkeypatch.setenv("VLLM_KVCOMPRESS_OPS", "torch")
    assert choose_ops() == ("torch", None)
    monkeypatch.setenv("VLLM_KVCOMPRESS_OPS", "native")
    with pytest.raises(KVCompressConfigError, match="OPS is 'native', but no cpu ops"):
        choose_ops()
    monkeypatch.setenv("VLLM_KVCOMPRESS_OPS", "fast")
    with pytest.raises(KVCompressConfigError, match="must be 'torch' or 'native', got 'fast'"):
        choose_ops()
