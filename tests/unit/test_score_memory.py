"""What is counted for scores is what scoring takes, and limits keep it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_shapes import cache_shape
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_kvcompress.compaction import score_memory
from vllm_kvcompress.compaction.compactor import Compactor
from vllm_kvcompress.compaction.parameters import LayerParameters
from vllm_kvcompress.compaction.prompts import PromptCompaction
from vllm_kvcompress.compaction.score_memory import ScoreMemory, score_memory_of
from vllm_kvcompress.compaction.scoring import Backends
from vllm_kvcompress.compaction.windows import Window
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.ops import PageOrder

META = torch.device("meta")
LONG = 5000
METHODS = [("span", 16), ("defensivekv", 32), ("snapkv", 32), ("kvc", 8)]


class Allocated(TorchDispatchMode):
    """Bytes of float tensors that are allocated for launches."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            func.name().startswith(("aten::empty", "aten::new_empty"))
            and result.is_floating_point()
        ):
            self.sizes.append(result.numel() * result.element_size())
        return result


def config_of(method, window, **changes):
    options = (("value_norm", False),) if method == "defensivekv" else ()
    return KVCompressConfig(method, ratio=0.875, window=window, options=options, **changes)


def compactor_of(config, shape):
    root = torch.empty(shape.num_kv_heads, shape.head_size, shape.head_size, device=META)
    weight = torch.empty(
        shape.num_kv_heads, shape.num_queries_per_kv, shape.head_size, 8, device=META
    )
    pool = torch.empty(
        shape.pages_per_block, shape.block_size, 2 * shape.head_size, device=META
    ).bfloat16()
    layers = [LayerParameters(0.1, output_weight=weight, output_root=root)] * shape.num_layers
    order = PageOrder.plain(shape.block_size, shape.head_size)
    return Compactor(config, shape, pool, order, layers, Backends.all("triton"))


def end(compactor, lengths, tells_lse):
    """All layers of prompts that end together; gives the batch and what its scores allocate."""
    from gpu.recording import record

    shape, config = compactor.shape, compactor.config
    geometry = config.geometry(shape.block_size)
    prompts = [PromptCompaction(geometry.of(n), shape.num_layers) for n in lengths]
    table = torch.zeros(len(lengths), 2, dtype=torch.int32, device=META)
    num_heads = shape.num_kv_heads * shape.num_queries_per_kv
    query = torch.empty(
        config.window, num_heads, shape.head_size, dtype=torch.bfloat16, device=META
    )
    lse = torch.empty(config.window, num_heads, device=META) if tells_lse else None
    batch = compactor.batch(prompts, table)
    allocated = Allocated()

    def layers():
        with allocated:
            for layer in range(shape.num_layers):
                compactor.score_layer(batch, layer, [Window(query, lse)] * len(lengths), [])

    record(layers)
    return batch, allocated.sizes


@pytest.mark.parametrize("tells_lse", [False, True])
@pytest.mark.parametrize(("method", "window"), METHODS)
@pytest.mark.parametrize("group", [1, 3, 4, 12])
def test_what_is_counted_is_what_scores_take(method, window, group, tells_lse):
    shape, config = cache_shape(3, 2, group, 64, 16, "bfloat16"), config_of(method, window)
    compactor = compactor_of(config, shape)
    batch, sizes = end(compactor, (LONG, 2000), tells_lse)
    assert batch.layers_at_once == 3
    memory, geometry = compactor.memory, batch.geometries[0]
    assert batch.first.numel() * 4 == 2 * memory.entry_bytes(geometry)
    kept = 2 * 3 * window * 2 * group * (64 * 2 + 4 * tells_lse)
    scores = sum(sizes) - kept
    counted = 2 * 3 * memory.token_bytes(geometry)
    # With a given lse sums have two pieces, or are not needed. Rows fill powers of two.
    assert scores <= counted <= scores * (5 if tells_lse else 1.4)


@pytest.mark.parametrize("max_len", [300, 4096, 131072])
@pytest.mark.parametrize("max_prompts", [1, 8, 256])
@pytest.mark.parametrize(("method", "window"), METHODS)
def test_batches_keep_within_what_is_counted(method, window, max_prompts, max_len):
    """The batches that the engine makes of a step's prompts, at the 8B shape."""
    shape, config = cache_shape(32, 8, 4, 128, 16, "bfloat16"), config_of(method, window)
    plan = score_memory.make_scorer(config).window_plan()
    memory, geometry = ScoreMemory(config, shape, plan), config.geometry(16)
    most = score_memory_of(config, shape).most_bytes(max_len, max_prompts)
    window_bytes = window * 32 * (128 * 2 + 4)
    for length in (max_len, max_len // 2, 200):
        longest = geometry.of(length)
        each = memory.prompt_bytes(longest)
        num_prompts = min(max_prompts, max(1, score_memory.MOST_SCORE_BYTES // each))
        at_once = memory.layers_at_once(longest, num_prompts, max_prompts)
        taken = num_prompts * memory.entry_bytes(longest)
        taken += at_once * num_prompts * memory.token_bytes(longest)
        taken += max_prompts * at_once * window_bytes
        assert taken <= most
        # As many layers as fit are taken together.
        if at_once < 32 and -(-32 // at_once) == -(-32 // (at_once + 1)) + 1:
            more = at_once + 1
            is_full = num_prompts * more * memory.token_bytes(longest) > 256 * 2**20
            assert is_full or max_prompts * more * window_bytes > 64 * 2**20


def test_what_a_small_server_needs_is_less_than_the_limits():
    shape = cache_shape(32, 8, 4, 128, 16, "bfloat16")
    small = score_memory_of(config_of("span", 16), shape).most_bytes(4096, 4)
    large = score_memory_of(config_of("span", 16), shape).most_bytes(131072, 256)
    assert small < large < 2 * 256 * 2**20 + 64 * 2**20 + 8 * 2**20
    # Four prompts of 4,096 tokens: 12 MiB of scores of the layers at hand each, 4 MiB of all
    # layers' scores of what is chosen from, single tokens, and 4 MiB of windows.
    assert 4 * 18 * 2**20 < small < 4 * 28 * 2**20
    # A budget that every prompt fits.
    whole = KVCompressConfig("span", budget=4096)
    assert score_memory_of(whole, shape).most_bytes(4096, 4) == 0
    # Torch's own memory is not counted.
    assert 0 < score_memory_of(config_of("tova", 16), shape).most_bytes(4096, 4) < small


def test_roots_are_held_once():
    """One stack in the pool's type, of which every layer has a part."""
    shape = cache_shape(3, 2, 3, 64, 16, "bfloat16")
    compactor = compactor_of(config_of("span", 16), shape)
    stacked = compactor.scoring._stacked.output_root
    assert stacked.shape == (3, 2, 64, 64) and stacked.dtype == torch.bfloat16
    for layer in compactor.scoring.layers:
        assert layer.output_root._base is stacked


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("method", ["snapkv", "span", "ada-criticalkv"])
def test_scores_of_all_prompts_of_a_step_fit_what_their_blocks_leave(method, granularity):
    # All of them are there until the step's last layer, however many batches they are cut into.
    shape = cache_shape(32, 8, 4, 128, 16, "bfloat16")
    options = (("granularity", granularity),)
    config = KVCompressConfig(method, budget=1024, window=16, options=options)
    memory, geometry = score_memory_of(config, shape), config.geometry(16)
    block_bytes = 32 * 8 * 2 * 16 * 128 * 2
    for lengths in ([32768] * 64, [2048] * 3, [131072, 4096]):
        longest = [geometry.of(n) for n in lengths]
        taken = sum(memory.entry_bytes(g) for g in longest)
        blocks = sum(g.first_kept_block for g in longest)
        # Scores, and what is chosen; rows are rounded up to 16 entries.
        kinds = 5 if method == "ada-criticalkv" else 2
        assert taken <= blocks * block_bytes * memory.entry_share() / kinds + len(lengths) * 16384
