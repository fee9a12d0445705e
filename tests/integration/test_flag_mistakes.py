"""Flags that are misspelt or given twice, through vLLM's own parsers; nothing is started."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm")


def _parse_serve(monkeypatch, *flags: str):
    """What `vllm serve MODEL` with these flags makes of them, as a command does it."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setattr(sys, "argv", ["vllm", "serve", "model", *flags])
    parser = FlexibleArgumentParser(prog="vllm")
    subparsers = parser.add_subparsers(dest="subparser")
    make_arg_parser(subparsers.add_parser("serve"))
    args = AsyncEngineArgs.from_cli_args(parser.parse_args())
    return args.additional_config.get("kv_compress")


def _refusal(monkeypatch, capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        _parse_serve(monkeypatch, *flags)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--kv-compress", "snapkv", "--enforce-eager", "--kv-compress", "h2o"],
            "argument --kv-compress: given twice: 'snapkv' and 'h2o'; give one",
        ),
        (
            ["--kv_compress=snapkv", "--kv-compress", "--enforce-eager"],
            "argument --kv-compress: given twice: 'snapkv' and 'span'; give one",
        ),
        (
            ["--kv-compress-budget", "512", "--kv-compress-bud=640"],
            "argument --kv-compress-budget: given twice: '512' and '640'; give one",
        ),
        (
            ["--kv-compress-options", "{}", "--kv-compress-options", '{"headroom": 0}'],
            "argument --kv-compress-options: given twice: '{}' and '{\"headroom\": 0}'; give one",
        ),
    ],
)
def test_a_flag_with_two_values_is_refused(monkeypatch, capsys, flags, message) -> None:
    assert _refusal(monkeypatch, capsys, *flags) == f"vllm serve: error: {message}\n"


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        (["--kv-compress", "h2o", "--kv-compress", "h2o"], {"method": "h2o"}),
        (["--kv-compress", "h2o", "--kv-compress-budget", "99"], {"method": "h2o", "budget": 99}),
        (["--kv-compress", "--kv-compress-ratio", "0.5"], {"method": "span", "ratio": 0.5}),
    ],
)
def test_a_flag_with_one_value_is_fine(monkeypatch, flags, setting) -> None:
    assert _parse_serve(monkeypatch, *flags) == setting


def test_the_command_line_overrules_a_file(monkeypatch, capsys, tmp_path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("kv-compress: snapkv\nkv-compress-budget: 512\n")
    config = ("--config", str(preset))
    assert _parse_serve(monkeypatch, *config) == {"method": "snapkv", "budget": 512}
    for flags in (("--kv-compress", "h2o", *config), (*config, "--kv-compress", "h2o")):
        assert _parse_serve(monkeypatch, *flags) == {"method": "h2o", "budget": 512}
    twice = ("--kv-compress", "h2o", "--kv-compress", "tova")
    assert "given twice: 'h2o' and 'tova'" in _refusal(monkeypatch, capsys, *config, *twice)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--kvcompress", "--kv-compress"),
        ("--kv-compresss", "--kv-compress"),
        ("--kv-kompress", "--kv-compress"),
        ("--kv-compress-bugdet=512", "--kv-compress-budget"),
        ("--kv_compress_ration", "--kv-compress-ratio"),
        ("--kv-compression-window", "--kv-compress-window"),
    ],
)
def test_a_misspelt_flag_is_told_the_right_one(monkeypatch, capsys, flag, meant) -> None:
    name = flag.partition("=")[0].replace("_", "-")
    assert _refusal(monkeypatch, capsys, flag, "span") == (
        f"vllm serve: error: unrecognized argument {name} (did you mean {meant!r}?)\n"
    )


@pytest.mark.parametrize("flag", ["--kv-cashe-dtype", "--task", "--compress", "--kv-trnsfer"])
def test_other_unknown_flags_are_left_to_vllm(monkeypatch, capsys, flag) -> None:
    error = _refusal(monkeypatch, capsys, flag, "auto")
    assert f"error: unrecognized arguments: {flag} auto" in error
    assert "kv-compress" not in error


@pytest.mark.parametrize("command", ["serve", "bench throughput"])
def test_commands_say_so_in_one_last_line(command) -> None:
    line = [sys.executable, "-m", "vllm.entrypoints.cli.main", *command.split(), "--kvcompress"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300, env=os.environ)
    assert result.returncode == 2
    assert "usage:" not in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith(
        f"{command.split()[-1]}: error: unrecognized argument --kvcompress (did you mean "
        "'--kv-compress'?)"
    )
