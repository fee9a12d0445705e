"""Scores of answers, each in [0, 1]: prediction and references in, number out."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

Metric = Callable[[str, Sequence[str]], float]

# A minus counts where it cannot be that of a subtraction.
_NUMBER = r"(?:(?<![\w)])-)?\d+(?:,\d{3})*(?:\.\d+)?"


def contains_all(prediction: str, answers: Sequence[str]) -> float:
    """Share of the references that the answer contains (RULER's string_match_all)."""
    text = prediction.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def contains_any(prediction: str, answers: Sequence[str]) -> float:
    """1 if the answer contains one of the references (RULER's string_match_part)."""
    text = prediction.lower()
    return float(any(answer.lower() in text for answer in answers))


def parse_number(text: str) -> float:
    """A number that may hold commas between thousands.

    Raises:
        ValueError: if the text is anything else.
    """
    return float(text.replace(",", ""))


def number(prediction: str, answers: Sequence[str]) -> float:
    """1 if the number that the answer comes to is a reference (GSM8K).

    It is the first number after '####', or the last one where there is no such mark. A model that
    goes on to ask itself a new 'Question:' is read up to there.
    """
    text = prediction.split("\nQuestion:")[0]
    before, _, after = text.partition("####")
    found = re.findall(_NUMBER, after)[:1] or re.findall(_NUMBER, before)[-1:]
    return float(any(parse_number(found[0]) == parse_number(a) for a in answers) if found else 0)


def instructions_followed(prediction: str, answers: Sequence[str]) -> float:
    """Share of the rules 'begin:WORD', 'mention:WORD', 'end:WORD' that the answer follows."""
    words = re.findall(r"[a-z']+", prediction.lower())

    def follows(rule: str) -> bool:
        kind, _, word = rule.lower().partition(":")
        if kind == "mention":
            return word in words
        return bool(words) and words[0 if kind == "begin" else -1] == word

    return sum(map(follows, answers)) / len(answers)


def _normalised(text: str) -> list[str]:
    # SQuAD's normalisation: no case, punctuation or articles.
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _f1(prediction: list[str], answer: list[str]) -> float:
    same = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * same / (len(prediction) + len(answer)) if same else 0.0


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best word F1 over the references (LongBench's qa_f1_score)."""
    return max(_f1(_normalised(prediction), _normalised(answer)) for answer in answers)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """Best F of the longest common subsequence of words (ROUGE-L, beta 1).

    Over the whole text in lower case. LongBench's rouge_score takes the package rouge, which
    keeps case and joins the subsequences of single sentences, so long summaries differ.
    """
    return max(_rouge_l(prediction.lower().split(), answer.lower().split()) for answer in answers)


def _rouge_l(prediction: list[str], answer: list[str]) -> float:
    lengths = [0] * (len(answer) + 1)
    for word in prediction:
        diagonal = 0
        for j, other in enumerate(answer, 1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    common = lengths[-1]
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


def classification(prediction: str, answers: Sequence[str]) -> float:
    """1 / number of classes named in the answer, if the right one is among them (LongBench).

    Args:
        prediction: the answer.
        answers: the right class, then all classes. One that is only part of the right one's name
            does not count as named.
    """
    right, *classes = answers
    named = {
        name for name in classes if name in prediction and (name not in right or name == right)
    }
    return 1 / len(named) if right in named else 0.0


def _of_first_line(metric: Metric) -> Metric:
    """The metric on the answer's first line, for few-shot prompts that models continue."""

    def of_first_line(prediction: str, answers: Sequence[str]) -> float:
        return metric(prediction.lstrip("\n").split("\n")[0], answers)

    of_first_line.__doc__ = f"{metric.__name__} of the answer's first line."
    return of_first_line


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def count(prediction: str, answers: Sequence[str]) -> float:
    """Share of the numbers in the answer that are the reference (LongBench's count_score)."""
    found = _numbers(prediction)
    return found.count(answers[0].strip()) / len(found) if found else 0.0


def retrieval(prediction: str, answers: Sequence[str]) -> float:
    """Share of the numbers in the answer that name the paragraph (LongBench's retrieval_score)."""
    wanted = _numbers(answers[0])
    found = _numbers(prediction)
    return found.count(wanted[0]) / len(found) if found and wanted else 0.0


def code_similarity(prediction: str, answers: Sequence[str]) -> float:
    """Likeness of the answer's first line of code to a reference.

    By difflib's ratio. LongBench's code_sim_score uses fuzzywuzzy's: the same formula on another
    matching, rounded to whole percents, so numbers may differ a little.
    """
    lines = [x for x in prediction.lstrip("\n").split("\n") if not re.search(r"[`#]|//", x)]
    line = lines[0] if lines else ""
    return max(SequenceMatcher(None, line, answer).ratio() for answer in answers)


def token_agreement(token_ids: Sequence[int], full_ids: Sequence[int]) -> float:
    """Length of the common beginning over the length of the full cache's text."""
    same = 0
    for a, b in zip(token_ids, full_ids, strict=False):
        if a != b:
            break
        same += 1
    return same / len(full_ids) if full_ids else 1.0


METRICS: dict[str, Metric] = {
    "contains_all": contains_all,
    "contains_any": contains_any,
    "number": number,
    "first_line_number": _of_first_line(number),
    "instructions_followed": instructions_followed,
    "f1": f1,
    "rouge_l": rouge_l,
    "classification": classification,
    "first_line_f1": _of_first_line(f1),
    "first_line_rouge_l": _of_first_line(rouge_l),
    "first_line_classification": _of_first_line(classification),
    "count": count,
    "retrieval": retrieval,
    "code_similarity": code_similarity,
}
