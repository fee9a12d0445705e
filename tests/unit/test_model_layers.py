"""The layers that a config tells of, grouped by our arithmetic as vLLM groups them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import KVCacheLayout, SlidingWindowSpec, iter_layer_specs

from vllm_kvcompress import KVCompressConfigError
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import cdiv
from vllm_kvcompress.model_layers import FULL, WINDOWED, LayerKind, read_layers
from vllm_kvcompress.vllm_integration.scheduler.spec import KVCompressSpec

BLOCK = 16
SETTING = KVCompressConfig.from_dict({"method": "snapkv", "budget": 128})


def text_config(layer_types, heads, num_shared=0):
    """As of transformers; `heads` are KV heads and their size, by kind of layer."""
    per_layer = [
        SimpleNamespace(
            model_type="any",
            num_attention_heads=8,
            num_key_value_heads=heads[kind][0],
            head_dim=heads[kind][1],
        )
        for kind in layer_types
    ]
    return SimpleNamespace(
        num_hidden_layers=len(layer_types),
        layer_types=layer_types,
        sliding_window=128,
        is_heterogeneous=True,
        per_layer_config=per_layer,
        num_kv_shared_layers=num_shared,
    )


def groups_of_vllm(layer_types, heads):
    """By group, the bytes of its layers' pages, and whether they have full attention."""
    specs = {}
    for i, kind in enumerate(layer_types):
        num_kv_heads, head_size = heads[kind]
        common = {
            "block_size": BLOCK,
            "num_kv_heads": num_kv_heads,
            "head_size": head_size,
            "dtype": torch.float32,
        }
        if kind == FULL:
            specs[f"{kind}.{i}"] = KVCompressSpec(**common, kv_compress=SETTING)
        else:
            specs[f"{kind}.{i}"] = SlidingWindowSpec(**common, sliding_window=128)
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.BLHNC),
        attention_config=None,
        speculative_config=None,
    )
    groups = get_kv_cache_groups(vllm_config, specs)
    found = []
    for group in groups:
        first = next(iter(iter_layer_specs(group.kv_cache_spec)))
        num_bytes = len(group.layer_names) * first.page_size_bytes
        found.append((num_bytes, group.layer_names[0].startswith(FULL)))
    return found


@pytest.mark.parametrize(
    "heads",
    [
        {FULL: (2, 64), WINDOWED: (2, 64)},
        {FULL: (2, 128), WINDOWED: (2, 64)},
        {FULL: (1, 512), WINDOWED: (8, 64)},
        {FULL: (1, 64), WINDOWED: (2, 96)},
        {FULL: (1, 64), WINDOWED: (2, 128)},
    ],
    ids=str,
)
def test_groups_are_those_of_vllm(heads):
    outcomes = set()
    for num_full in range(1, 8):
        for num_windowed in range(1, 12):
            # As our workers list them.
            layer_types = [WINDOWED] * num_windowed + [FULL] * num_full
            groups = groups_of_vllm(layer_types, heads)
            block_bytes = max(num_bytes for num_bytes, _ in groups)
            ours = [num_bytes for num_bytes, is_full in groups if is_full]
            layers = read_layers(text_config(layer_types, heads))
            is_served = ours == [block_bytes]
            outcomes.add(is_served)
            if is_served:
                layers.check_groups()
                assert len(groups) - 1 == cdiv(num_windowed, layers.windowed_per_block)
                continue
            how = "several groups" if len(ours) > 1 else "a group that it pads"
            with pytest.raises(KVCompressConfigError, match=how):
                layers.check_groups()
    assert True in outcomes


def test_layers_that_share_a_cache_have_none_of_their_own():
    heads = {FULL: (2, 128), WINDOWED: (1, 64)}
    layers = read_layers(text_config([WINDOWED, WINDOWED, FULL] * 3, heads, num_shared=3))
    assert layers.full == LayerKind(2, 2, 128, 4)
    assert layers.windowed == LayerKind(4, 1, 64, 8)
    assert layers.num_sharing == 3
    split = read_layers(text_config([WINDOWED, FULL] * 2, heads), num_ranks=2)
    assert split.full == LayerKind(2, 1, 128, 4)
    assert split.windowed == LayerKind(2, 1, 64, 4)
