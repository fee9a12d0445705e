"""The README's order, links, commands and snippets; tests/e2e/test_readme.py runs them."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from cli_runs import LLAMA, write_model
from readme import blocks, commands

from vllm_kvcompress import KVCompressConfig
from vllm_kvcompress.cli import main
from vllm_kvcompress.config import DEFAULT_METHOD
from vllm_kvcompress.policies.method_options import option_specs
from vllm_kvcompress.policies.recipes import RECIPES

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def parse_serve(arguments: list[str]) -> KVCompressConfig:
    """The setting of a `vllm serve` command, by vLLM's own parser."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    args = AsyncEngineArgs.from_cli_args(parser.parse_args(arguments))
    return KVCompressConfig.from_dict(args.additional_config["kv_compress"])


def test_install_comes_before_serve_and_that_before_numbers():
    sections = re.findall(r"^## (.+)$", README, re.M)
    assert sections[:2] == ["Install", "Serve"]
    first_numbers = re.search(r"tokens/s|\bratio to\b", README).start()
    for name in ("Install", "Serve", "Offline", "Docker"):
        assert README.index(f"\n## {name}\n") < first_numbers


def test_the_default_method_comes_first():
    served = [command for command in commands(README) if command[:2] == ["vllm", "serve"]]
    assert parse_serve(served[0][3:]).method == DEFAULT_METHOD
    dockerfile = (ROOT / "docker/Dockerfile.cpu").read_text()
    named = re.compile(r"""(?:--kv-compress |kv_compress="|"method": "|configs/)([a-z0-9-]+)""")
    for text in (README, dockerfile):
        for name in named.findall(text)[:1]:
            assert name.startswith(DEFAULT_METHOD)
    presets = re.findall(r"configs/([a-z0-9-]+)\.yaml", README)
    assert (ROOT / f"configs/{presets[0]}.yaml").read_text().count(f"method: {DEFAULT_METHOD}") == 1


def test_servers_on_a_cpu_are_told_their_memory():
    starting = [c for c in commands(README) if "serve" in c[:2] or c[:2] == ["docker", "run"]]
    assert len(starting) >= 2
    assert all("--kv-cache-memory-bytes" in command for command in starting)


def test_commands_parse(tmp_path, capsys):
    model = write_model(tmp_path / "model", {**LLAMA, "max_position_embeddings": 8192})
    parsed = []
    for command in commands(README):
        command = [model if word in ("MODEL", "/model") else word for word in command]
        if command[:2] == ["vllm", "serve"]:
            parsed.append(parse_serve(command[2:]))
        elif command[:2] == ["docker", "run"]:
            parsed.append(parse_serve(command[command.index(model) :]))
        elif command[:2] == ["vllm", "bench"]:
            given = json.loads(command[command.index("--additional-config") + 1])
            parsed.append(KVCompressConfig.from_dict(given["kv_compress"]))
        elif command[0] == "vllm-kvcompress":
            assert main(command[1:]) == 0
            assert DEFAULT_METHOD in capsys.readouterr().out
            parsed.append(None)
    assert len(parsed) >= 4


def test_inline_commands_parse():
    """Those in running text, such as the one with a preset."""
    inline = [shlex.split(text) for text in re.findall(r"`(vllm serve MODEL [^`]+)`", README)]
    assert inline
    for command in inline:
        arguments = [str(ROOT / w) if w.startswith("configs/") else w for w in command[2:]]
        assert parse_serve(arguments).method == DEFAULT_METHOD


def test_scripts_that_make_an_engine_are_guarded():
    """An engine's process imports the script that made it."""
    texts = [README, *(path.read_text() for path in (ROOT / "docs").glob("*.md"))]
    snippets = [code for text in texts for code in blocks(text, "python")]
    making = 0
    for code in snippets:
        tree = ast.parse(code)
        calls = {
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("LLM")
        }
        guarded = {
            line
            for node in tree.body
            if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
            for line in range(node.lineno, node.end_lineno + 1)
        }
        assert calls <= guarded, code
        making += bool(calls)
    assert making >= 1


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert links
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / path if path else ROOT / "README.md"
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, link


def test_files_that_are_named_exist():
    named = re.findall(r"\b(?:scripts|configs|docker|docs|benchmarks)/[\w./-]*\w", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_method_and_common_option_is_listed():
    rows = re.findall(r"^\| `([\w-]+)` \|", README, re.M)
    assert set(RECIPES) <= set(rows)
    common = set.intersection(*(set(option_specs(recipe)) for recipe in RECIPES.values()))
    assert common <= set(rows)
