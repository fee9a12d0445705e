"""The prefix cache of models that mix windowed with compressed layers, on vLLM's KVCacheManager."""

import pytest
import torch
from block_manager_setup import Setup, prompt_of
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request

from vllm_kvcompress.vllm_integration.scheduler.manager import cache_only_before_compaction

BLOCK, PROMPT_LEN, NUM_OUTPUT = 16, 208, 96


def cached_blocks(setup: Setup, is_capped: bool) -> list[set[int]]:
    """By group, which blocks of a request's tokens the prefix cache was ever offered.

    The prompt is computed up to its compaction point, then to its end, then token by token.
    """
    init_none_hash(sha256)
    spec = setup.spec()
    windowed = SlidingWindowSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=64
    )
    kv = KVCacheManager(
        KVCacheConfig(
            num_blocks=128,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["full"], spec), KVCacheGroupSpec(["w"], windowed)],
            prefix_cache_retention_interval=setup.retention,
        ),
        max_model_len=512,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=True,
    )
    if is_capped:
        cache_only_before_compaction(kv.coordinator)
    params = SamplingParams(max_tokens=NUM_OUTPUT, ignore_eos=True)
    hasher = get_request_block_hasher(BLOCK, sha256)
    request = Request("r", prompt_of(0, PROMPT_LEN), params, None, block_hasher=hasher)
    geometry = spec.geometry.of(PROMPT_LEN)
    assert geometry.is_compressed
    chunks = [geometry.compact_len, PROMPT_LEN - geometry.compact_len] + [1] * NUM_OUTPUT
    found: list[set[int]] = [set(), set()]
    for i, num_new in enumerate(chunk for chunk in chunks if chunk):
        assert kv.allocate_slots(request, num_new) is not None
        request.num_computed_tokens += num_new
        if request.num_computed_tokens >= PROMPT_LEN:
            request.append_output_token_ids(1_000 + i)
        for group, row in enumerate(kv.get_blocks("r").blocks):
            first = geometry.boundary_block if group == 0 else len(row)
            region = [-1] * geometry.num_region_blocks
            places = [*range(first), *region, *range(first, 99)]
            found[group] |= {
                place
                for place, block in zip(places, row, strict=False)
                if block.block_hash is not None
            }
    return found


@pytest.mark.parametrize("retention", [0, None, 32])
@pytest.mark.parametrize("suffix", [0, 48])
def test_nothing_computed_after_a_compaction_is_cached(retention, suffix) -> None:
    setup = Setup(budget=64, suffix=suffix, retention=retention, max_model_len=512)
    num_exact = (PROMPT_LEN - suffix) // BLOCK
    full, windowed = cached_blocks(setup, is_capped=True)
    assert full == set(range(num_exact))
    assert windowed <= set(range(num_exact))
    if suffix or retention != 0:
        # What vLLM would offer by itself.
        _, windowed = cached_blocks(setup, is_capped=False)
        assert max(windowed) >= num_exact


def test_windowed_layers_cache_what_vllm_would_before_that() -> None:
    setup = Setup(budget=64, retention=None, max_model_len=512)
    num_exact = PROMPT_LEN // BLOCK
    capped, stock = (cached_blocks(setup, is_capped)[1] for is_capped in (True, False))
    assert capped == {block for block in stock if block < num_exact} != set()
