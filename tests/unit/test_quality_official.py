"""Readers of RULER, LongBench and GSM8K, on small files made here."""

import json

import pytest
from quality.metrics import METRICS
from quality.official import READERS, read_gsm8k, read_longbench, read_ruler

NIAH = {
    "index": 3,
    "input": "Memorize this. What a day. One magic number is 81.\nWhat is the magic number?",
    "outputs": ["81"],
    "length": 4096,
    "answer_prefix": " The magic number is",
}
HOTPOT = {
    "_id": "h0",
    "input": "Who was it?",
    "context": "Passage 1: {not a field}\u2028It was Ada.",
    "answers": ["Ada", "Ada L."],
    "length": 20,
    "all_classes": None,
}
TREC = {
    "_id": "t0",
    "input": "Question: Where is it?\nType:",
    "context": "Question: When was it?\nType: Date",
    "answers": ["Place"],
    "length": 9,
    "all_classes": ["Date", "Place"],
}
PROMPTS = {
    "hotpotqa": "Answer from the passages.\n{context}\nQuestion: {input}\nAnswer:",
    "trec": "Tell the type.\n{context}\n{input}",
}
LENGTHS = {"hotpotqa": 32, "trec": 64}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    # As LongBench's own files: not escaped.
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_longbench(folder, **data):
    write_lines(folder / "config" / "dataset2prompt.json", [PROMPTS])
    write_lines(folder / "config" / "dataset2maxlen.json", [LENGTHS])
    for name, rows in data.items():
        write_lines(folder / "data" / f"{name}.jsonl", rows)


def write_gsm8k(folder, test=None):
    train = [{"question": f"train {i}?", "answer": f"because\n#### {i}"} for i in range(20)]
    write_lines(folder / "train.jsonl", train)
    write_lines(folder / "test.jsonl", test or [{"question": "q?", "answer": "so\n#### 1,250"}])


def test_ruler(tmp_path):
    write_lines(tmp_path / "niah_single_1" / "validation.jsonl", [NIAH])
    (sample,) = read_ruler(tmp_path, 5, seed=1)
    assert sample.task == "ruler-niah_single_1"
    assert sample.sample_id == "3"
    # The question is the last one that begins so, and the whole input is there.
    assert sample.question == "What is the magic number? The magic number is"
    assert sample.context + sample.joint + sample.question == NIAH["input"] + NIAH["answer_prefix"]
    assert sample.answers == ("81",)
    assert (sample.metric, sample.max_new_tokens) == ("contains_all", 128)


@pytest.mark.parametrize(
    ("task", "text", "metric", "max_new_tokens"),
    [
        ("vt", "VAR A = 1\nQuestion: which have 1?", "contains_all", 30),
        ("cwe", "a b\nQuestion: shot\nc d\nQuestion: which come most?", "contains_all", 120),
        ("fwe", "a b\nQuestion: which come most?", "contains_all", 50),
        ("qa_1", "Answer the question based on D. D\nAnswer the question based on D. Q", None, 32),
    ],
)
def test_ruler_tasks(tmp_path, task, text, metric, max_new_tokens):
    row = {"index": 0, "input": text, "outputs": ["A", "B"], "length": 9}
    write_lines(tmp_path / task / "validation.jsonl", [row])
    (sample,) = read_ruler(tmp_path, 1, seed=1)
    assert sample.context == text[: text.rindex("\n") + 1]
    assert sample.metric == (metric or "contains_any")
    assert sample.max_new_tokens == max_new_tokens


def test_ruler_draws_by_seed(tmp_path):
    rows = [{**NIAH, "index": i} for i in range(50)]
    write_lines(tmp_path / "niah_multikey_1" / "validation.jsonl", rows)
    drawn = [[s.sample_id for s in read_ruler(tmp_path, 5, seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(ids)) == 5 for ids in drawn)


def test_longbench(tmp_path):
    write_longbench(tmp_path, hotpotqa=[HOTPOT], trec=[TREC])
    samples = {sample.task: sample for sample in read_longbench(tmp_path, 5, seed=1)}
    hotpot, trec = samples["longbench-hotpotqa"], samples["longbench-trec"]
    assert hotpot.context == "Answer from the passages.\n" + HOTPOT["context"]
    assert hotpot.question == "\nQuestion: Who was it?\nAnswer:"
    assert hotpot.answers == ("Ada", "Ada L.")
    assert (hotpot.metric, hotpot.max_new_tokens, hotpot.chat) == ("f1", 32, True)
    # LongBench asks few-shot tasks without a chat template and scores their first line.
    assert (trec.max_new_tokens, trec.chat) == (64, False)
    assert METRICS[trec.metric]("Place\nQuestion: Date", trec.answers) == 1
    assert METRICS[trec.metric]("Date", trec.answers) == 0
    assert all(sample.joint == "" for sample in samples.values())


def test_gsm8k(tmp_path):
    write_gsm8k(tmp_path)
    (sample,) = read_gsm8k(tmp_path, 5, seed=1)
    assert sample.context.count("Question: train") == 8
    assert sample.context.count("#### ") == 8
    assert sample.question == "Question: q?\nAnswer:"
    assert sample.answers == ("1,250",)
    assert METRICS[sample.metric]("that makes 1250", sample.answers) == 1


def no_prompts(folder):
    write_longbench(folder, hotpotqa=[HOTPOT])
    (folder / "config" / "dataset2prompt.json").unlink()


def no_length(folder):
    write_longbench(folder, hotpotqa=[HOTPOT])
    write_lines(folder / "config" / "dataset2maxlen.json", [{}])


def no_place_for_the_context(folder):
    write_longbench(folder, hotpotqa=[HOTPOT])
    write_lines(folder / "config" / "dataset2prompt.json", [{"hotpotqa": "{input}"}])


def broken_prompts(folder):
    write_longbench(folder, hotpotqa=[HOTPOT])
    write_lines(folder / "config" / "dataset2prompt.json", ["{"])


def no_train(folder):
    write_gsm8k(folder)
    (folder / "train.jsonl").unlink()


def not_utf8(folder):
    write_gsm8k(folder)
    (folder / "test.jsonl").write_bytes(b'{"question": "\xff"}\n')


def ruler(*rows, task="niah_single_1"):
    return lambda folder: write_lines(folder / task / "validation.jsonl", rows)


BAD = {
    "no ruler": ("ruler", lambda folder: None, "holds no TASK/validation.jsonl"),
    "ruler task": ("ruler", ruler(NIAH, task="other"), "unknown RULER task 'other'"),
    "ruler json": ("ruler", ruler(NIAH, "{'index': 1}"), "line 2 is not JSON"),
    "ruler row": ("ruler", ruler("17"), "line 1 is not an object but '17'"),
    "ruler empty": ("ruler", ruler(""), "validation.jsonl is empty"),
    "ruler field": ("ruler", ruler({"index": 1, "outputs": ["1"]}), "no field 'input'"),
    "ruler outputs": ("ruler", ruler({**NIAH, "outputs": "81"}), "'outputs' is '81', not a list"),
    "ruler question": ("ruler", ruler({**NIAH, "input": "no such"}), "no question that begins"),
    "longbench prompts": ("longbench", no_prompts, "dataset2prompt.json is missing"),
    "longbench length": ("longbench", no_length, "no prompt or length for 'hotpotqa'"),
    "longbench place": ("longbench", no_place_for_the_context, "'hotpotqa' has no {context}"),
    "longbench json": ("longbench", broken_prompts, "dataset2prompt.json is not JSON"),
    "longbench data": ("longbench", write_longbench, "holds none of LongBench's"),
    "longbench answers": (
        "longbench",
        lambda folder: write_longbench(folder, hotpotqa=[{**HOTPOT, "answers": []}]),
        "'answers' is [], not a list",
    ),
    "longbench classes": (
        "longbench",
        lambda folder: write_longbench(folder, trec=[{**TREC, "all_classes": None}]),
        "'all_classes' is None, not a list",
    ),
    "gsm8k train": ("gsm8k", no_train, "train.jsonl of GSM8K is missing"),
    "gsm8k mark": (
        "gsm8k",
        lambda folder: write_gsm8k(folder, [{"question": "q", "answer": "7"}]),
        "no '####'",
    ),
    "gsm8k number": (
        "gsm8k",
        lambda folder: write_gsm8k(folder, [{"question": "q", "answer": "#### seven"}]),
        "no number but 'seven'",
    ),
    "gsm8k encoding": ("gsm8k", not_utf8, "is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused_in_one_line(tmp_path, case):
    reader, write, message = BAD[case]
    write(tmp_path)
    with pytest.raises(SystemExit) as refusal:
        READERS[reader](tmp_path, 5, 1)
    text = str(refusal.value)
    assert message in text
    assert str(tmp_path) in text
    assert "\n" not in text
