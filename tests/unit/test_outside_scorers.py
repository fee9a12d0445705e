"""Scorers that other packages bring by an entry point."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from cli_runs import LLAMA, SETTING, one_line_error, write_model
from layer_inputs import random_inputs
from outside_packages import EXAMPLE, install, install_example

from vllm_kvcompress import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.cli import main
from vllm_kvcompress.policies import RECIPES, base, make_scorer, registry

GUIDE = (EXAMPLE.parents[1] / "docs" / "own_scorer.md").read_text()

SCORER = """
    from dataclasses import dataclass
    from typing import ClassVar
    import torch
    from vllm_kvcompress.policies.base import LayerScores, Scorer
    from vllm_kvcompress.policies.options import option

    @dataclass(frozen=True)
    class Own(Scorer):
        '''All the same.'''

        {body}

        def score(self, inputs):
            return LayerScores(torch.zeros(inputs.key.shape[0], inputs.num_candidates))
"""


def scorer_source(*body):
    return SCORER.replace("{body}", "\n        ".join(body))


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder to install packages into, which this process looks at afresh."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    modules = set(sys.modules)
    forget()
    yield folder
    for name in set(sys.modules) - modules:
        if name.startswith("own_"):
            del sys.modules[name]
    forget()


def forget():
    for found in (registry._entry_points, registry.find_recipe, registry._outside_scorer):
        found.cache_clear()


def refusal(*arguments, **settings):
    with pytest.raises(KVCompressConfigError) as caught:
        KVCompressConfig(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def listing(capsys, *arguments):
    assert main(["methods", *arguments]) == 0
    return capsys.readouterr()


def test_a_scorer_has_a_method_of_its_own_name(outside, capsys):
    install_example(outside)
    config = KVCompressConfig("value-norm", ratio=0.5)
    assert (config.window, config.granularity, config.option("budgets")) == (32, "token", "uniform")
    assert KVCompressConfig.from_dict(config.to_dict()) == config
    inputs, _ = random_inputs()
    scores = make_scorer(KVCompressConfig("value-norm", options=(("num_sinks", 3),))).score(inputs)
    norms = inputs.value[:, : inputs.num_candidates].norm(dim=-1)
    assert torch.equal(scores.first[:, 3:], norms[:, 3:])
    assert scores.first[:, :3].isinf().all()
    # Listed and explained like any other.
    entries = listing(capsys).out.partition("\n\n")[0]
    assert "\nvalue-norm: Norm of the values, the first tokens always kept\n" in entries
    details = listing(capsys, "value-norm").out.splitlines()
    assert details[1] == "source: own-scorer 0.1"
    assert details[2] == "needs beside the keys: the values"
    assert "  num_sinks      int   4  (at least 0)" in details
    (entry,) = json.loads(listing(capsys, "value-norm", "--json").out)
    assert (entry["name"], entry["paper"], entry["needs"]) == (
        "value-norm",
        "own-scorer 0.1",
        ["value"],
    )


def test_what_the_class_says_of_its_method(outside, capsys):
    body = (
        "source: ClassVar[str] = 'A paper, arXiv 1'",
        "summary: ClassVar[str] = 'nothing but zeros'",
        "budgets: ClassVar[str] = 'ada'",
        "window: ClassVar[int] = 8",
        "granularity: ClassVar[str] = 'token'",
        "rates_window: ClassVar[bool] = True",
        "weakness: ClassVar[str] = 'knows nothing'",
        "signed: ClassVar[bool] = True",
        "scope: ClassVar[str] = 'layer'",
        "scope_reason: ClassVar[str] = 'layers differ'",
        "first_stage: float = option(0.5, 'a share', minimum=0.0, maximum=1.0)",
    )
    zeros = "torch.zeros(inputs.key.shape[0], inputs.num_candidates)"
    source = scorer_source(*body).replace(zeros, f"{zeros}, {zeros}")
    install(outside, "own-two", {"own": "own_two:Own"}, source)
    config = KVCompressConfig("own")
    assert (config.window, config.recent_tokens, config.num_scores) == (8, 8, 2)
    assert (config.option("budgets"), config.option("alpha")) == ("ada", 0.2)
    assert config.recipe.weakness == "knows nothing"
    assert "must be one of max, mean" in refusal("own", options=(("page_reduce", "rms"),))
    assert refusal("own", options=(("budgets", "joint"),)).endswith("because layers differ")
    assert "did you mean 'first_stage'" in refusal("own", options=(("first_stag", 1),))
    assert "(did you mean 'own'?)" in refusal("ownn")
    text = " ".join(listing(capsys).out.split())
    assert "own: nothing but zeros A paper, arXiv 1; from own-two 1.0 window: 8; " in text
    assert "it knows nothing refuses budgets joint" in text


def test_an_option_of_its_own_is_no_misspelt_setting(outside):
    body = ("windows: int = option(1, 'of the house')",)
    install(outside, "own-windows", {"own": "own_windows:Own"}, scorer_source(*body))
    config = KVCompressConfig.from_dict({"method": "own", "windows": 3})
    assert config.option("windows") == 3
    with pytest.raises(KVCompressConfigError, match="did you mean 'window'"):
        KVCompressConfig.from_dict({"method": "snapkv", "windows": 3})


def broken(what):
    """A package name, its scorer's value, its module, and what is said of it."""
    own = f"own_{what}:Own"
    declared = {
        "scope": ("scope: ClassVar[str] = 'house'", "has scope 'house', which is none of head, "),
        "reason": ("scope: ClassVar[str] = 'head'", "has scope 'head' and no scope_reason"),
        "budgets": ("budgets: ClassVar[str] = 'fair'", "has budgets 'fair', which is none of uni"),
        "pair": (
            "scope, scope_reason, budgets = 'head', 'so', 'ada'",
            "has budgets 'ada', which compare further than scope 'head'",
        ),
        "window": ("window: ClassVar[int] = 0", "has window 0, which is no whole number >= 1"),
        "granularity": ("granularity = 'byte'", "has granularity 'byte', which is none of page"),
        "needs": ("needs = frozenset({'hope'})", "needs 'hope', but there is window_query, "),
        "string": ("needs = 'value'", "has needs 'value', which is no frozenset"),
        "observe": ("needs = frozenset({'all_queries'})", "must define observe if it needs 'all_"),
        "taken": ("alpha: float = option(0.5, 'x')", "has an option 'alpha', which is another"),
        "budget": ("budget: int = option(5, 'x')", "has an option 'budget', which is another"),
        "default": (
            "width: int = option(0, 'x', minimum=1)",
            "has an option 'width' whose default must be at least 1, got 0",
        ),
        "field": ("width: int", "cannot be made (TypeError: Own.__init__() missing 1 required"),
    }
    if what in declared:
        body, words = declared[what]
        return own, scorer_source(body), f"cannot be used: '{own}' {words}"
    undecorated = scorer_source("width: int = option(3, 'x')").replace(
        "@dataclass(frozen=True)", ""
    )
    unfinished = scorer_source("pass").replace("def score", "def rate")
    zeros = "torch.zeros(inputs.key.shape[0], inputs.num_candidates)"
    scores = {
        "type": ("zeros()", "gives Tensor for scores, not LayerScores"),
        "shape": (
            "LayerScores(torch.zeros(2, 5))",
            "gives scores [2, 5] of torch.float32 for 2 KV heads and 256 candidates; they must be "
            "[2, 256] of torch.float32",
        ),
        "dtype": ("LayerScores(zeros().bfloat16())", "gives scores [2, 256] of torch.bfloat16 for"),
        "list": ("LayerScores([0.5])", "gives list for scores, not a tensor"),
        "nan": ("LayerScores(zeros() / 0)", "gives NaN for a score"),
        "second": ("LayerScores(zeros(), zeros())", "must have the option 'first_stage' if it"),
        "value": (
            "LayerScores(inputs.value.norm(dim=-1))",
            "cannot score a prompt (AttributeError: 'NoneType' object has no attribute 'norm')",
        ),
    }
    if what in scores:
        given, words = scores[what]
        module = scorer_source("pass").replace(f"LayerScores({zeros})", given)
        module = module.replace("zeros()", zeros)
        return own, module, f"cannot be used: '{own}' {words}"
    others = {
        "import": ("import nowhere", "(ModuleNotFoundError: No module named 'nowhere')"),
        "syntax": ("def", "(SyntaxError: "),
        "exit": ("raise SystemExit('bye\\nbye')", "(SystemExit: bye bye)"),
        "missing": ("pass", "(AttributeError: module 'own_missing' has no attribute 'Own')"),
        "function": ("def Own(): pass", f"'{own}' is no subclass of vllm_kvcompress.policies.base"),
        "class": ("class Own: pass", f"'{own}' is no subclass of vllm_kvcompress.policies.base"),
        "abstract": (unfinished, f"'{own}' does not define score"),
        "plain": (undecorated, "(TypeError: Own has the option 'width', but no @dataclass)"),
    }
    return (own, *others[what])


BROKEN = (
    *("scope", "reason", "budgets", "pair", "window", "granularity", "needs", "string", "observe"),
    *("taken", "budget", "default", "field", "import", "syntax", "exit", "missing", "function"),
    *("class", "abstract", "plain"),
    *("type", "shape", "dtype", "list", "nan", "second", "value"),
)


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_scorer_is_named_and_harms_no_other(outside, capsys, what):
    value, module, words = broken(what)
    install(outside, f"own-{what}", {"own": value}, module)
    message = refusal("own")
    assert message.startswith(f"KV-compression scorer 'own' of own-{what} 1.0 cannot be ")
    assert words in message
    with pytest.raises(KVCompressConfigError) as caught:
        KVCompressConfig.from_dict({"method": "own", "budget": 64})
    assert str(caught.value) == message
    assert one_line_error(capsys, "methods", "own") == f"vllm-kvcompress: {message}\n"
    # The others work, and the list has a line on it.
    assert KVCompressConfig.from_dict({"method": "snapkv"}) == KVCompressConfig("snapkv")
    assert "(did you mean 'own'?)" in refusal("owm")
    text = listing(capsys).out
    warning = message.removeprefix("KV-compression ")
    assert text.endswith(f"\nwarning: {warning}\n")
    assert text.count("warning: ") == 1
    captured = listing(capsys, "--json")
    assert [entry["name"] for entry in json.loads(captured.out)] == list(RECIPES)
    assert captured.err == f"\nwarning: {warning}\n"


@pytest.mark.parametrize("name", ["snapkv", "critical"])
def test_names_of_this_package_stay_its_own(outside, capsys, name):
    """A method's and a scorer's."""
    install(outside, "own-clash", {name: "own_clash:Own"}, scorer_source("pass"))
    line = f"scorer {name!r} of own-clash 1.0 is not used: vllm-kvcompress has that name"
    assert make_scorer(KVCompressConfig("snapkv")).__module__.startswith("vllm_kvcompress.")
    assert registry.scorer_class(name).__module__.startswith("vllm_kvcompress.")
    assert listing(capsys).out.endswith(f"\nwarning: {line}\n")
    if name in RECIPES:
        assert listing(capsys, name).out.endswith(f"\nwarning: {line}\n")
    else:
        assert f"unknown KV-compression method {name!r}" in refusal(name)


def test_a_name_of_two_packages_is_refused_with_both(outside, capsys):
    install(outside, "own-a", {"own": "own_a:Own"}, scorer_source("pass"))
    install(outside, "own-b", {"own": "own_b:Own"}, scorer_source("pass"), version="2.0")
    message = refusal("own")
    assert message == (
        "KV-compression scorer 'own' is brought by own-a 1.0 and own-b 2.0; uninstall all but one"
    )
    assert message.removeprefix("KV-compression ") in listing(capsys).out


@pytest.mark.parametrize(
    ("language", "file"), [("python", "own_scorer.py"), ("toml", "pyproject.toml")]
)
def test_the_guide_shows_the_example(language, file):
    shown = GUIDE.partition(f"```{language}\n")[2].partition("```")[0]
    assert shown
    assert shown in (EXAMPLE / file).read_text()


def test_the_guide_has_every_attribute_and_need():
    rows = re.findall(r"^\| (`.*?) \|", GUIDE, re.M)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    declared = {name for name, kind in base.Scorer.__annotations__.items() if "ClassVar" in kind}
    assert names == declared | set(base.NEEDS)
    for name in declared - {"needs", "scope_reason"}:
        default = getattr(base.Scorer, name)
        (row,) = [line for line in GUIDE.splitlines() if line.startswith(f"| `{name}`")]
        assert default == "" or f"`{default!r}`".replace("'", '"') in row


HELP = """
import argparse, sys
from vllm_kvcompress.flags import add_flags
text = " ".join(add_flags(argparse.ArgumentParser(prog="serve")).format_help().split())
assert "value-norm: from own-scorer 0.1, see `vllm-kvcompress methods value-norm`." in text, text
assert "own%: from own-percent 1.0, " in text, text
assert "torch" not in sys.modules and "own_scorer" not in sys.modules
from vllm_kvcompress import KVCompressConfig
try:
    KVCompressConfig("value-nrom")
except ValueError as error:
    assert "(did you mean 'value-norm'?)" in str(error), error
assert "torch" not in sys.modules and "own_scorer" not in sys.modules
"""


def test_names_are_known_without_an_import(tmp_path):
    install_example(tmp_path)
    install(tmp_path, "own-percent", {"own%": "own_percent:Own"}, "raise SystemExit")
    command = [sys.executable, "-P", "-c", HELP]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "9999"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_example_in_a_process_of_its_own(tmp_path):
    """The command as a user has it, beside a package that ends whoever imports it."""
    install_example(tmp_path)
    install(tmp_path, "own-exit", {"own": "own_exit:Own"}, "raise SystemExit(3)")
    model = write_model(tmp_path / "model", LLAMA)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*arguments):
        script = "import sys; from vllm_kvcompress.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-P", "-c", script, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    plan = run("plan", model, "--kv-compress", "value-norm", *SETTING)
    assert plan.returncode == 0, plan.stderr
    assert plan.stdout.startswith("setting  value-norm, keep 128 tokens, window 32 tokens")
    methods = run("methods")
    assert "value-norm: Norm of the values" in methods.stdout
    assert "warning: scorer 'own' of own-exit 1.0 cannot be imported" in methods.stdout
    refused = run("plan", model, "--kv-compress", "own", *SETTING)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--kv-compress: KV-compression scorer 'own' of own-exit 1.0 cannot" in refused.stderr
