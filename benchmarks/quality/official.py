"""Readers of public benchmarks that the user has on disk: RULER, LongBench, GSM8K.

Nothing is downloaded. Prompts are the benchmarks' own; where a reader needs their prompt files,
they are read from the user's folder too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quality.families import Sample
from quality.metrics import parse_number

Reader = Callable[[Path, int, int], list[Sample]]

# RULER: how the question begins, by the start of the task's name; metric.
_RULER = {
    "niah": ("What ", "contains_all", 128),
    "vt": ("Question:", "contains_all", 30),
    "cwe": ("Question:", "contains_all", 120),
    "fwe": ("Question:", "contains_all", 50),
    "qa": ("Answer the question based on", "contains_any", 32),
}
# LongBench: metric by data set.
_LONGBENCH = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), "f1"
    ),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news"), "rouge_l"),
    "triviaqa": "first_line_f1",
    "samsum": "first_line_rouge_l",
    "trec": "first_line_classification",
    "passage_retrieval_en": "retrieval",
    "passage_count": "count",
    **dict.fromkeys(("lcc", "repobench-p"), "code_similarity"),
}
# Few-shot and code prompts, which LongBench gives without a chat template.
_LONGBENCH_RAW = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")
_GSM8K_SHOTS = 8


def _fail(message: str) -> SystemExit:
    return SystemExit(f"evaluate: {message}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _fail(f"{path} is not UTF-8 (byte {error.start})") from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Not splitlines(): texts may hold other line separators of Unicode.
    for line_number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _fail(f"{path}, line {line_number} is not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise _fail(f"{path}, line {line_number} is not an object but {line.strip()[:40]!r}")
        rows.append(row)
    if not rows:
        raise _fail(f"{path} is empty")
    return rows


def _field(row: dict[str, Any], name: str, path: Path) -> Any:
    if name not in row:
        raise _fail(f"{path}: a row has no field {name!r}; it has {', '.join(sorted(row))}")
    return row[name]


def _references(row: dict[str, Any], name: str, path: Path) -> tuple[str, ...]:
    references = _field(row, name, path)
    if not isinstance(references, list) or not references:
        raise _fail(f"{path}: field {name!r} is {references!r}, not a list of answers")
    return tuple(map(str, references))


def _some(rows: list[Any], count: int, seed: int) -> list[Any]:
    return random.Random(seed).sample(rows, min(count, len(rows)))


def read_ruler(folder: Path, count: int, seed: int) -> list[Sample]:
    """RULER's generated data: TASK/validation.jsonl with index, input, outputs.

    Data made with RULER's template 'base': the model's own chat template is put around it here.

    Args:
        folder: that holds one folder per task, e.g. niah_single_1, vt, cwe, qa_1.
        count: samples of each task, drawn by the seed.
        seed: of the draw.

    Raises:
        SystemExit: naming what is missing or wrong.
    """
    samples = []
    files = sorted(folder.glob("*/validation.jsonl"))
    if not files:
        raise _fail(f"{folder} holds no TASK/validation.jsonl of RULER")
    for path in files:
        task = path.parent.name
        kind = next((kind for kind in _RULER if task.startswith(kind)), None)
        if kind is None:
            raise _fail(f"{path}: unknown RULER task {task!r}; known: {', '.join(_RULER)}")
        opening, metric, max_new_tokens = _RULER[kind]
        for row in _some(_read_lines(path), count, seed):
            text = _field(row, "input", path)
            start = text.rfind(opening)
            if start <= 0:
                raise _fail(f"{path}: no question that begins with {opening!r} in a row's input")
            samples.append(
                Sample(
                    task=f"ruler-{task}",
                    sample_id=str(_field(row, "index", path)),
                    context=text[:start],
                    question=text[start:] + row.get("answer_prefix", ""),
                    answers=_references(row, "outputs", path),
                    metric=metric,
                    max_new_tokens=max_new_tokens,
                    meta=(("length", row.get("length", 0)),),
                    joint="",
                )
            )
    return samples


def read_longbench(folder: Path, count: int, seed: int) -> list[Sample]:
    """LongBench: data/NAME.jsonl with its own prompts in config/dataset2prompt.json.

    Args:
        folder: with data/ and config/ (dataset2prompt.json, dataset2maxlen.json).
        count: samples of each data set, drawn by the seed.
        seed: of the draw.

    Raises:
        SystemExit: naming what is missing or wrong.
    """
    prompts, lengths = (
        _read_json(folder / "config" / f"dataset2{name}.json") for name in ("prompt", "maxlen")
    )
    samples = []
    for name, metric in _LONGBENCH.items():
        path = folder / "data" / f"{name}.jsonl"
        if not path.exists():
            continue
        if name not in prompts or name not in lengths:
            raise _fail(f"{folder}/config names no prompt or length for {name!r}")
        before, marker, after = prompts[name].partition("{context}")
        if not marker:
            raise _fail(f"{folder}/config/dataset2prompt.json: {name!r} has no {{context}}")
        for i, row in enumerate(_some(_read_lines(path), count, seed)):
            question = _field(row, "input", path)
            answers = _references(row, "answers", path)
            if name == "trec":
                # This metric compares the one answer with all classes.
                answers = answers[:1] + _references(row, "all_classes", path)
            samples.append(
                Sample(
                    task=f"longbench-{name}",
                    sample_id=str(row.get("_id", i)),
                    context=before.replace("{input}", question) + _field(row, "context", path),
                    question=after.replace("{input}", question),
                    answers=answers,
                    metric=metric,
                    max_new_tokens=lengths[name],
                    meta=(("length", row.get("length", 0)),),
                    joint="",
                    chat=name not in _LONGBENCH_RAW,
                )
            )
    if not samples:
        raise _fail(f"{folder}/data holds none of LongBench's {', '.join(_LONGBENCH)}")
    return samples


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise _fail(f"{path} is missing; it comes with LongBench")
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise _fail(f"{path} is not JSON ({error.msg})") from None


def read_gsm8k(folder: Path, count: int, seed: int) -> list[Sample]:
    """GSM8K: test.jsonl, with worked examples from train.jsonl as the context.

    Args:
        folder: with both files.
        count: samples, drawn by the seed.
        seed: of the draw.

    Raises:
        SystemExit: naming what is missing or wrong.
    """
    files = {name: folder / f"{name}.jsonl" for name in ("train", "test")}
    for path in files.values():
        if not path.exists():
            raise _fail(f"{path} of GSM8K is missing")
    shots = _some(_read_lines(files["train"]), _GSM8K_SHOTS, seed)
    context = "\n\n".join(
        f"Question: {_field(row, 'question', files['train'])}\n"
        f"Answer: {_field(row, 'answer', files['train'])}"
        for row in shots
    )
    samples = []
    for i, row in enumerate(_some(_read_lines(files["test"]), count, seed)):
        _, marker, answer = _field(row, "answer", files["test"]).rpartition("####")
        if not marker:
            raise _fail(f"{files['test']}: an answer has no '####' before its number")
        try:
            parse_number(answer.strip())
        except ValueError:
            raise _fail(f"{files['test']}: no number but {answer.strip()!r} after '####'") from None
        samples.append(
            Sample(
                task="gsm8k",
                sample_id=f"{seed}-{i}",
                context=context,
                question=f"Question: {_field(row, 'question', files['test'])}\nAnswer:",
                answers=(answer.strip(),),
                metric="number",
                max_new_tokens=256,
            )
        )
    return samples


READERS: dict[str, Reader] = {
    "ruler": read_ruler,
    "longbench": read_longbench,
    "gsm8k": read_gsm8k,
}
