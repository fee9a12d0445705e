"""What of the backends is CUDA's alone, step by step, on a GPU or without one.

`test_backends` has what all platforms do; the checks of every step are the same here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cache_shapes import cache_shape

pytest.importorskip("vllm")

from cuda_side import CapturedStep, CUDASide
from engine_rig import Request, Rig
from gpu.recording import record
from paged_pool import DTYPE
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from vllm_kvcompress import ops
from vllm_kvcompress.compaction import score_memory
from vllm_kvcompress.compaction.staging import Staging
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.vllm_integration.platforms.cuda import attention as backend_cuda
from vllm_kvcompress.vllm_integration.platforms.cuda import engine as engine_cuda
from vllm_kvcompress.vllm_integration.platforms.cuda.platform import CUDA

pytestmark = pytest.mark.usefixtures("labels")
WINDOW = 8
SHAPES = {
    "gqa_3_to_1": cache_shape(2, 2, 3, 64, 16),
    "gqa_8_to_1": cache_shape(1, 1, 8, 128, 16),
}


def config_of(method, block, granularity="page", **options):
    options = (("granularity", granularity), *options.items())
    return KVCompressConfig(method, budget=4 * block, window=WINDOW, options=options)


@pytest.mark.parametrize(("method", "flash_attn_version"), [("span", 3), ("snapkv", 4)])
def test_layers_are_scored_in_groups_that_fit_memory(monkeypatch, method, flash_attn_version):
    shape = cache_shape(5, 1, 2, 64, 16)
    config = config_of(method, 16)
    rig = Rig(monkeypatch, CUDASide("reference", flash_attn_version), shape, config)
    # Two layers of two prompts: groups of two, two and one.
    layer_bytes = 2 * WINDOW * 2 * (64 * DTYPE.itemsize + 4)
    monkeypatch.setattr(score_memory, "MOST_WINDOW_BYTES", 2 * layer_bytes)
    groups, planned = [], ops.planned_scores

    def count(plan, query, pool, prompts, layer, *args, **kwargs):
        groups.append((layer, query.shape[1]))
        return planned(plan, query, pool, prompts, layer, *args, **kwargs)

    monkeypatch.setattr(ops, "planned_scores", count)
    # One's window is cut by a step's end, the other's is not.
    parts, whole = Request("parts", 150), Request("whole", 170)
    rig.step([(parts, 147)])
    rig.step([(parts, 3), (whole, 170)])
    assert groups == [(0, 2), (2, 2), (4, 1)]
    assert parts.selection is not None and whole.selection is not None


@pytest.mark.parametrize("reduce", ["mean", "defensive"])
@pytest.mark.parametrize(("version", "tells"), [(2, True), (3, True), (4, False)])
def test_scores_use_what_attention_tells_of_sums(monkeypatch, version, tells, reduce):
    given, window_scores = [], ops.window_scores

    def watch(query, *args, lse=None, **kwargs):
        given.append(lse)
        if lse is not None:
            # Else it is made of the same queries and keys.
            own = window_scores(query, *args, **kwargs)
            theirs = window_scores(query, *args, lse=lse, **kwargs)
            for scores, other, n in zip(own, theirs, args[1].num_rated.tolist(), strict=True):
                torch.testing.assert_close(scores[..., :n], other[..., :n])
        return window_scores(query, *args, lse=lse, **kwargs)

    monkeypatch.setattr("vllm_kvcompress.ops.window.planned.window_scores", watch)
    shape = SHAPES["gqa_3_to_1"]
    config = config_of({"mean": "snapkv", "defensive": "span"}[reduce], 16)
    rig = Rig(monkeypatch, CUDASide("reference", version), shape, config)
    # Windows of one chunk, of three, and of one that starts with the prompt's beginning.
    whole, parts = Request("whole", 150), Request("parts", 170)
    staged = Request("staged", 140, is_one_shot=True)
    rig.step([(parts, 164)])
    rig.step([(parts, 2)])
    rig.step([(parts, 4), (whole, 150), (staged, 140)])
    rig.step([(parts, 1), (whole, 1), (staged, 1)])
    # All layers of those in the pool, and each of the staged one.
    assert len(given) == 1 + shape.num_layers
    assert all((lse is not None) == tells for lse in given)


def stock_runs(monkeypatch) -> list[list[int]]:
    """Filled with the lengths of the rows of every call of stock attention from now on."""
    runs: list[list[int]] = []

    def watch(attend, metadata_at):
        def attend_watched(impl, *args):
            runs.append(args[metadata_at].query_start_loc.diff().tolist())
            return attend(impl, *args)

        return attend_watched

    stock, with_lse = FlashAttentionImpl.forward, backend_cuda.attend_with_lse
    monkeypatch.setattr(FlashAttentionImpl, "forward", watch(stock, 5))
    monkeypatch.setattr(backend_cuda, "attend_with_lse", watch(with_lse, 4))
    return runs


def test_compressed_rows_of_several_tokens_are_not_the_stock_backends(monkeypatch):
    shape = SHAPES["gqa_8_to_1"]
    rig = Rig(monkeypatch, CUDASide("reference"), shape, config_of("snapkv", 16))
    first, second, dense = Request("first", 120), Request("second", 100), Request("dense", 20)
    rig.step([(first, 120), (second, 100), (dense, 20)])
    runs = stock_runs(monkeypatch)
    new, last = Request("new", 150), Request("last", 130)
    staged = [Request("s0", 90, is_one_shot=True), Request("s1", 85, is_one_shot=True)]
    # Between rows of the stock backend, whose outputs and scores are checked too.
    rig.step([(dense, 1), (new, 40), (first, 3), (last, 100)])
    assert runs == [[40], [100]] * shape.num_layers
    runs.clear()
    rig.step([(staged[0], 90), (second, 9), (staged[1], 85), (new, 110), (first, 2), (last, 30)])
    assert runs == [[90], [85], [110], [30]] * shape.num_layers
    runs.clear()
    # Alone, and before padding.
    assert rig.metadata([(first, 2), (second, 4)], num_padded_rows=2).runs == []
    rig.step([(dense, 1), (first, 2), (second, 4)])
    assert runs == []
    # What they have stored is read.
    rig.step([(first, 1), (second, 1), (dense, 1), (new, 1), (last, 1), (staged[1], 1)])


@pytest.mark.parametrize(("backend", "num_steps"), [("triton", 2), ("reference", 18)])
def test_a_captured_decode_step_serves_later_rows(monkeypatch, backend, num_steps):
    """On a GPU a CUDA graph is; later steps only change what it points at."""
    shape = SHAPES["gqa_8_to_1"]
    rig = Rig(monkeypatch, CUDASide(backend), shape, config_of("snapkv", 16))
    captured = CapturedStep(rig, num_rows=4)
    long, short = Request("long", 180), Request("short", 20)
    rig.step([(short, 20), (long, 180)])
    rig.step([(short, 1), (long, 1)], captured=captured)
    late = Request("late", 150)
    rig.step([(short, 1), (long, 1), (late, 150)])
    for _ in range(num_steps):
        rig.step([(late, 1), (short, 1), (long, 1)], captured=captured)
    # Rows change places and one leaves; the padding must not keep it.
    rig.engine.forget(["late"])
    for _ in range(2):
        rig.step([(long, 1), (short, 1)], captured=captured)
    # Every step was compared with float64; these had regions.
    assert long.selection is not None and late.selection is not None


def test_a_lone_token_of_a_window_is_refused(monkeypatch):
    rig = Rig(monkeypatch, CUDASide("reference"), SHAPES["gqa_8_to_1"], config_of("snapkv", 16))
    request = Request("a", 100)
    rig.step([(request, 97)])
    with pytest.raises(RuntimeError, match="a single token of its scoring window"):
        rig.step([(request, 1)])


def test_warm_up_touches_the_null_block_only(monkeypatch):
    rig = Rig(monkeypatch, CUDASide("triton"), SHAPES["gqa_3_to_1"], config_of("span", 16))
    rig.buffer[0] = 0
    before = rig.buffer[1:].isnan().sum()
    rig.engine.warm_up(300)
    assert rig.buffer[1:].isnan().sum() == before
    assert not rig.buffer[0].isnan().any()
    assert rig.stats.snapshot()["totals"]["prompts"] == 0


@pytest.mark.parametrize(
    ("method", "granularity", "flash_attn_version"),
    [("span", "page", 3), ("ada-snapkv", "token", 4), ("ada-criticalkv", "page", 2)],
)
def test_a_warm_worker_compiles_nothing(monkeypatch, method, granularity, flash_attn_version):
    # A kernel that is compiled while requests wait takes a second of their time.
    shape = cache_shape(2, 2, 1, 64, 16)
    config = config_of(method, 16, granularity, suffix_tokens=3)
    rig = Rig(monkeypatch, CUDASide("triton", flash_attn_version), shape, config)
    rig.buffer[0] = 0

    def warm_up():
        CUDA().warm_up(rig.engine, rig.impl, 300)

    def serve():
        staged = [Request(f"s{n}", n, is_one_shot=True) for n in (83, 99)]
        rig.step([(r, r.prompt_len - 3) for r in staged])
        rig.step([(r, 3) for r in staged])
        first, second, third = (Request(f"a{n}", n) for n in (120, 97, 130))
        rig.step([(staged[0], 1), (first, 100)])
        rig.step([(staged[1], 1), (first, 17), (second, 94), (third, 127)])
        rig.step([(first, 3), (second, 3), (third, 3)])
        # As many tokens as a request that was preempted had generated.
        rig.step([(staged[0], 1), (staged[1], 1), (first, 20)])
        for batch in ([second], [first, second, third], [*staged, first, second, third]):
            rig.step([(request, 1) for request in batch])

    assert len(compiled_by(serve, warm_up)) > 6


def compiled_by(serve: Callable[[], None], warm_up: Callable[[], None]) -> set:
    """Variants of kernels that are met while serving, all of which the warm-up must have met."""
    known = {launch.variant for launch in record(warm_up, is_run=True)}
    met = {launch.variant for launch in record(serve, is_run=True)}
    assert met <= known, sorted({v[0] for v in met - known})
    return met


@pytest.mark.parametrize("granularity", ["page", "token"])
def test_as_many_layers_as_happen_to_be_known_compile_nothing(monkeypatch, granularity):
    # The first prompt that is long enough to be compressed is too short to be staged.
    monkeypatch.setattr(engine_cuda, "_WARM_UP_TOKENS", 128)
    shape = cache_shape(8, 1, 1, 64, 16)
    options = (("granularity", granularity),)
    config = KVCompressConfig("span", budget=64, window=8, options=options)
    rig = Rig(monkeypatch, CUDASide("triton"), shape, config)
    rig.buffer[0] = 0
    # In which six layers of 700 tokens fit, and four of 900.
    rig.engine.compactor.use_buffer(rig.engine.compactor.buffer[:300])
    known_layers, narrow = [], Staging._narrow
    monkeypatch.setattr(
        Staging,
        "_narrow",
        lambda self, num_known, *args: (
            known_layers.append(num_known),
            narrow(self, num_known, *args),
        ),
    )

    def serve():
        known_layers.clear()
        for length in (230, 700, 900):
            request = Request(f"s{length}", length, is_one_shot=True)
            rig.step([(request, length)])
            rig.step([(request, 1)])

    compiled_by(serve, lambda: CUDA().warm_up(rig.engine, rig.impl, 1000))
    assert len(set(known_layers)) > 1


@pytest.mark.parametrize(
    ("method", "flash_attn_version"), [("snapkv", 3), ("snapkv", 4), ("span", 3), ("span", 4)]
)
def test_layers_that_are_scored_in_groups_compile_nothing(monkeypatch, method, flash_attn_version):
    # What is known of the layers begins in the middle for all groups but the first.
    shape = cache_shape(5, 1, 1, 64, 16)
    rig = Rig(monkeypatch, CUDASide("triton", flash_attn_version), shape, config_of(method, 16))
    rig.buffer[0] = 0

    def warm_up():
        CUDA().warm_up(rig.engine, rig.impl, 300)

    def serve():
        monkeypatch.setattr(score_memory, "MOST_WINDOW_BYTES", 2 * 8 * (64 * DTYPE.itemsize + 4))
        request = Request("a", 150)
        rig.step([(request, 150)])
        assert request.selection is not None

    met = compiled_by(serve, warm_up)
    assert "join_scores_kernel" in {variant[0] for variant in met}
