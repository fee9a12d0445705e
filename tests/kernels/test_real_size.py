"""What scripts/gpu/check_real_size.py checks on a GPU: that it runs here, and sees faults."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu import check_real_size
from gpu.real_size import decode
from gpu.real_size.rows import Rows, deal_blocks, draw_rows, fill_pool
from paged_pool import DEVICE

from vllm_kvcompress import ops
from vllm_kvcompress.ops import RowDescriptor
from vllm_kvcompress.ops.rows_reference import stream_tokens

SCRIPT = Path(check_real_size.__file__)
CPU = torch.device("cpu")
TINY = check_real_size.tiny_sizes()
OPS = (
    "decode_work",
    "ragged_decode",
    "window_scores",
    "paged_value_effect",
    "join_scores",
    "joint_page_counts",
    "select_entries",
    "compact",
    "token_slots",
    "move_entries",
)


@pytest.fixture
def reference(monkeypatch):
    """The ops are the references, which are fast at this size, and right."""

    def judged(op: Callable) -> Callable:
        return lambda *args, **options: op(*args, **{**options, "backend": "reference"})

    for name in OPS:
        monkeypatch.setattr(ops, name, judged(getattr(ops, name)))
    monkeypatch.setattr(check_real_size.PromptCases, "compiled", lambda self: passed())


def passed() -> check_real_size.Verdict:
    verdict = check_real_size.Verdict()
    verdict.expect(True, "")
    return verdict


def run_all() -> dict[str, check_real_size.Verdict]:
    return {name: run() for name, run in check_real_size.cases(TINY, CPU)}


def failing() -> set[str]:
    return {name for name, verdict in run_all().items() if not verdict.ok}


def tiny_rows(batch: int = 9, num_idle: int = 2) -> tuple[Rows, torch.Tensor]:
    shape = TINY.shape
    generator = torch.Generator().manual_seed(batch)
    hand = deal_blocks(120, 2, 0.75, generator)[1]
    rows = draw_rows(batch, num_idle, shape, hand, 60, generator)
    pool = check_real_size.new_pool(shape, 120, torch.bfloat16, CPU)
    fill_pool(pool, [rows], seed=0)
    return rows, pool


def test_rows_are_numbers_where_the_reference_reads_and_nan_elsewhere():
    rows, pool = tiny_rows()
    is_owned = torch.zeros(pool.shape[:2], dtype=torch.bool)
    lens = rows.num_tokens()
    kinds = set()
    for r in range(rows.num_active):
        numbers = (tensor[r].tolist() for tensor in rows.tensors[:3])
        descriptor, offsets, table = numbers
        descriptor = RowDescriptor(*descriptor)
        kinds.add(descriptor.num_region_blocks > 0)
        for stream in range(rows.num_streams):
            arguments = (descriptor, offsets, table, stream, rows.num_streams, rows.block_size)
            places, num_region_tokens = stream_tokens(*arguments)
            assert [int(x[r, stream]) for x in lens] == [num_region_tokens, len(places)]
            index = torch.arange(len(places))
            where = (torch.full_like(index, r), torch.full_like(index, stream), index)
            assert list(zip(*(x.tolist() for x in rows.places(*where)), strict=True)) == places
            for page, slot in places:
                assert not is_owned[page, slot]
                is_owned[page, slot] = True
    assert kinds == {True, False}
    assert torch.equal(pool.isfinite().all(dim=2), is_owned)
    assert torch.equal(pool.isnan().all(dim=2), ~is_owned)


def test_the_last_blocks_of_the_pool_are_dealt():
    hands = deal_blocks(50, 2, 0.8, torch.Generator().manual_seed(0))
    assert [int(hand[0]) for hand in hands] == [49, 48]
    dealt = torch.cat(hands)
    assert len(dealt.unique()) == len(dealt) == 40 and int(dealt.min()) > 0
    rows, _ = tiny_rows()
    row, stream = decode.owner_of_last_block(rows)
    length = int(rows.num_tokens()[1][row, stream])
    index = torch.arange(length)
    pages, _ = rows.places(torch.full_like(index, row), torch.full_like(index, stream), index)
    assert int(pages.max()) == 118 * rows.num_streams + rows.num_streams - 1


def test_the_references_pass(reference):
    verdicts = run_all()
    assert {name: verdict.faults for name, verdict in verdicts.items() if not verdict.ok} == {}
    assert len(verdicts) == 15


def changed_decode(change: Callable) -> Callable:
    """A decode op that is given other rows: fields of a dict are changed by `change`."""
    right = ops.ragged_decode

    def op(query, pool, rows, layer, logits, **options):
        given = {
            "rows": rows.descriptors.clone(),
            "offsets": rows.page_offsets.clone(),
            "table": rows.block_table.clone(),
            "layer": layer,
            "scale": logits.scale,
        }
        change(given)
        rows = ops.Rows(given["rows"], given["table"], given["offsets"], rows.query_start_loc)
        return right(query, pool, rows, given["layer"], ops.Logits(given["scale"]), **options)

    return op


def one_more(given: dict) -> None:
    given["rows"][:, 0] += 1


def one_less(given: dict) -> None:
    given["rows"][:, 0].sub_(1).clamp_(min=1)


def first_page_missing(given: dict) -> None:
    offsets = given["offsets"]
    offsets[:, :-1] += offsets.diff(dim=1) > 0


def blocks_wrap(given: dict) -> None:
    given["table"] %= 32


def other_layer(given: dict) -> None:
    given["layer"] = 1 - given["layer"]


def wrong_scale(given: dict) -> None:
    given["scale"] *= 1.1


DECODE_FAULTS = [one_more, one_less, first_page_missing, blocks_wrap, other_layer, wrong_scale]


@pytest.mark.parametrize("fault", DECODE_FAULTS)
def test_a_decode_that_reads_wrongly_is_noticed(reference, monkeypatch, fault):
    monkeypatch.setattr(ops, "ragged_decode", changed_decode(fault))
    names = {name for name, _ in check_real_size.cases(TINY, CPU) if name.startswith("decode")}
    assert failing() == names


def test_a_decode_that_writes_rows_without_queries_is_noticed(reference, monkeypatch):
    right = ops.ragged_decode

    def op(*args, out, **options):
        right(*args, out=out, **options)
        out.nan_to_num_(nan=0.0)
        return out

    monkeypatch.setattr(ops, "ragged_decode", op)
    assert {"decode, batch 5"} <= failing()


def test_a_replay_of_old_rows_is_noticed(reference, monkeypatch):
    def capture(step: decode.Step) -> Callable[[], None]:
        old = step.rows.clone()

        def replay() -> None:
            now, step.rows = step.rows, old
            decode.decode_layers(step)
            step.rows = now

        return replay

    monkeypatch.setattr(decode, "capture", capture)
    assert failing() == {name for name, _ in check_real_size.cases(TINY, CPU) if "graph" in name}


def scaled(name: str, factor: float) -> Callable:
    right = getattr(ops, name)
    return lambda *args, **options: right(*args, **options) * factor


def without_near_tokens(*args, right=ops.window_scores, **options):
    *args, plan = args
    plan = dataclasses.replace(plan, near_tokens=0)
    return right(*args, plan, **{**options, "backend": "reference"})


def late_entries(*args, right=ops.select_entries, **options):
    """The last instead of the first of equal entries, and so other ones."""
    offsets, indices = right(*args, **{**options, "backend": "reference"})
    return offsets, (indices - 1).clamp(min=0)


def one_page_elsewhere(*args, right=ops.joint_page_counts, **options):
    counts = right(*args, **{**options, "backend": "reference"})
    counts[:, 0] += 1
    counts[:, counts[0, 1:].argmax() + 1] -= 1
    return counts


def copies_too_much(pool, *args, right=ops.compact, **options):
    right(pool, *args, **{**options, "backend": "reference"})
    # Of a block that is nobody's.
    pool.pages.view(torch.int16)[0, 0, 0] += 1


def copies_nothing(*args, **options):
    pass


def dense_slots(rows, *args, right=ops.token_slots, **options):
    """As vLLM counts them: it knows nothing of regions."""
    descriptors = rows.descriptors.clone()
    descriptors[:, 1:] = 0
    return right(
        dataclasses.replace(rows, descriptors=descriptors),
        *args,
        **{**options, "backend": "reference"},
    )


SCORES = "scores of sampled layers"
OTHER_FAULTS = [
    ("window_scores", lambda: scaled("window_scores", 1.0001), {SCORES}),
    ("window_scores", lambda: without_near_tokens, {SCORES}),
    ("paged_value_effect", lambda: scaled("paged_value_effect", 1.0001), {SCORES}),
    ("join_scores", lambda: scaled("join_scores", 1.0001), {SCORES}),
    ("select_entries", lambda: late_entries, {"selection", "selection and compaction by tokens"}),
    (
        "joint_page_counts",
        lambda: one_page_elsewhere,
        {"selection", "selection and compaction by tokens"},
    ),
    ("compact", lambda: copies_too_much, {"compressed", "selection and compaction by tokens"}),
    ("compact", lambda: copies_nothing, {"compressed", "selection and compaction by tokens"}),
    ("token_slots", lambda: dense_slots, {"slots of new tokens"}),
    ("move_entries", lambda: copies_nothing, {"pages moved"}),
]


@pytest.mark.parametrize(
    ("op", "fault", "cases"),
    OTHER_FAULTS,
    ids=[f"{op}-{i}" for i, (op, *_) in enumerate(OTHER_FAULTS)],
)
def test_a_fault_of_another_op_is_noticed(reference, monkeypatch, op, fault, cases):
    monkeypatch.setattr(ops, op, fault())
    names = failing()
    for case in cases:
        assert any(case in name for name in names), (case, names)
    assert not any(name.startswith("decode") for name in names)


def check_tiny(tmp_path: Path, **options) -> tuple[int, list[dict]]:
    out = tmp_path / "rows.json"
    arguments = argparse.Namespace(**{"out": out, "limit": None, **options})
    status = check_real_size.check_all(arguments, TINY, CPU)
    return status, json.loads(out.read_text())["rows"]


def test_nothing_is_started_once_time_is_up(reference, tmp_path):
    status, rows = check_tiny(tmp_path, limit=1e-9)
    assert status == 0
    assert len(rows) == 15 and all(row["ok"] is None for row in rows)


@pytest.mark.parametrize(("is_wrong", "raises", "status"), [(1, 0, 1), (0, 1, 4), (1, 1, 5)])
def test_exit_status_says_what_failed(reference, monkeypatch, tmp_path, is_wrong, raises, status):
    if is_wrong:
        monkeypatch.setattr(ops, "token_slots", dense_slots)
    if raises:
        monkeypatch.delattr(ops, "window_scores")
    found, rows = check_tiny(tmp_path)
    assert found == status
    assert any("error" in row for row in rows) == raises
    assert any(row.get("num_faults") for row in rows) == is_wrong


@pytest.mark.slow
def test_dry_run(tmp_path):
    """All of it in the interpreter, from a command line."""
    out = tmp_path / "rows.json"
    command = [sys.executable, "-P", str(SCRIPT), "--dry-run", "--out", str(out)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) >= 14 and all(row["ok"] for row in rows)


@pytest.mark.gpu
def test_real_size_on_this_gpu(tmp_path):
    arguments = argparse.Namespace(out=tmp_path / "rows.json", limit=None)
    assert check_real_size.check_all(arguments, check_real_size.real_sizes(6.0), DEVICE) == 0
