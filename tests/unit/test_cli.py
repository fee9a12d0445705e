"""The command `vllm-kvcompress`: lists, arguments, text, picture and processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cli_runs import BLOCK_BYTES, LLAMA, SETTING, one_line_error, published_pages, write_model

from vllm_kvcompress import KVCompressConfig
from vllm_kvcompress.cli import main, planning
from vllm_kvcompress.cli.methods import NEEDS
from vllm_kvcompress.config import DEFAULT_METHOD
from vllm_kvcompress.policies import base, scorer_class
from vllm_kvcompress.policies.builtin import budgets_class
from vllm_kvcompress.policies.method_options import option_specs, pair_problem
from vllm_kvcompress.policies.recipes import BUDGETS, RECIPES


@pytest.fixture(autouse=True)
def installed_for_cuda(monkeypatch):
    """Numbers of these tests are those of blocks of 16, whatever vLLM there is."""
    monkeypatch.setattr(planning, "installed_platform", lambda: "CUDA")


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", LLAMA)


# methods


def test_every_method_is_listed_with_every_option(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    entries = dict(zip(RECIPES, split_entries(out), strict=True))
    for name, recipe in RECIPES.items():
        entry = " ".join(entries[name].split())
        assert entry.startswith(
            f"{name}: {recipe.summary} {recipe.paper} window: {recipe.window}; options: "
        )
        for option, spec in option_specs(recipe).items():
            assert f"{option}={json.dumps(spec.default)}".replace('"', "") in entry
        refused = [budgets for budgets in BUDGETS if pair_problem(recipe.scorer, budgets)]
        assert (f"refuses budgets {', '.join(refused)}" in entry) == bool(refused)
        assert not recipe.weakness or f" it {recipe.weakness}" in entry
    for name in BUDGETS:
        assert f"  {name:<12} {budgets_class(name).summary}" in out


def split_entries(listing):
    entries = []
    for line in listing.partition("\n\n")[0].splitlines():
        if line.startswith(" "):
            entries[-1] += line
        else:
            entries.append(line)
    return entries


@pytest.mark.parametrize("name", RECIPES)
def test_one_method_in_detail(capsys, name):
    assert main(["methods", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    recipe = RECIPES[name]
    assert lines[0] == f"{name}: {recipe.summary}"
    assert lines[1] == f"source: {recipe.paper}"
    for need in scorer_class(recipe.scorer).needs:
        assert NEEDS[need] in lines[2]
    assert lines[3] == f"scores: {recipe.scorer}"
    forms = [line for line in lines if line.startswith("option 'published' set to true: ")]
    if recipe.published is None:
        assert not forms
    else:
        (form,), paper = forms, KVCompressConfig(name, options=(("published", True),))
        assert f"scores: {paper.recipe.scorer}; window: {paper.window}" in form
        own = dict(KVCompressConfig(name).options)
        for option, value in paper.options:
            differs = option != "published" and (option not in own or own[option] != value)
            shown = json.dumps(value).strip('"')
            assert (f" {option}={shown}" in form) == differs
    for option, spec in option_specs(recipe).items():
        (line,) = [line for line in lines if line.split()[:1] == [option] and line[2] != " "]
        assert line.split()[1] == spec.kind.__name__
        assert line.split()[2] == json.dumps(spec.default).strip('"')
        for limit in (spec.minimum, spec.maximum):
            assert limit is None or str(limit) in line
        assert spec.help in lines[lines.index(line) + 1]
    for budgets in BUDGETS:
        problem = pair_problem(recipe.scorer, budgets)
        (line,) = [line for line in lines if line.startswith(f"  {budgets:<12} ")]
        assert line.endswith(f"refused: {problem}") == (problem is not None)
        assert line.endswith("(default)") == (budgets == recipe.budgets)


def test_options_that_come_with_other_budgets_are_explained(capsys):
    main(["methods", "snapkv"])
    lines = capsys.readouterr().out.splitlines()
    ada = next(i for i, line in enumerate(lines) if line.startswith("  ada "))
    assert lines[ada + 1].split() == ["alpha", "float", "0.2", "(0.0", "to", "1.0)"]
    static = next(i for i, line in enumerate(lines) if line.startswith("  static "))
    assert lines[static + 1].split() == ["table", "JSON", "must", "be", "given"]


def test_a_method_that_looks_at_all_queries_says_what_that_costs(capsys):
    main(["methods", "h2o"])
    assert "no prefix-cache hits" in capsys.readouterr().out
    main(["methods", "snapkv"])
    assert "no prefix-cache hits" not in capsys.readouterr().out


def test_every_need_has_words():
    assert set(NEEDS) == set(base.NEEDS)


def test_methods_as_json(capsys):
    assert main(["methods", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in entries] == list(RECIPES)
    for entry in entries:
        recipe = RECIPES[entry["name"]]
        assert set(entry["options"]) == set(option_specs(recipe))
        assert entry["needs"] == sorted(scorer_class(recipe.scorer).needs)
        assert {name: budgets["refused"] for name, budgets in entry["budgets"].items()} == {
            name: pair_problem(recipe.scorer, name) for name in BUDGETS
        }
    main(["methods", "tova", "--json"])
    assert json.loads(capsys.readouterr().out) == [e for e in entries if e["name"] == "tova"]


def test_an_unknown_method_is_refused_with_the_known_ones(capsys, model):
    for error in (
        one_line_error(capsys, "methods", "snapkw"),
        one_line_error(capsys, "plan", model, "--kv-compress", "snapkw", "--prompt-len", "9"),
    ):
        assert "method 'snapkw' (did you mean 'snapkv'?); known: snapkv, pyramidkv, " in error


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "{model}"])
def test_a_model_in_the_place_of_a_method(capsys, model, name):
    name = name.format(model=model)
    error = one_line_error(capsys, "plan", "--kv-compress", name, "--prompt-len", "9")
    assert f"'{name}' looks like a model, not a KV-compression method; put MODEL before " in error
    error = one_line_error(capsys, "plan", "--kv-compress", "gpt2", "--prompt-len", "9")
    assert "method 'gpt2'; known: " in error
    assert error.endswith("; if it is the model, put MODEL before --kv-compress\n")


def test_settings_without_a_method_mean_the_default_one(capsys, model):
    outputs = []
    for method in ((), ("--kv-compress",), ("--kv-compress", DEFAULT_METHOD)):
        assert main(["plan", model, *method, *SETTING]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0].startswith(f"setting  {DEFAULT_METHOD}, keep 128 tokens")


# plan: arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "plan needs --kv-compress or --kv-compress-budget or --kv-compress-ratio"),
        (
            ("--kv-compress", "h2o", "--kv-compress-budget", "40"),
            "budget 40 is smaller than the tokens always kept plus one page (32 + 16 = 48 tokens)",
        ),
        (
            ("--kv-compress", "snapkv", "--kv-compress-budget", "64", "--kv-compress-ratio", "0.5"),
            "budget (64) and ratio (0.5) exclude each other; give one",
        ),
        (("--kv-compress", "snapkv", "--kv-compress-ratio", "1.5"), "must be in [0, 1)"),
        (("--kv-compress", "snapkv", "--kv-compress-options", "{"), "not valid JSON"),
        (("--kv-compress", "snapkv", "--kv-compress-options", '{"x": 1}'), "unknown option 'x'"),
        (
            ("--kv-compress", "tova", "--kv-compress-options", '{"budgets": "ada"}'),
            "scorer 'tova' cannot be combined with budgets 'ada'",
        ),
        (("--kv-compress", "snapkv", "--kv-cache-dtype", "fp8"), "invalid choice: 'fp8'"),
        (("--kv-compress", "snapkv", "--pool", "lots"), "not a size: 'lots'"),
        (
            ("--kv-compress", "snapkv", "--pool", str(2 * BLOCK_BYTES - 1)),
            "a --pool of 8.0 KiB has no room for a block of 4.0 KiB beside vLLM's null block; give "
            "at least 8.0 KiB",
        ),
        (("--kv-compress", "snapkv", "--pool", "0"), "a --pool of 0.0 KiB has no room for"),
        (
            ("--kv-compress", "snapkv", "--output-len", "1549"),
            "a prompt of 500 tokens and 1549 of output are 2049 tokens, but the model takes 2048; "
            "give a smaller --prompt-len or --output-len",
        ),
        (("--kv-compress", "snapkv", "--pool", "1e9"), "not a size"),
        (("--kv-compress", "snapkv", "--block-size", "0"), "block size must be a whole number"),
        (("--kv-compress", "snapkv", "--output-len", "-1"), "output length must be a whole"),
        (("--kv-compress", "snapkv", "--prompt-len", "0"), "prompt length must be a whole number"),
        (("--kv-compress", "snapkv", "--tensor-parallel-size", "0"), "must be a whole number"),
    ],
)
def test_arguments_that_cannot_work(capsys, model, arguments, message):
    assert message in one_line_error(capsys, "plan", model, "--prompt-len", "500", *arguments)


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "of the vLLM installed here takes, 32 on CPU, 16 on CUDA)" in out
    for flag in ("", "-budget", "-ratio", "-window", "-options"):
        assert f"--kv-compress{flag} " in out


# plan: text and picture


PUBLISHED_PAGES = published_pages()


def test_text(capsys, model):
    flags = (*SETTING, *PUBLISHED_PAGES, "--pool", str(94 * BLOCK_BYTES))
    assert main(["plan", model, "--kv-compress", "pyramidkv", *flags]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "setting  pyramidkv, keep 128 tokens, window 32 tokens",
        "model    4 layers, 2 KV heads, head size 8, bfloat16",
        "block    16 tokens of all layers and heads, 4.0 KiB",
        "pool     376.0 KiB, 93 blocks beside vLLM's null block",
        "",
        "prompt  output    asked to keep             kept  region  tail, output  uncompressed",
        "tokens  tokens  tokens per head  tokens per head  blocks        blocks        blocks",
        "   500     100              128              116       5             9            38",
        "",
        "prompt  compressed  uncompressed   saved  in prefill  compressed  uncompressed",
        "tokens      memory        memory  memory      memory    fit pool      fit pool",
        "   500    56.0 KiB     152.0 KiB   63.2%   148.0 KiB           5             2",
        "Fitting: one request in prefill, the others at the end of their output.",
        "",
        "prompt of 500 tokens: 40 pages in the region, 5 per KV head on average",
        "  budgets pyramid: falls linearly from the first to last layer",
        "  pages of every KV head: 10, 6, 3, 1",
    ]


@pytest.mark.parametrize(
    ("method", "flags", "line"),
    [
        ("snapkv", PUBLISHED_PAGES, "pages of every KV head: 5 in every layer"),
        # The window takes fewer tokens by default, so that a page more is left.
        ("snapkv", (), "pages of every KV head: 6 in every layer"),
        ("pyramidkv", (), "pages of every KV head: 9, 7, 5, 3"),
        (
            "ada-snapkv",
            PUBLISHED_PAGES,
            "pages shared by the heads of a layer: 10 in every layer; one head gets 1 to 9 pages",
        ),
        (
            "ada-pyramidkv",
            PUBLISHED_PAGES,
            "pages shared by the heads of a layer: 20, 12, 6, 2; one head gets 1 to 18 pages",
        ),
        (
            "span",
            (),
            "decided by scores for all layers together; one head gets 1 to 30 pages",
        ),
        (
            "snapkv",
            ("--kv-compress-options", '{"budgets": "static", "table": [[3,1],[1,1],[1,1],[1,1]]}'),
            "pages per KV head on average: 9.5, 5 x 2, 4.5; one head gets 4 to 14 pages",
        ),
        ("snapkv", ("--kv-compress-budget", "500"), "prompt of 500 tokens: stays dense, nothing"),
        (
            "pyramidkv",
            ("--kv-compress-budget", "400"),
            "the prompt is shorter than twice what it keeps: no pyramid",
        ),
        ("snapkv", ("--tensor-parallel-size", "2"), "1 KV heads on each rank"),
    ],
)
def test_text_of_pages(capsys, model, method, flags, line):
    assert main(["plan", model, "--kv-compress", method, *SETTING, *flags]) == 0
    assert line in capsys.readouterr().out


def test_lines_are_broken_between_numbers(capsys, tmp_path):
    model = write_model(
        tmp_path / "model", {**LLAMA, "num_hidden_layers": 80, "max_position_embeddings": 8192}
    )
    outputs = []
    for method in ("pyramidkv", "ada-pyramidkv", "span"):
        flags = ("--kv-compress-budget", "500", "--prompt-len", "5000", "--pool", "80GiB")
        assert main(["plan", model, "--kv-compress", method, *flags]) == 0
        outputs.append(capsys.readouterr().out)
    assert " x 2, " in outputs[0]
    main(["methods"])
    outputs.append(capsys.readouterr().out)
    for line in "".join(outputs).splitlines():
        assert len(line) <= 100 and line.isascii()
        assert not line.lstrip().startswith("x ") and not line.endswith(" x")


@pytest.mark.parametrize("method", ["pyramidkv", "ada-snapkv", "span"])
def test_plot(capsys, model, tmp_path, method):
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    path = tmp_path / "plan.png"
    flags = ("--kv-compress-budget", "128", "--prompt-len", "50", "500", "900")
    arguments = ["plan", model, "--kv-compress", method, *flags]
    assert main([*arguments, "--plot", str(path)]) == 0
    drawn = capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 1000
    main(arguments)
    assert drawn == capsys.readouterr().out
    missing = str(tmp_path / "missing" / "plan.png")
    assert f"cannot write '{missing}': No such file" in one_line_error(
        capsys, *arguments, "--plot", missing
    )


@pytest.mark.parametrize(
    ("flags", "title"),
    [
        (("--kv-compress", "pyramidkv"), "region of every KV head"),
        (
            ("--kv-compress", "ada-pyramidkv"),
            "region: mean, and what scores can give to one KV head",
        ),
        (("--kv-compress", "span"), "region: mean, and what scores can give to one KV head"),
        (
            (
                *("--kv-compress", "snapkv", "--kv-compress-options"),
                '{"budgets": "static", "table": [[3,1],[1,1],[1,1],[1,1]]}',
            ),
            "region: mean over KV heads, and the least and most of them",
        ),
        (
            ("--kv-compress", "snapkv", "--kv-compress-budget", "1500"),
            "all prompts stay dense, nothing is evicted",
        ),
    ],
)
def test_titles_of_the_plot_fit_the_method(model, monkeypatch, flags, title):
    figure = drawn_figure(monkeypatch, model, *SETTING, *flags)
    assert figure.axes[0].get_title() == title
    kept = "1500" if "1500" in flags else "128"
    assert figure.get_suptitle() == f"{flags[1]}, keep {kept} tokens"


def test_legends_of_the_plot_hide_nothing(model, monkeypatch):
    flags = ("--kv-compress", "span", "--prompt-len", "500", "700", "900", "1100")
    figure = drawn_figure(monkeypatch, model, *SETTING, *flags)
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert not legend.overlaps(axes.get_window_extent())
        assert not legend.overlaps(axes.xaxis.label.get_window_extent())
        assert figure.bbox.contains(legend.x0, legend.y0)
        assert figure.bbox.contains(legend.x1, legend.y1)


def drawn_figure(monkeypatch, model, *flags):
    """The figure that a plan draws, laid out as it is saved."""
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    assert main(["plan", model, *flags, "--plot", "plan.png"]) == 0
    (figure,) = figures
    figure.draw_without_rendering()
    return figure


def test_plot_without_matplotlib(capsys, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    path = tmp_path / "plan.png"
    error = one_line_error(
        capsys, "plan", model, "--kv-compress", "snapkv", *SETTING, "--plot", str(path)
    )
    assert "--plot needs matplotlib: pip install 'vllm-kvcompress[plot]'" in error
    assert not path.exists()


def test_missing_transformers(capsys, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = one_line_error(capsys, "plan", model, "--kv-compress", "snapkv", *SETTING)
    assert error == "vllm-kvcompress: this needs transformers, which comes with vLLM\n"


# processes


def loaded_packages(*arguments):
    """Which of the large packages a command loads."""
    script = (
        "import atexit, sys; from vllm_kvcompress.cli import main;"
        "large = {'vllm', 'torch', 'transformers', 'matplotlib'};"
        "atexit.register(lambda: print(large & set(sys.modules)));"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-P", "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.splitlines()[-1]


def test_the_listing_loads_torch_alone():
    """The scorers' classes say what options there are."""
    assert loaded_packages("methods") == "{'torch'}"


@pytest.mark.parametrize(
    "arguments",
    [("plan", "--help"), ("methods", "snapkw"), ("plan", "x", "--kv-compress", "snapkw")],
)
def test_help_and_unknown_methods_load_nothing_large(arguments):
    assert loaded_packages(*arguments) == "set()"


def test_no_engine_is_loaded(model):
    loaded = loaded_packages("plan", model, "--kv-compress", "pyramidkv", *SETTING)
    assert "vllm" not in loaded and "matplotlib" not in loaded
    assert "transformers" in loaded
    assert loaded_packages("methods", "h2o") == "{'torch'}"


def installed_script():
    script = Path(sysconfig.get_path("scripts")) / "vllm-kvcompress"
    assert script.exists(), "install the package again: pip install --no-deps -e ."
    return str(script)


def test_the_installed_command(model):
    command = [installed_script(), "plan", model, "--kv-compress", "snapkv", *SETTING, "--json"]
    command += ["--block-size", "16"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["requests"][0]["held_blocks"] == 14
    command[4] = "nothing"
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("vllm-kvcompress plan: error: argument --kv-compress: unknown ")
    assert result.stderr.count("\n") == 1


def test_a_reader_that_stops_is_no_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        result = subprocess.run(
            [installed_script(), "methods"], stdout=write_end, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(write_end)
    assert (result.returncode, result.stderr) == (0, "")
