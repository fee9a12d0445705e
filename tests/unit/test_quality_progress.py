"""What a long quality run says while it goes on, by a clock that the test turns."""

from __future__ import annotations

import io

import pytest
from progress import Progress, duration
from quality import run
from quality.offline import Answer, Likelihood, _Counter
from quality.plan import Prompt
from quality.progress import RunProgress
from quality.settings import Method
from quality.store import Store
from quality.tasks import Rendered, Sample

METRIC = "contains_all"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (720, "12 min"), (5999, "100 min"), (12600, "3.5 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_lines_are_apart_and_the_last_is_never_missing(clock):
    out = io.StringIO()
    progress = Progress("work", 8, "samples", every_s=10, out=out, clock=clock)
    assert progress.left_s is None
    for _ in range(8):
        clock.now += 4
        progress.advance()
    assert out.getvalue().splitlines() == [
        "work: 3 of 8 samples, 12 s, about 20 s left",
        "work: 6 of 8 samples, 24 s, about 8 s left",
        "work: 8 of 8 samples, 32 s",
    ]


def test_progress_goes_to_stderr(capsys):
    Progress("work", 1, "samples").advance()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "work: 1 of 1 samples, 0 s\n")


def test_the_rest_of_a_run_is_estimated_from_settings_of_the_same_kind(clock):
    out = io.StringIO()
    progress = RunProgress(4, 8, 3, every_s=0, out=out, clock=clock)
    progress.start("full cache", 4, is_full=True)
    for _ in range(4):
        clock.now += 60
        progress.advance()
    # Of the compressed settings none is timed yet: a guess would be 15 times too long.
    assert progress.left_s() is None
    progress.finish()
    progress.start("span", 4)
    clock.now += 4
    progress.advance()
    assert progress.left_s() == 4 * 7
    clock.now += 12
    progress.advance(3)
    progress.finish()
    assert progress.left_s() == 4 * 4
    progress.start("snapkv", 0)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("3 settings, 12 samples to go, 4 of them with the full cache")
    assert lines[1:3] == [
        "[1/3] full cache: 4 samples",
        "[1/3] full cache: 1 of 4 samples, 60 s, about 3 min left, whole run: 60 s, "
        "rest not known yet",
    ]
    assert lines[7] == (
        "[2/3] span: 1 of 4 samples, 4 s, about 12 s left, whole run: 4 min, rest about 28 s"
    )
    assert lines[-1] == "[3/3] snapkv: there already"


class Engine:
    """Answers one prompt after the other, and says so."""

    def generate(self, prompts, max_new_tokens, setting, ended):
        for _ in prompts:
            ended(1)
        return [Answer((1,), "1", len(ids), 1.0) for ids in prompts]

    def likelihoods(self, passages, setting, ended):
        for _ in passages:
            ended(1)
        return [Likelihood(0.0, 1.0, 3, 1.0) for _ in passages]


@pytest.mark.parametrize("modes", [["aware"], ["agnostic"], ["aware", "agnostic"]])
def test_every_sample_of_a_run_is_counted_once(tmp_path, monkeypatch, capsys, modes):
    monkeypatch.setattr(run, "RunProgress", lambda *n: RunProgress(*n, every_s=0))
    prompts = [
        Prompt(
            Sample("needle", f"1-{i}", "context", "?", ("1",), METRIC, 4),
            Rendered((1, 2, 3), 1),
        )
        for i in range(2)
    ]
    common = {"engine": "e", "model": "m", "block_size": 16, "seed": 1}
    store = Store(tmp_path / "results.jsonl")
    evaluation = run.Evaluation(Engine(), store, prompts, [([1, 2, 3], [4])], common)
    evaluation.run([Method.parse("span")], [0.5, 0.75], modes)
    lines = capsys.readouterr().err.splitlines()
    num_modes, passages = len(modes), 2 if "aware" in modes else 0
    num_full = 2 * num_modes + 1
    total = num_full + 2 * 2 * num_modes + passages
    assert lines[0].startswith(
        f"{1 + 2 * num_modes} settings, {total} samples to go, {num_full} of"
    )
    assert f"[1/{1 + 2 * num_modes}] full cache: {num_full} of {num_full} samples" in "\n".join(
        lines
    )
    assert lines[-1].endswith("rest about 0 s")
    assert len([line for line in lines if " of " in line]) == 1 + total
    # A second run finds all there.
    run.Evaluation(Engine(), store, prompts, [([1, 2, 3], [4])], common).run(
        [Method.parse("span")], [0.5, 0.75], modes
    )
    again = capsys.readouterr().err.splitlines()
    assert again[0].startswith(f"{1 + 2 * num_modes} settings, 0 samples to go")
    assert all(line.endswith("there already") for line in again[1:])


def test_only_requests_that_ended_are_counted(capsys):
    ended = []
    for _ in _Counter(range(5), ended=ended.append, mininterval=0, desc="Rendering prompts"):
        pass
    bar = _Counter(ended=ended.append, total=3, desc="Processed prompts", dynamic_ncols=True)
    bar.update(2)
    bar.update(1)
    bar.close()
    assert ended == [2, 1]
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
