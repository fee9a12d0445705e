"""What benchmarks/serving/measure.py makes of its command line and runs; no server is started."""

from __future__ import annotations

import csv
import json
import shlex

import pytest
from serving import measure, report
from serving.variants import Variant

from vllm_kvcompress.config import KVCompressConfig, KVCompressConfigError


def run(variant, speed, input_len=500, pool="2.5", **result):
    values = {key: 1.0 for key in report.MEASURES.values()}
    return {
        "input_len": input_len,
        "output_len": 100,
        "pool": pool,
        "pool_tokens": 1500,
        "variant": variant,
        "removed": 0.0,
        "block_size": 16,
        "result": {**values, "output_throughput": speed, **result},
    }


def test_variants_become_flags_that_the_plugin_reads():
    assert Variant.parse("stock").flags() == []
    assert Variant.parse("stock@128").block_size == 128
    variant = Variant.parse("snapkv:one_shot=never,window=16@0.875")
    flags = variant.flags()
    assert variant.ratio == 0.875
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    config = KVCompressConfig.from_dict(
        {
            "method": given["--kv-compress"],
            "ratio": float(given["--kv-compress-ratio"]),
            "window": int(given["--kv-compress-window"]),
            "options": json.loads(given["--kv-compress-options"]),
        }
    )
    assert config.option("one_shot") == "never"
    assert (config.window, config.ratio) == (16, 0.875)


def test_variants_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="does not say how much"):
        Variant.parse("span")
    with pytest.raises(KVCompressConfigError):
        Variant.parse("nosuchmethod@0.5")


@pytest.mark.parametrize(
    ("pool", "tokens"), [("2.5", 2500), ("1.0005", 1001), ("8", 8000), ("auto", None)]
)
def test_pools_are_given_in_dense_requests(pool, tokens):
    assert measure.pool_tokens(pool, 1000) == tokens


def test_every_variant_gets_the_same_pool_in_tokens(monkeypatch):
    command = (
        "bench --model m --out o --variants stock@128 span@0.5 --concurrency 4 --block-size 32"
    )
    monkeypatch.setattr("sys.argv", shlex.split(command))
    arguments = measure.parse_arguments()
    for variant, block_size in zip(arguments.variants, (128, 32), strict=True):
        size = variant.block_size or arguments.block_size
        flags = measure.server_flags(arguments, variant, size, 2500)
        assert flags[flags.index("--block-size") + 1] == str(block_size)
        num_blocks = int(flags[flags.index("--num-gpu-blocks-override") + 1])
        # Without vLLM's null block, rounded up.
        assert 0 <= (num_blocks - 1) * block_size - 2500 < block_size


def test_ratios_are_of_medians_within_a_cell():
    runs = [run("stock", speed) for speed in (10.0, 12.0, 11.0)]
    runs += [run("span@0.875", speed, preemptions=p) for speed, p in ((20, 0), (24, 2), (22, 9))]
    runs += [run("stock", 100.0, pool="8"), run("span@0.875", 90.0, pool="8")]
    rows = {(row["pool"], row["variant"]): row for row in report.summarise(runs, "stock")}
    assert len(rows) == 4
    limited = rows["2.5", "span@0.875"]
    assert limited["output_tok_s"] == 22
    assert limited["ratio"] == 2
    assert limited["ratio_low"] == pytest.approx(20 / 12, abs=1e-4)
    assert limited["ratio_high"] == pytest.approx(2.4)
    assert (limited["preemptions"], limited["runs"]) == (2, 3)
    assert rows["8", "span@0.875"]["ratio"] == pytest.approx(0.9)
    assert rows["2.5", "stock"]["ratio"] == rows["8", "stock"]["ratio"] == 1


def test_decoding_counts_what_runs_at_once():
    stock = [run("stock", 1.0, peak_running=2, p50_itl_ms=itl) for itl in (50, 40, 80)]
    ours = [run("span@0.5", 1.0, peak_running=6, p50_itl_ms=60.0)]
    rows = {row["variant"]: row for row in report.summarise([*stock, *ours], "stock")}
    assert rows["stock"]["decode_tok_s"] == 40
    assert rows["span@0.5"]["decode_tok_s"] == 100
    assert (rows["stock"]["decode_ratio"], rows["span@0.5"]["decode_ratio"]) == (1, 2.5)


def test_results_are_written_as_table_and_picture(tmp_path):
    runs = [
        run(variant, speed, input_len, pool)
        for variant, speed in (("stock", 10.0), ("span@0.5", 15.0))
        for input_len in (500, 2000)
        for pool in ("2.5", "8")
    ]
    rows = report.summarise(runs, "stock")
    report.write(rows, {"device": "here"}, tmp_path / "out", "serving")
    with (tmp_path / "out/serving.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["ratio"]) for row in table if row["variant"] == "span@0.5"] == [1.5] * 4
    assert list(table[0]) == list(report.COLUMNS)
    stored = json.loads((tmp_path / "out/serving.json").read_text())
    assert stored["run"] == {"device": "here"} and len(stored["rows"]) == 8
    assert (tmp_path / "out/serving.png").read_bytes().startswith(b"\x89PNG")
