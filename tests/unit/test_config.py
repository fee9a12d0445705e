"""Parsing and refusing settings: messages of one line, with the values in them."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest

from vllm_kvcompress import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.config import (
    DEFAULT_BUDGET,
    DEFAULT_METHOD,
    as_settings,
    join_settings,
    merge_settings,
    parse_options_json,
)
from vllm_kvcompress.policies.method_options import option_specs
from vllm_kvcompress.policies.recipes import RECIPES


def refusal(call, *args, **kwargs):
    """The message of the KVCompressConfigError that `call` raises; one line."""
    with pytest.raises(KVCompressConfigError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def test_defaults():
    config = KVCompressConfig("snapkv")
    assert (config.budget, config.ratio, config.window) == (DEFAULT_BUDGET, None, 16)
    assert config.granularity == config.option("granularity") == "token"
    assert config.option("pool_kernel") == 11
    assert config.recipe is RECIPES["snapkv"]
    with pytest.raises(KeyError):
        config.option("alpha")


def test_ratio_leaves_the_budget_unset():
    config = KVCompressConfig("snapkv", ratio=0)
    assert config.budget is None
    assert config.ratio == 0.0
    assert isinstance(config.ratio, float)


def test_errors_are_value_errors():
    assert issubclass(KVCompressConfigError, ValueError)


@pytest.mark.parametrize(
    "make",
    [KVCompressConfig, lambda method: KVCompressConfig.from_dict({"method": method})],
    ids=["constructor", "from_dict"],
)
def test_unknown_method_lists_the_known(make):
    message = refusal(make, "snapkw")
    assert "'snapkw'" in message
    for name in RECIPES:
        assert name in message


def test_budget_and_ratio_contradict():
    message = refusal(KVCompressConfig, "snapkv", budget=1024, ratio=0.25)
    assert "1024" in message
    assert "0.25" in message


@pytest.mark.parametrize("value", [0, -5, 1.5, 100.0, "128", True])
def test_bad_budget(value):
    message = refusal(KVCompressConfig, "snapkv", budget=value)
    assert message == f"KV-compression budget must be a whole number >= 1, got {value!r}"


@pytest.mark.parametrize("value", [0, -5, 1.5, "8", False])
def test_bad_window(value):
    message = refusal(KVCompressConfig, "snapkv", window=value)
    assert message == f"KV-compression window must be a whole number >= 1, got {value!r}"


@pytest.mark.parametrize(
    "value", [1, 1.0, -0.1, 75, "0.5", False, float("nan"), float("inf"), -float("inf")]
)
def test_bad_ratio(value):
    message = refusal(KVCompressConfig, "snapkv", ratio=value)
    assert message == f"KV-compression ratio must be in [0, 1) (fraction removed), got {value!r}"


@pytest.mark.parametrize(
    ("budget", "window", "block_size", "fits"),
    [(47, 32, 16, False), (48, 32, 16, True), (159, 32, 128, False), (160, 32, 128, True)],
)
def test_budget_must_hold_the_window_and_a_page(budget, window, block_size, fits):
    config = KVCompressConfig("snapkv", budget=budget, window=window)
    if fits:
        config.check_block_size(block_size)
        return
    message = refusal(config.check_block_size, block_size)
    assert f"budget {budget} " in message
    needed = window + block_size
    assert f"{window} + {block_size} = {needed} tokens); give {needed} or more" in message


def test_window_is_the_methods_own_unless_given():
    assert KVCompressConfig("span").window == RECIPES["span"].window == 16
    assert KVCompressConfig.from_dict({"method": "span", "window": None}).window == 16
    assert KVCompressConfig("span", window=32).window == 32
    assert KVCompressConfig("pyramidkv").window == 16
    assert KVCompressConfig("pyramidkv", options=(("published", True),)).window == 32
    assert KVCompressConfig("h2o").window == 32


def test_recent_tokens_are_the_window_unless_the_scorer_rates_the_window():
    assert KVCompressConfig("snapkv", window=20).recent_tokens == 20
    assert KVCompressConfig("span", window=20).recent_tokens == 8
    assert KVCompressConfig("span", window=4).recent_tokens == 4
    config = KVCompressConfig("span", window=20, options=(("recent_tokens", 50),))
    assert config.recent_tokens == 20
    message = refusal(KVCompressConfig, "snapkv", options=(("recent_tokens", 8),))
    assert "'recent_tokens'" in message


def test_ratio_fits_any_block_size():
    KVCompressConfig("snapkv", ratio=0.99).check_block_size(128)


def test_options_may_be_flat_nested_or_both():
    flat = {"method": "snapkv", "pool_kernel": 5, "granularity": "token"}
    nested = {"method": "snapkv", "options": {"pool_kernel": 5, "granularity": "token"}}
    mixed = {"method": "snapkv", "pool_kernel": 5, "options": {"granularity": "token"}}
    agreeing = {**nested, "pool_kernel": 5}
    configs = {KVCompressConfig.from_dict(raw) for raw in (flat, nested, mixed, agreeing)}
    assert configs == {
        KVCompressConfig("snapkv", options=(("pool_kernel", 5), ("granularity", "token")))
    }


def test_flat_and_nested_options_contradict():
    raw = {"method": "snapkv", "pool_kernel": 5, "options": {"pool_kernel": 3}}
    message = refusal(KVCompressConfig.from_dict, raw)
    assert "'pool_kernel'" in message
    assert "5 and 3" in message


def test_misspelt_option_is_named_with_the_nearest():
    message = refusal(KVCompressConfig.from_dict, {"method": "snapkv", "pol_kernel": 5, "x": 1})
    assert "unknown option 'pol_kernel' (did you mean 'pool_kernel'?), 'x' for" in message
    assert "it takes: " in message


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("methd", "method"),
        ("budgte", "budget"),
        ("Ratio", "ratio"),
        ("windwo", "window"),
        ("option", "options"),
    ],
)
@pytest.mark.parametrize("method", [{}, {"method": "snapkv"}], ids=["default", "named"])
def test_misspelt_key_is_named_with_the_nearest(method, key, meant):
    message = refusal(KVCompressConfig.from_dict, {**method, key: 5})
    assert message == f"unknown key {key!r} in kv_compress; did you mean {meant!r}?"


def test_every_option_of_any_method_is_no_misspelt_key():
    for recipe in RECIPES.values():
        for name in option_specs(recipe):
            other = "random" if recipe.name != "random" else "snapkv"
            try:
                KVCompressConfig.from_dict({"method": other, name: None})
            except KVCompressConfigError as error:
                assert "unknown key" not in str(error)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("snapkw", "snapkv"),
        ("PyramidKV", "pyramidkv"),
        ("pyramid", "pyramidkv"),
        ("ada_pyramid_kv", "ada-pyramidkv"),
        ("Expected Attention", "expected-attention"),
    ],
)
def test_misspelt_method_is_named_with_the_nearest(name, meant):
    message = refusal(KVCompressConfig.from_dict, {"method": name})
    assert message.startswith(
        f"unknown KV-compression method {name!r} (did you mean {meant!r}?); known: snapkv, "
    )


def test_method_like_no_other_gets_no_suggestion():
    assert "did you mean" not in refusal(KVCompressConfig, "best")


@pytest.mark.parametrize(
    ("raw", "budget"), [(True, DEFAULT_BUDGET), ({}, DEFAULT_BUDGET), ({"budget": 128}, 128)]
)
def test_setting_without_a_method_means_the_default_one(raw, budget):
    assert KVCompressConfig.from_dict(raw) == KVCompressConfig(DEFAULT_METHOD, budget=budget)
    with_none = {"method": None, "ratio": 0.5}
    assert KVCompressConfig.from_dict(with_none) == KVCompressConfig(DEFAULT_METHOD, ratio=0.5)


def test_string_is_a_method():
    assert KVCompressConfig.from_dict("h2o") == KVCompressConfig("h2o")


@pytest.mark.parametrize("configured", [None, True, {}, {"window": 8}, "h2o"])
def test_what_stands_beside_a_setting_joins_it(configured):
    joined = join_settings(configured, {"budget": 99})
    assert joined == {**(as_settings(configured) or {}), "budget": 99}


def test_settings_that_contradict_are_named():
    message = refusal(join_settings, {"method": "h2o"}, {"method": "snapkv"})
    assert message == "KV-compression method is given twice: 'h2o' and 'snapkv'; give one"
    assert "is false in additional_config" in refusal(join_settings, False, {"budget": 99})


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        pytest.param(None, ("mapping", "NoneType"), id="none"),
        pytest.param(False, ("mapping", "bool"), id="false"),
        pytest.param(7, ("mapping", "int 7"), id="a_number"),
        pytest.param(["snapkv"], ("mapping", "list"), id="a_list"),
        pytest.param({7: 8}, ("keys must be names", "7"), id="a_key_that_is_no_name"),
        pytest.param({"method": 3}, ("must be a name", "3"), id="method_is_a_number"),
        pytest.param({"method": ["knorm"]}, ("must be a name", "['knorm']"), id="method_list"),
        pytest.param({"method": "knorm", "options": [1]}, ("mapping", "[1]"), id="list"),
        pytest.param({"method": "knorm", "options": []}, ("mapping", "[]"), id="empty_list"),
        pytest.param({"method": "knorm", "options": False}, ("mapping", "False"), id="off"),
    ],
)
def test_malformed_mapping(raw, parts):
    message = refusal(KVCompressConfig.from_dict, raw)
    for part in parts:
        assert part in message


def test_none_stands_for_not_given():
    raw = {"method": "knorm", "budget": None, "ratio": None, "window": None, "options": None}
    assert KVCompressConfig.from_dict(raw) == KVCompressConfig("knorm")


SETTINGS = {
    "default": {"method": "snapkv"},
    "budget": {"method": "pyramidkv", "budget": 512, "window": 8, "beta": 7},
    "ratio": {"method": "ada-snapkv", "ratio": 0.75, "options": {"alpha": 0.5}},
    "ratio_0": {"method": "knorm", "ratio": 0},
    "token": {"method": "streamingllm", "granularity": "token", "num_sinks": 0},
    "flags": {"method": "snapkv", "pool_first": False, "score_power": 2},
    "other_budgets": {"method": "defensivekv", "budgets": "joint", "floor": 0.5},
    "table": {"method": "snapkv", "budgets": "static", "table": [1, 2, 3]},
    "table_per_head": {"method": "knorm", "budgets": "static", "table": [[1, 2], [3, 4]]},
    "suffix": {"method": "keydiff", "suffix_tokens": 64},
}


@pytest.mark.parametrize("raw", SETTINGS.values(), ids=SETTINGS)
def test_round_trip(raw):
    before = copy.deepcopy(raw)
    config = KVCompressConfig.from_dict(raw)
    assert raw == before
    as_dict = config.to_dict()
    assert KVCompressConfig.from_dict(as_dict) == config
    # The mapping travels through --additional-config as JSON.
    assert KVCompressConfig.from_dict(json.loads(json.dumps(as_dict))) == config
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert copied == config
        assert hash(copied) == hash(config)


def test_settings_that_differ_are_unequal():
    configs = [KVCompressConfig.from_dict(raw) for raw in SETTINGS.values()]
    assert len(set(configs)) == len(configs)
    assert KVCompressConfig("snapkv", window=31) != KVCompressConfig("snapkv", window=32)


def test_spelt_out_defaults_and_order_make_no_difference():
    short = KVCompressConfig("ada-pyramidkv", options=(("beta", 3.0), ("alpha", 0.5)))
    long = KVCompressConfig(
        "ada-pyramidkv",
        budget=DEFAULT_BUDGET,
        window=16,
        options=(("alpha", 0.5), ("beta", 3), ("granularity", "token"), ("published", False)),
    )
    assert short == long
    assert hash(short) == hash(long)


def test_config_is_frozen():
    config = KVCompressConfig("snapkv")
    with pytest.raises(AttributeError):
        config.budget = 5


@pytest.mark.parametrize("raw", ["span", True, ["span"]])
def test_merge_settings_wants_mappings(raw):
    for pair in ((raw, {"budget": 99}), ({"budget": 99}, raw)):
        with pytest.raises(KVCompressConfigError, match="kv_compress must be a mapping"):
            merge_settings(*pair)


def test_merge_settings():
    first = {"method": "snapkv", "options": {"pool_kernel": 5}}
    second = {"budget": 64, "method": "snapkv", "options": {"pool_kind": "avg"}}
    before = copy.deepcopy((first, second))
    assert merge_settings(first, second) == {
        "method": "snapkv",
        "budget": 64,
        "options": {"pool_kernel": 5, "pool_kind": "avg"},
    }
    assert (first, second) == before
    assert merge_settings({}, second) == second
    assert merge_settings(first, {}) == first


@pytest.mark.parametrize(
    ("first", "second", "parts"),
    [
        ({"budget": 64}, {"budget": 128}, ("budget", "64 and 128")),
        ({"method": "knorm"}, {"method": "snapkv"}, ("method", "'knorm' and 'snapkv'")),
        (
            {"options": {"alpha": 0.5}},
            {"options": {"alpha": 0.25}},
            ("alpha", "0.5 and 0.25"),
        ),
        ({"options": "x"}, {"options": {"alpha": 0.25}}, ("options", "'x' and {'alpha': 0.25}")),
        ({"options": {"alpha": 0.25}}, {"options": "x"}, ("options", "{'alpha': 0.25} and 'x'")),
    ],
)
def test_merge_settings_contradict(first, second, parts):
    message = refusal(merge_settings, first, second)
    for part in parts:
        assert part in message


def test_parse_options_json():
    assert parse_options_json('{"granularity": "token", "pool_kernel": 5}') == {
        "granularity": "token",
        "pool_kernel": 5,
    }
    assert parse_options_json("{}") == {}


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", '{"a": }', "pool_kernel=5", '{"a": 1} x'])
def test_options_that_are_not_json(text):
    message = refusal(parse_options_json, text)
    assert "not valid JSON" in message
    assert "at character" in message
    assert text in message


def test_options_over_several_lines_are_refused_in_one():
    assert "not valid JSON" in refusal(parse_options_json, '{\n  "alpha": 0.5,\n}')
    assert "JSON object" in refusal(parse_options_json, "[\n1\n]")


@pytest.mark.parametrize("text", ["[1]", "3", '"alpha"', "null", "true"])
def test_options_that_are_no_object(text):
    message = refusal(parse_options_json, text)
    assert "must be a JSON object" in message
    assert text in message


WITHOUT_HEAVY_IMPORTS = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("torch", "vllm", "numpy"):
                raise ImportError("blocked: " + name)

    for name in list(sys.modules):
        assert name.partition(".")[0] not in ("torch", "vllm", "numpy"), name
    sys.meta_path.insert(0, Blocker())
    {check}
"""


UNKNOWN_METHOD = """\
from vllm_kvcompress import KVCompressConfig, KVCompressConfigError
try:
    KVCompressConfig("snapkw")
except KVCompressConfigError as error:
    assert "did you mean 'snapkv'?" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.parametrize(
    "check",
    [
        "import vllm_kvcompress.config",
        "import vllm_kvcompress.policies.recipes",
        "import vllm_kvcompress.policies.registry as r; assert 'snapkv' in r.method_names()",
        UNKNOWN_METHOD,
        "import vllm_kvcompress.memory.one_shot",
    ],
)
def test_methods_are_known_without_torch(check, tmp_path):
    script = textwrap.dedent(WITHOUT_HEAVY_IMPORTS).format(check=check)
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_blocker_above_blocks(tmp_path):
    script = textwrap.dedent(WITHOUT_HEAVY_IMPORTS).format(check="import vllm_kvcompress.ops")
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert "blocked: torch" in result.stderr


@pytest.mark.parametrize(
    ("setting", "block_size", "words"),
    [
        (
            {"method": "h2o", "ratio": 0.9375},
            32,
            "of a prompt of 1024 tokens each head keeps 32 tokens beside the window, less than 4 "
            "whole pages of 32; so few pages lose facts: keep more or make pages smaller "
            "(--block-size 16)",
        ),
        ({"method": "h2o", "ratio": 0.9375}, 16, "facts: keep more"),
        ({"method": "knorm", "budget": 128}, 32, "of a prompt each head keeps 96 tokens"),
        (
            {"method": "span", "granularity": "page", "ratio": 0.9375},
            16,
            "facts: keep more or keep single tokens (option granularity 'token')",
        ),
    ],
)
def test_few_whole_pages_are_advised_against(setting, block_size, words):
    advice = KVCompressConfig.from_dict(setting).few_pages_advice(block_size)
    assert words in advice
    # Not where single tokens are worse.
    assert ("'token'" in advice) == (setting["method"] == "span")
    by_token = KVCompressConfig.from_dict({**setting, "granularity": "token"})
    assert by_token.few_pages_advice(block_size) is None


@pytest.mark.parametrize(
    ("setting", "block_size"),
    [
        ({"method": "h2o", "ratio": 0.75}, 32),
        ({"method": "h2o", "ratio": 0.0}, 128),
        ({"method": "knorm", "budget": 160}, 32),
        ({"method": "h2o"}, 128),
    ],
)
def test_enough_pages_need_no_advice(setting, block_size):
    assert KVCompressConfig.from_dict(setting).few_pages_advice(block_size) is None
