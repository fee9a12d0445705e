"""The flags and presets through vLLM's own parser; nothing is started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vllm_kvcompress import KVCompressConfig, KVCompressConfigError

pytest.importorskip("vllm")

from vllm_kvcompress.vllm_integration.compat import UnsupportedVLLMError

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def _parse_serve(flags: list[str]):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(flags)
    return AsyncEngineArgs.from_cli_args(args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-compress", "best"], "argument --kv-compress: unknown KV-compression method 'best'"),
        (["--kv-compress", "snapkw"], "method 'snapkw' (did you mean 'snapkv'?); known: "),
        (
            ["--kv-compress", "Qwen/Qwen3-0.6B"],
            "'Qwen/Qwen3-0.6B' looks like a model, not a KV-compression method; put MODEL before "
            "--kv-compress",
        ),
        (["--kv-compress", "snapkv", "--kv-compress-ratio", "1.5"], "must be in [0, 1)"),
        (["--kv-compress", "snapkv", "--kv-compress-budget", "many"], "must be a number"),
        (["--kv-compress", "snapkv", "--kv-compress-options", "{pool"], "are not valid JSON"),
    ],
)
def test_bad_flag_is_one_line_of_the_parser(capsys, flags, message) -> None:
    with pytest.raises(SystemExit) as stop:
        _parse_serve(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    # Not even the usage, which some of vLLM's commands have 100 lines of.
    assert error.count("\n") == 1
    assert error.startswith(f"vllm serve: error: argument {flags[-2]}: ")
    assert message in error


def test_flag_without_a_name_means_the_default_method() -> None:
    for flags in (
        ["--kv-compress"],
        ["--kv-compress", "--kv-compress-budget", "512"],
        ["--kv-compress-budget", "512"],
        ["--kv-compress-budget", "512", "--additional-config", '{"kv_compress": true}'],
    ):
        settings = _parse_serve(flags).additional_config["kv_compress"]
        assert settings["method"] == "span"
        assert settings.get("budget") == (512 if len(flags) > 1 else None)
    assert _parse_serve(["--kv-compress-ratio", "0.5"]).additional_config["kv_compress"] == {
        "method": "span",
        "ratio": 0.5,
    }


def test_flags_and_additional_config_merge() -> None:
    extra = '{"kv_compress": {"pool_kernel": 5, "budget": 512}, "other": 1}'
    args = _parse_serve(["--kv-compress", "snapkv", "--additional-config", extra])
    assert args.additional_config["other"] == 1
    merged = args.additional_config["kv_compress"]
    assert merged == {"method": "snapkv", "pool_kernel": 5, "budget": 512}


def test_table_of_budgets_may_be_a_file(tmp_path) -> None:
    table = tmp_path / "table.json"
    table.write_text("[[1, 2], [3, 4]]")
    options = f'{{"budgets": "static", "table": "{table}"}}'
    args = _parse_serve(["--kv-compress", "snapkv", "--kv-compress-options", options])
    config = KVCompressConfig.from_dict(args.additional_config["kv_compress"])
    assert config.option("table") == ((1.0, 2.0), (3.0, 4.0))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--kv-compress", "snapkv", "--kv-compress-ratio", "0.5", "--kv-compress-budget", "99"],
            r"budget \(99\) and ratio \(0.5\) exclude each other; give one",
        ),
        (
            ["--kv-compress", "snapkv", "--additional-config", '{"kv_compress": "h2o"}'],
            "method is given twice: 'h2o' and 'snapkv'; give one",
        ),
        (
            ["--kv-compress", "--additional-config", '{"kv_compress": false}'],
            "kv_compress is false in additional_config, but a setting is given beside it",
        ),
        (
            [
                "--kv-compress",
                "snapkv",
                "--additional-config",
                '{"kv_compress": {"window": 16}}',
                "--kv-compress-window",
                "32",
            ],
            "window is given twice: 16 and 32",
        ),
    ],
)
def test_flags_that_contradict(flags, message) -> None:
    with pytest.raises(KVCompressConfigError, match=message):
        _parse_serve(flags)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_is_a_valid_setting(preset) -> None:
    args = _parse_serve(["--config", str(preset)])
    config = KVCompressConfig.from_dict(args.additional_config["kv_compress"])
    assert config.method in preset.stem
    config.check_block_size(32)
    # An old default pinned beside new ones would be a setting that nobody has measured.
    assert config == KVCompressConfig(config.method, budget=config.budget, ratio=config.ratio)


def test_help_lists_the_flags(capsys) -> None:
    with pytest.raises(SystemExit):
        _parse_serve(["--help=KVCompress"])
    shown = capsys.readouterr().out
    for name in ("", "-budget", "-ratio", "-window", "-options"):
        assert f"--kv-compress{name} " in shown


def test_uncaught_errors_of_commands_are_one_line(capsys, monkeypatch) -> None:
    others = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: others.append(error))
    for _ in range(2):
        _parse_serve([])
    hook = sys.excepthook
    for error in (KVCompressConfigError("a\nb"), UnsupportedVLLMError("a b")):
        hook(type(error), error, None)
        assert capsys.readouterr().err == "vllm: error: a b\n"
    assert not others
    other = ValueError("theirs")
    hook(ValueError, other, None)
    assert others == [(ValueError, other, None)]
    assert capsys.readouterr().err == ""


def test_registering_twice_changes_nothing() -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_kvcompress.vllm_integration.register import register

    register()
    first = (EngineArgs.add_cli_args, EngineArgs.create_engine_config)
    register()
    assert (EngineArgs.add_cli_args, EngineArgs.create_engine_config) == first


def test_without_flags_nothing_is_added() -> None:
    args = _parse_serve([])
    assert "kv_compress" not in args.additional_config
    assert args.worker_cls == "auto"
