"""Settings, stored results and tables of the quality benchmark, on rows worked by hand."""

from __future__ import annotations

import csv
import json

import pytest
from quality.intervals import bootstrap, wilson
from quality.kvpress_results import add_kvpress_results
from quality.plan import Prompt
from quality.settings import Method, parse_methods
from quality.store import KEY, Store
from quality.summary import ALL_TASKS, summarise, write_csv, write_json
from quality.tables import write_tables
from quality.tasks import Rendered, Sample

from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.policies.recipes import RECIPES


def result(method="span", ratio=0.5, task="needle", sample_id="1-0", **rest):
    row = {
        "engine": "vllm-kvcompress",
        "model": "m",
        "method": method,
        "ratio": ratio,
        "mode": "aware",
        "block_size": 16,
        "seed": 1,
        "task": task,
        "sample_id": sample_id,
        "prompt_len": 1000,
        "suffix_tokens": 0,
        "kept_tokens": 500.0,
    }
    return {**row, **rest}


def test_method_is_read_with_options_and_window():
    method = Method.parse("span:window=16,span_kernel=5,granularity=token,value_norm=false")
    assert (method.name, method.window) == ("span", 16)
    assert method.options == {"span_kernel": 5, "granularity": "token", "value_norm": False}
    config = KVCompressConfig.from_dict(method.setting(0.75, suffix_tokens=9))
    assert (config.ratio, config.window) == (0.75, 16)
    assert config.option("suffix_tokens") == 9
    assert config.option("span_kernel") == 5


def test_method_with_wrong_option_is_refused():
    with pytest.raises(KVCompressConfigError, match="unknown option 'nope'"):
        Method.parse("span:nope=1")


def test_all_methods_are_every_recipe_once():
    methods = parse_methods("all snapkv; span:floor=0.1")
    assert [m.label for m in methods] == [*RECIPES, "span:floor=0.1"]


def test_store_skips_what_is_there_after_reopening(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    Store(path).add([result(score=1.0)])
    store = Store(path)
    key = {name: result()[name] for name in KEY}
    assert store.has(**key)
    for name, other in (("ratio", 0.75), ("mode", "agnostic"), ("sample_id", "1-1"), ("seed", 2)):
        assert not store.has(**{**key, name: other})


def test_store_drops_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    Store(path).add([result(), result(sample_id="1-1")])
    whole = path.read_text()
    path.write_text(whole[:-20])
    store = Store(path)
    assert [row["sample_id"] for row in store.rows] == ["1-0"]
    store.add([result(sample_id="1-1")])
    assert path.read_text() == whole


def test_store_refuses_a_broken_line_in_the_middle(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"broken\n' + json.dumps(result()) + "\n")
    with pytest.raises(SystemExit, match="line 1 is not JSON"):
        Store(path)


def test_summary_has_scores_interval_full_cache_and_what_was_kept():
    rows = [result(sample_id=f"1-{i}", score=float(i < 3)) for i in range(4)]
    rows += [
        result("full", 0.0, sample_id=f"1-{i}", score=1.0, kept_tokens=1000.0) for i in range(4)
    ]
    rows += [
        result(task="qa_facts", sample_id="1-0", score=0.0, kept_tokens=300.0, suffix_tokens=200)
    ]
    out = {(r["method"], r["task"]): r for r in summarise(rows)}
    needle = out["span", "needle"]
    assert (needle["n"], needle["score"], needle["full_score"]) == (4, 0.75, 1.0)
    assert (needle["low"], needle["high"]) == wilson(3, 4)
    assert (needle["kept_asked"], needle["kept_fraction"], needle["kept_tokens"]) == (0.5, 0.5, 500)
    # Of the 800 tokens before the suffix, 100 are kept.
    assert out["span", "qa_facts"]["kept_fraction"] == pytest.approx(100 / 800)
    assert out["span", "qa_facts"]["full_score"] is None
    # Four needles and one fact: the full cache has no facts to compare with.
    assert ("span", ALL_TASKS) not in out
    rows += [result("full", 0.0, task="qa_facts", sample_id="1-0", score=0.5, kept_tokens=1000.0)]
    out = {(r["method"], r["task"]): r for r in summarise(rows)}
    overall = out["span", ALL_TASKS]
    assert (overall["n"], overall["score"], overall["full_score"]) == (5, 0.75 / 2, 1.5 / 2)
    # The fact has no spread.
    low, high = bootstrap([1.0, 1.0, 1.0, 0.0])
    assert overall["low"] == pytest.approx(low / 2, abs=0.13)
    assert overall["high"] == pytest.approx(high / 2, abs=0.13)


def test_summary_of_prose_has_kl_and_perplexity_and_no_score():
    rows = [
        result(task="prose", sample_id=f"passage-{i}", kl=kl, nll=nll)
        for i, (kl, nll) in enumerate([(0.1, 1.0), (0.3, 3.0)])
    ]
    rows.append(result("full", 0.0, task="prose", sample_id="passage-0", kl=0.0, nll=1.0))
    out = {r["method"]: r for r in summarise(rows)}
    assert out["span"]["kl"] == pytest.approx(0.2)
    assert out["span"]["kl_low"] == pytest.approx(0.1)
    assert out["span"]["kl_high"] == pytest.approx(0.3)
    assert out["span"]["perplexity"] == pytest.approx(7.389056, rel=1e-6)
    assert out["span"]["full_perplexity"] == pytest.approx(2.718282, rel=1e-6)
    assert "score" not in out["span"]
    assert ALL_TASKS not in {r["task"] for r in out.values()}


def test_methods_of_two_engines_keep_their_own_full_cache_score():
    rows = [
        result("full", 0.0, score=1.0),
        result(score=1.0),
        result("full", 0.0, engine="kvpress", block_size=1, score=0.0),
        result("snapkv", engine="kvpress", block_size=1, score=0.0),
    ]
    out = {(r["engine"], r["method"], r["task"]): r for r in summarise(rows)}
    assert out["vllm-kvcompress", "span", "needle"]["full_score"] == 1.0
    assert out["kvpress", "snapkv", "needle"]["full_score"] == 0.0


def test_tables_are_written(tmp_path):
    rows = summarise([result(score=1.0), result("full", 0.0, score=1.0)])
    write_csv(tmp_path / "q.csv", rows)
    write_json(tmp_path / "q.json", rows, {"seed": 1})
    with (tmp_path / "q.csv").open() as file:
        read = list(csv.DictReader(file))
    assert {(r["method"], r["task"]) for r in read} == {
        (m, t) for m in ("span", "full") for t in ("needle", ALL_TASKS)
    }
    data = json.loads((tmp_path / "q.json").read_text())
    assert data["run"] == {"seed": 1}
    assert len(data["rows"]) == 4


def prompt(task="needle", metric="contains_all", answers=("123",)):
    sample = Sample(task, "1-0", "context", "question", answers, metric, 8)
    return Prompt(sample, Rendered((1, 2, 3, 4), 2))


def kvpress_row(kind="answer", press="snapkv", ratio=0.5, mode="agnostic", **rest):
    row = {"kind": kind, "press": press, "ratio": ratio, "mode": mode, "id": "needle/1-0"}
    return {**row, "prompt_len": 4, "kept_tokens": 3.0, **rest}


def test_kvpress_answers_are_scored_and_added_once(tmp_path):
    path = tmp_path / "kvpress.jsonl"
    rows = [
        kvpress_row(text="it is 123", token_ids=[5]),
        kvpress_row("likelihood", mode="aware", id="passage-0", kl=0.5, nll=1.0),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = Store(tmp_path / "results.jsonl")
    common = {"model": "m", "seed": 1}
    assert add_kvpress_results(store, path, [prompt()], common) == 2
    assert add_kvpress_results(store, path, [prompt()], common) == 0
    answer, likelihood = store.rows
    assert (answer["engine"], answer["method"], answer["score"]) == ("kvpress", "snapkv", 1.0)
    assert (answer["suffix_tokens"], answer["kept_tokens"]) == (2, 3.0)
    assert (likelihood["task"], likelihood["sample_id"]) == ("prose", "passage-0")
    assert likelihood["kl"] == 0.5


def test_agreement_of_kvpress_is_with_its_own_full_cache(tmp_path):
    path = tmp_path / "kvpress.jsonl"
    rows = [
        kvpress_row(press="full", ratio=0.0, text="", token_ids=[7, 8, 9, 9], id="summary/1-0"),
        kvpress_row(text="", token_ids=[7, 8, 1, 9], id="summary/1-0"),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = Store(tmp_path / "results.jsonl")
    add_kvpress_results(
        store, path, [prompt("summary", "agreement", ())], {"model": "m", "seed": 1}
    )
    assert [row["score"] for row in store.rows] == [1.0, 0.5]


def test_kvpress_results_of_other_prompts_are_refused(tmp_path):
    path = tmp_path / "kvpress.jsonl"
    path.write_text(json.dumps(kvpress_row(text="", token_ids=[], id="needle/2-0")) + "\n")
    store = Store(tmp_path / "results.jsonl")
    with pytest.raises(SystemExit, match=r"needle/2-0.*not one of this run's"):
        add_kvpress_results(store, path, [prompt()], {"model": "m", "seed": 1})


def test_tables_show_every_method_the_best_first(tmp_path):
    rows = [result(sample_id=f"1-{i}", score=float(i < 3)) for i in range(4)]
    rows += [result("snapkv", sample_id=f"1-{i}", score=1.0) for i in range(4)]
    rows += [result("snapkv", 0.75, sample_id="1-0", score=0.0)]
    rows += [result("full", 0.0, sample_id=f"1-{i}", score=1.0) for i in range(4)]
    rows += [result(task="prose", sample_id="passage-0", kl=0.125, nll=1.0)]
    write_tables(tmp_path / "quality.md", summarise(rows))
    text = (tmp_path / "quality.md").read_text()
    needle = text.split("## ")[2].splitlines()
    low, high = wilson(3, 4)
    assert needle[0] == "needle, aware"
    assert needle[2] == "| method | 50.00% removed | 75.00% removed |"
    assert needle[4] == "| full cache (vllm-kvcompress) | 1.00, n = 4 | |"
    # More ratios first, then better ones.
    assert needle[5].startswith("| snapkv (vllm-kvcompress) | 1.00 [0.51, 1.00], 50.0% kept | 0.00")
    assert needle[6] == f"| span (vllm-kvcompress) | 0.75 [{low:.2f}, {high:.2f}], 50.0% kept |  |"
    assert "| span (vllm-kvcompress) | 0.1250 [0.1250, 0.1250], 50.0% kept |" in text


def test_heatmaps_keep_engines_apart(monkeypatch, tmp_path):
    plots = pytest.importorskip("quality.plots", reason="needs matplotlib")
    places = [{"length": 1024, "depth": depth} for depth in (0.25, 0.75)]
    rows = [
        result(method, ratio, engine=engine, sample_id=str(i), score=score, meta=place)
        for method, ratio, engine, score in (
            ("snapkv", 0.5, "vllm-kvcompress", 1.0),
            ("full", 0.0, "vllm-kvcompress", 1.0),
            ("snapkv", 0.5, "kvpress", 0.0),
            ("snapkv", 0.75, "kvpress", 1.0),
        )
        for i, place in enumerate(places)
    ]
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots.heatmaps(rows, 0.5, "aware", tmp_path / "map.png")
    panels = {a.get_title(): a.images[0].get_array().tolist() for a in figures[0].axes if a.images}
    assert panels == {
        "full": [[1.0], [1.0]],
        "snapkv": [[1.0], [1.0]],
        "snapkv (kvpress)": [[0.0], [0.0]],
    }
