"""One-shot prompts on the CUDA side, step by step: staged beside the pool, and what is kept.

`test_backends` has what all platforms do; the checks of every step are the same here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cache_shapes import cache_shape

pytest.importorskip("vllm")

from cuda_side import CUDASide
from engine_rig import Request, Rig
from paged_pool import DEVICE

from vllm_kvcompress import ops
from vllm_kvcompress.compaction.staging import Staging
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.memory import cdiv
from vllm_kvcompress.ops import PageOrder

pytestmark = pytest.mark.usefixtures("labels")
WINDOW = 8
DEEP = cache_shape(6, 2, 2, 64, 16)
FLAT = cache_shape(2, 2, 3, 64, 16)
# Per layer by numbers alone, per layer by scores, over all layers, and these in two stages.
METHODS = [
    ("pyramidkv", {}),
    ("ada-snapkv", {}),
    ("ada-snapkv", {"published": True}),
    ("span", {}),
    ("kvc", {"floor": 0.5}),
    ("ada-criticalkv", {}),
    ("span-keydiff", {}),
    ("h2o", {}),
    ("layer-defensivekv", {"floor": 0.0}),
]


@pytest.fixture(params=["page", "token"])
def granularity(request):
    return request.param


def config_of(method, granularity, **options):
    pairs = (("granularity", granularity), *options.items())
    return KVCompressConfig(method, ratio=0.85, window=WINDOW, options=pairs)


def shrink_buffer(rig: Rig, *requests: Request) -> None:
    """Give the engine the least buffer in which these prompts can be staged."""
    shape, slack, num_lists = rig.shape, 0, 1
    if rig.config.granularity == "token":
        slack = shape.pages_per_block
    if rig.config.method in ("ada-criticalkv", "span-keydiff"):
        num_lists = 2
    geometries = [rig.geometry(request) for request in requests]
    area = sum(cdiv(g.compact_len, g.block_size) for g in geometries) * shape.num_kv_heads
    held = sum(g.num_region_blocks * shape.pages_per_block + slack for g in geometries)
    if rig.config.option("budgets") != "joint":
        held = 0
    num_pages = area + 2 * num_lists * held
    assert num_pages <= len(rig.engine.compactor.buffer)
    rig.engine.compactor.use_buffer(rig.engine.compactor.buffer[:num_pages].fill_(torch.nan))


@pytest.fixture(autouse=True)
def moves_in_any_order(monkeypatch):
    """A GPU moves entries in any order: none may be both read and written, or written twice.

    Gives the op as it is without this check.
    """
    move = ops.move_entries

    def check_and_move(source, source_index, target, target_index, backend):
        is_moved = (source_index >= 0) & (target_index >= 0)
        read, written = source_index[is_moved], target_index[is_moved]
        assert len(written.unique()) == len(written)
        if source.data_ptr() == target.data_ptr():
            assert not torch.isin(read, written).any()
        move(source, source_index, target, target_index, backend=backend)

    monkeypatch.setattr(ops, "move_entries", check_and_move)
    return move


@pytest.fixture
def narrowings(monkeypatch):
    """Numbers of layers that were known when something was dropped."""
    known, narrow = [], Staging._narrow

    def count(self, num_known, *args):
        known.append(num_known)
        narrow(self, num_known, *args)

    monkeypatch.setattr(Staging, "_narrow", count)
    return known


@pytest.mark.parametrize(
    ("method", "options"), METHODS, ids=["-".join([m, *options]) for m, options in METHODS]
)
def test_staged_prompts_keep_what_the_policy_chooses(
    monkeypatch, method, options, granularity, narrowings
):
    rig = Rig(monkeypatch, CUDASide("reference"), DEEP, config_of(method, granularity, **options))
    first = Request("first", 13 * 16 + 9, is_one_shot=True)
    second = Request("second", 19 * 16, is_one_shot=True)
    shrink_buffer(rig, first, second)
    rig.step([(second, second.prompt_len), (first, first.prompt_len)])
    assert first.selection is not None and second.selection is not None
    for _ in range(18):
        rig.step([(first, 1), (second, 1)])
    records = rig.stats.snapshot()["requests"]
    assert all(record["one_shot"] for record in records)
    is_joint = rig.config.option("budgets") == "joint"
    assert bool(narrowings) == is_joint
    # Both places of what is held have been used.
    assert not is_joint or len(narrowings) > 1


@pytest.mark.parametrize("method", ["span", "ada-pyramidkv"])
def test_triton_kernels_stage_as_the_references(monkeypatch, method, granularity, narrowings):
    shape = cache_shape(4, 1, 2, 64, 16)
    rig = Rig(monkeypatch, CUDASide("triton"), shape, config_of(method, granularity))
    request = Request("a", 11 * 16 + 5, is_one_shot=True)
    shrink_buffer(rig, request)
    rig.step([(request, request.prompt_len)])
    rig.step([(request, 1)])
    assert bool(narrowings) == (method == "span")


def test_more_than_the_buffer_holds_is_refused(monkeypatch):
    rig = Rig(monkeypatch, CUDASide("reference"), FLAT, config_of("span", "page"))
    rig.engine.compactor.use_buffer(rig.engine.compactor.buffer[:30])
    request = Request("a", 200, is_one_shot=True)
    with pytest.raises(RuntimeError, match="do not fit a buffer of 30 pages"):
        rig.metadata([(request, 200)])


def test_warm_up_stages_too(monkeypatch, narrowings, moves_in_any_order):
    # All of its region is the null block, where contents mean nothing.
    monkeypatch.setattr(ops, "move_entries", moves_in_any_order)
    rig = Rig(monkeypatch, CUDASide("reference"), DEEP, config_of("span", "page"))
    shrink_buffer(rig, Request("made up", 300))
    rig.buffer[0] = 0
    rig.engine.warm_up(300)
    assert narrowings
    assert rig.buffer[1:].isnan().all()


@pytest.mark.parametrize("options", [{"one_shot": "never"}, {"ratio": 0.4}])
def test_warm_up_stages_what_may_be_staged_only(monkeypatch, narrowings, options):
    ratio = options.get("ratio", 0.85)
    pairs = tuple((k, v) for k, v in options.items() if k != "ratio")
    config = KVCompressConfig("span", ratio=ratio, window=WINDOW, options=pairs)
    rig = Rig(monkeypatch, CUDASide("reference"), DEEP, config)
    rig.buffer[0] = 0
    rig.engine.warm_up(300)
    assert not narrowings


@pytest.mark.parametrize("method", ["span", "span-keydiff", "ada-snapkv", "pyramidkv"])
@pytest.mark.parametrize("setting", ["most", {"ratio": 0.99}, {"budget": 64}])
def test_any_prompts_of_a_step_fit_the_buffer(monkeypatch, method, granularity, setting):
    pairs = (("granularity", granularity),)
    if setting == "most":
        # As large a region as may be.
        share = KVCompressConfig(method, ratio=0.5, options=pairs).one_shot.most_share
        setting = {"ratio": 1 - min(share, 0.9)}
    config = KVCompressConfig(method, window=WINDOW, options=pairs, **setting)
    rig = Rig(monkeypatch, CUDASide("reference"), FLAT, config)
    geometry = rig.engine.requests.geometry
    draw = np.random.default_rng(0)
    max_tokens, max_prompts = 700, 8
    num_pages = config.one_shot.counted_buffer_pages(FLAT, max_tokens, max_prompts)
    buffer = rig.engine.compactor.buffer.new_empty(
        num_pages, *rig.engine.compactor.buffer.shape[1:]
    )
    table = torch.zeros(max_prompts, 80, dtype=torch.int32, device=DEVICE)
    num_full = 0
    for mean in np.repeat([20, 40, 80, 160, 320, 650], 50):
        lens, left = [], max_tokens
        while left and len(lens) < max_prompts:
            lens.append(min(left, 1 + int(draw.exponential(mean))))
            left -= lens[-1]
        geometries = [
            g
            for g in map(geometry.of, lens)
            if g.is_compressed and config.one_shot.fits_counted_buffer(g)
        ]
        if not geometries:
            continue
        num_full += sum(g.prompt_len for g in geometries) > 0.9 * max_tokens
        sure = [0] * len(geometries)
        rows = table[: len(geometries)]
        Staging(
            config,
            FLAT,
            buffer,
            rig.engine.pool,
            PageOrder.plain(FLAT.block_size, FLAT.head_size),
            geometries,
            rows,
            sure,
            "reference",
            "reference",
        )
    assert num_full > 10
