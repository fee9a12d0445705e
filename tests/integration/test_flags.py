"""The flags and presets through vLLM's own parser; nothing is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_kvcompress import KVCompressConfig, KVCompressConfigError

pytest.importorskip("vllm")

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
        (
            ["--kv-compress", "snapkv", "--kv-compress-ratio", "0.5", "--kv-compress-budget", "99"],
            "not allowed with argument",
        ),
        (["--kv-compress", "snapkv", "--kv-compress-ratio", "1.5"], "must be in [0, 1)"),
        (["--kv-compress", "snapkv", "--kv-compress-budget", "many"], "must be a number"),
        (["--kv-compress", "snapkv", "--kv-compress-options", "{pool"], "are not valid JSON"),
    ],
)
def test_bad_flag_is_one_line_of_the_parser(capsys, flags, message) -> None:
    with pytest.raises(SystemExit):
        _parse_serve(flags)
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_flag_without_a_name_means_the_default_method() -> None:
    for flags in (["--kv-compress"], ["--kv-compress", "--kv-compress-budget", "512"]):
        settings = _parse_serve(flags).additional_config["kv_compress"]
        assert settings["method"] == "span"
        assert settings.get("budget") == (512 if len(flags) > 1 else None)


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
        (["--kv-compress-budget", "99"], "--kv-compress-budget needs --kv-compress METHOD"),
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


def test_help_lists_the_flags(capsys) -> None:
    with pytest.raises(SystemExit):
        _parse_serve(["--help=KVCompress"])
    shown = capsys.readouterr().out
    for name in ("", "-budget", "-ratio", "-window", "-options"):
        assert f"--kv-compress{name} " in shown


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
