"""Options of methods and budgets: types, bounds, tables, and pairs that make no sense."""

from __future__ import annotations

import json

import pytest

from vllm_kvcompress import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.config import parse_options_json


def refusal(call, *args, **kwargs):
    """The message of the KVCompressConfigError that `call` raises; one line."""
    with pytest.raises(KVCompressConfigError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("method", "name", "value", "complaint"),
    [
        ("snapkv", "pool_kernel", 4, "must be one of 1, 3, 5"),
        ("snapkv", "pool_kernel", 65, "must be one of 1, 3, 5"),
        ("snapkv", "pool_kernel", "7", "must be of type int"),
        ("snapkv", "pool_kernel", True, "must be of type int"),
        ("snapkv", "pool_kernel", 7.0, "must be of type int"),
        ("snapkv", "pool_kind", "min", "must be one of max, avg"),
        ("snapkv", "pool_kind", None, "must be of type str"),
        ("snapkv", "group_reduce", "min", "must be one of mean, sum, max"),
        ("snapkv", "window_reduce", 1, "must be of type str"),
        ("snapkv", "score_power", 3, "must be one of 1, 2"),
        ("snapkv", "pool_first", 1, "must be of type bool"),
        ("snapkv", "pool_first", "true", "must be of type bool"),
        ("snapkv", "budgets", "adaptive", "must be one of uniform, pyramid, ada"),
        ("snapkv", "budgets", ["ada"], "must be of type str"),
        ("knorm", "granularity", "block", "must be one of page, token"),
        ("knorm", "headroom", -0.5, "must be at least 0"),
        ("knorm", "suffix_tokens", -1, "must be at least 0"),
        ("knorm", "suffix_tokens", 1.5, "must be of type int"),
        ("defensivekv", "mass_first", 1.5, "must be at most 1"),
        ("span", "span_kernel", 2, "must be one of 1, 3, 5"),
        ("criticalkv", "first_stage", -0.5, "must be at least 0"),
        ("criticalkv", "epsilon", -1e-9, "must be at least 0"),
        ("expected-attention", "num_future", 0, "must be at least 1"),
        ("expected-attention", "num_sinks", -1, "must be at least 0"),
        ("h2o", "recent", 1.01, "must be at most 1"),
        ("h2o", "normalize", 0, "must be of type bool"),
        ("chunkkv", "chunk_length", 0, "must be at least 1"),
        ("chunkkv", "reuse_layers", 0, "must be at least 1"),
        ("kvc", "floor", 1.5, "must be at most 1"),
        ("streamingllm", "num_sinks", -1, "must be at least 0"),
        ("random", "seed", -1, "must be at least 0"),
        ("random", "seed", [1], "must be of type int"),
        ("pyramidkv", "beta", 0.5, "must be at least 1"),
        ("pyramidkv", "beta", "20", "must be of type float"),
        ("ada-snapkv", "alpha", -0.01, "must be at least 0"),
        ("ada-snapkv", "alpha", 1.01, "must be at most 1"),
        ("ada-snapkv", "alpha", False, "must be of type float"),
    ],
)
def test_bad_option_value(method, name, value, complaint):
    message = refusal(KVCompressConfig, method, options=((name, value),))
    assert message.startswith(f"KV-compression option {name!r} {complaint}")
    assert message.endswith(f", got {value!r}")


# Python's json reads NaN and Infinity.
@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("ada-snapkv", '{"alpha": NaN}'),
        ("pyramidkv", '{"beta": NaN}'),
        ("pyramidkv", '{"beta": Infinity}'),
        ("criticalkv", '{"epsilon": Infinity}'),
    ],
)
def test_options_are_numbers(method, text):
    options = parse_options_json(text)
    message = refusal(KVCompressConfig.from_dict, {"method": method, "options": options})
    assert "must be finite" in message
    assert message.endswith(("got nan", "got inf"))


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_an_int_past_all_floats_is_not_finite(value):
    assert "must be finite" in refusal(KVCompressConfig, "pyramidkv", options=(("beta", value),))


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0])
def test_bounds_of_an_option_are_allowed_and_an_int_passes_for_a_float(value):
    assert KVCompressConfig("ada-snapkv", options=(("alpha", value),)).option("alpha") == value


def test_unknown_options_are_named_with_the_known():
    message = refusal(KVCompressConfig, "knorm", options=(("zeta", 1), ("alpha", 0.5)))
    assert "'alpha', 'zeta'" in message
    assert "'knorm'" in message
    assert "budgets 'uniform'" in message
    assert message.endswith(
        "it takes: budgets, granularity, headroom, one_shot, page_reduce, suffix_tokens"
    )


def test_option_of_another_method_is_unknown():
    assert "'alpha'" in refusal(KVCompressConfig, "snapkv", options=(("alpha", 0.5),))
    KVCompressConfig("ada-snapkv", options=(("alpha", 0.5),))


def test_budgets_bring_their_own_options():
    ada = KVCompressConfig("snapkv", options=(("budgets", "ada"),))
    assert ada.option("alpha") == 0.2
    with pytest.raises(KeyError):
        ada.option("beta")
    both = KVCompressConfig("snapkv", options=(("beta", 7), ("budgets", "ada-pyramid")))
    assert (both.option("alpha"), both.option("beta")) == (0.2, 7)
    # The recipe's own budgets take no part any more.
    message = refusal(
        KVCompressConfig, "ada-snapkv", options=(("alpha", 0.5), ("budgets", "joint"))
    )
    assert "'alpha'" in message
    assert "budgets 'joint'" in message
    assert "floor" in message


def test_budgets_may_be_spelt_out():
    spelt_out = KVCompressConfig("kvc", options=(("budgets", "joint"), ("floor", 0.05)))
    assert spelt_out == KVCompressConfig("kvc")
    assert KVCompressConfig("snapkv", options=(("budgets", "joint"),)) != KVCompressConfig("snapkv")


@pytest.mark.parametrize(
    ("method", "budgets", "reason"),
    [
        ("tova", "ada", "it scores all heads of a layer alike, so they cannot compete"),
        ("streamingllm", "joint", "it scores all heads of a layer alike, so they cannot compete"),
        ("chunkkv", "ada-pyramid", "it scores all heads of a layer alike, so they cannot compete"),
        ("knorm", "joint", "key norms of different layers have different scales"),
    ],
)
def test_nonsense_pairs_are_refused_with_their_reason(method, budgets, reason):
    message = refusal(KVCompressConfig, method, options=(("budgets", budgets),))
    assert message.startswith(f"KV-compression method {method!r}: ")
    assert repr(budgets) in message
    assert message.endswith(f"because {reason}")


@pytest.mark.parametrize(
    ("method", "budgets"), [("tova", "pyramid"), ("knorm", "ada"), ("random", "joint")]
)
def test_other_pairs_are_taken(method, budgets):
    assert KVCompressConfig(method, options=(("budgets", budgets),)).option("budgets") == budgets


def static(table, method="snapkv"):
    return KVCompressConfig(method, options=(("budgets", "static"), ("table", table)))


@pytest.mark.parametrize(
    ("table", "stored"),
    [
        pytest.param([1, 2.5, 3], (1.0, 2.5, 3.0), id="per_layer"),
        pytest.param((4,), (4.0,), id="one_layer"),
        pytest.param([[1, 2], [3, 4.5]], ((1.0, 2.0), (3.0, 4.5)), id="per_head"),
        pytest.param(((1,), (2,)), ((1.0,), (2.0,)), id="one_head"),
    ],
)
def test_static_tables_are_stored_as_tuples_of_floats(table, stored):
    config = static(table)
    assert config.option("table") == stored
    assert hash(config) == hash(static(stored))
    assert config == static(stored)
    assert KVCompressConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for row in config.option("table"):
        assert all(type(weight) is float for weight in (row if isinstance(row, tuple) else [row]))


@pytest.mark.parametrize(
    "table",
    [
        [],
        (),
        [[]],
        [[], []],
        [[1, 2], []],
        5,
        None,
        {"0": 1},
        [0],
        [1, -2],
        [1, float("nan")],
        [1, float("inf")],
        [1, 10**400],
        [True, 1],
        ["1", 2],
        [None],
        [1, [2]],
        [[1], 2],
        [[1, 2], [3]],
        [[1, 2], [3, 0]],
        [[[1]]],
    ],
    ids=str,
)
def test_bad_tables(table):
    message = refusal(static, table)
    assert "[weight per layer] or [[weight per head] per layer]" in message
    assert message.startswith("KV-compression option 'table' must be")
    assert message.endswith(f", got {table!r}")


def test_ragged_tables_are_named():
    assert "same number of heads in every layer" in refusal(static, [[1, 2], [3]])


def test_static_budgets_need_their_table():
    message = refusal(KVCompressConfig, "snapkv", options=(("budgets", "static"),))
    assert message == "KV-compression budgets 'static' need the option 'table'"
    message = refusal(KVCompressConfig, "snapkv", options=(("table", (1.0,)),))
    assert "unknown option 'table'" in message


def test_tables_from_a_file(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("[[1, 2], [3, 4]]")
    config = static(str(path))
    assert config == static([[1, 2], [3, 4]])
    # What is stored is the table: other processes need not see the file.
    path.unlink()
    assert KVCompressConfig.from_dict(config.to_dict()) == config


def test_tables_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "table.json").write_text("[1, 2]")
    assert static("~/table.json").option("table") == (1.0, 2.0)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "names a file that cannot be read (No such file or directory)"),
        (b"[1, 2", "names a file that is not JSON"),
        (b"\xff\xfe", "names a file that is not JSON"),
        (b'"table.json"', "must be [weight per layer]"),
        (b"[1, 0]", "must be [weight per layer]"),
        (b"[1, NaN]", "must be [weight per layer]"),
    ],
    ids=["missing", "cut_off", "no_text", "a_string", "a_zero", "a_nan"],
)
def test_bad_table_files(content, complaint, tmp_path):
    path = tmp_path / "table.json"
    if content is not None:
        path.write_bytes(content)
    message = refusal(static, str(path))
    assert complaint in message
    assert message.endswith(f", got {str(path)!r}")
