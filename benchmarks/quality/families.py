"""The task families: each builds one sample from a random generator and a place in the grid.

Retrieval, tracing, aggregation and question answering follow the families of RULER
(arXiv 2404.06654), with texts of our own and sizes that a model of 135M parameters can read.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from quality.text import haystack, insert, prose

Family = Callable[[random.Random, "Place", str], "Sample"]

_CITIES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Quebec", "Hanoi", "Dublin", "Athens", "Nairobi", "Kyoto",
    "Havana", "Vienna", "Tunis", "Perth", "Prague", "Bogota",
)  # fmt: skip
_NAMES = (
    "Marta", "Oskar", "Ingrid", "Pablo", "Yuki", "Farid", "Lena", "Viktor", "Amina", "Tomas",
    "Clara", "Hugo", "Nadia", "Emil", "Rosa", "Jonas",
)  # fmt: skip
_TRADES = (
    "dentist", "pilot", "carpenter", "chemist", "violinist", "farmer", "lawyer", "sculptor",
    "plumber", "botanist", "surgeon", "barber",
)  # fmt: skip
_WORDS = (
    "lantern", "pepper", "saddle", "violet", "anchor", "biscuit", "marble", "feather", "canyon",
    "whistle", "basket", "copper", "meadow", "puzzle", "ribbon", "thunder", "walnut", "zebra",
    "bottle", "candle", "dragon", "engine", "forest", "guitar",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One question over a long context.

    Attributes:
        task: key into `tasks.TASKS`, or the name of an official data set.
        sample_id: unique inside the task; holds the seed.
        context: long part of the prompt.
        question: asked after it.
        answers: what the metric looks for.
        metric: key into `metrics.METRICS`, or 'agreement' (with the full cache's answer).
        max_new_tokens: length of the answer.
        meta: what the sample is, e.g. length and depth.
        joint: text between context and question.
        chat: whether the chat template is used.
    """

    task: str
    sample_id: str
    context: str
    question: str
    answers: tuple[str, ...]
    metric: str
    max_new_tokens: int
    meta: tuple[tuple[str, object], ...] = ()
    joint: str = "\n\n"
    chat: bool = True


@dataclass(frozen=True)
class Place:
    """Where a sample stands in its task's grid.

    Attributes:
        index, count: number of this sample among those of its length, and how many there are.
        length: tokens of the whole prompt, asked.
        num_tokens: tokens of its context.
        count_tokens: tokens of a text.
    """

    index: int
    count: int
    length: int
    num_tokens: int
    count_tokens: Callable[[str], int]

    def depths(self, rng: random.Random, number: int) -> list[float]:
        """Depths in [0, 1) for some facts, one in each equal part."""
        return [(i + 0.1 + 0.8 * rng.random()) / number for i in range(number)]


def _with_facts(rng: random.Random, place: Place, facts: list[str], depths: list[float]) -> str:
    size = place.num_tokens - sum(place.count_tokens(" " + fact) for fact in facts)
    return insert(haystack(rng, max(size, 1), place.count_tokens), facts, depths)


def _code(rng: random.Random) -> str:
    return str(rng.randint(10_000, 99_999))


def needle(rng: random.Random, place: Place, sample_id: str) -> Sample:
    """One code in the haystack, at a depth of the grid."""
    code = _code(rng)
    depth = (place.index + 0.5) / place.count
    context = _with_facts(rng, place, [f"The secret code of the vault is {code}."], [depth])
    return Sample(
        "needle",
        sample_id,
        context,
        "What is the secret code of the vault? Answer with the number only.",
        (code,),
        "contains_all",
        24,
        (("length", place.length), ("depth", round(depth, 4))),
    )


def _city_facts(rng: random.Random, number: int) -> tuple[list[str], list[str], list[str]]:
    cities = rng.sample(_CITIES, number)
    codes = [_code(rng) for _ in cities]
    facts = [
        f"The secret code for {city} is {code}." for city, code in zip(cities, codes, strict=True)
    ]
    return cities, codes, facts


def multikey(rng: random.Random, place: Place, sample_id: str) -> Sample:
    """Four codes of four cities; one is asked for."""
    cities, codes, facts = _city_facts(rng, 4)
    wanted = rng.randrange(4)
    return Sample(
        "niah_multikey",
        sample_id,
        _with_facts(rng, place, facts, place.depths(rng, 4)),
        f"What is the secret code for {cities[wanted]}? Answer with the number only.",
        (codes[wanted],),
        "contains_all",
        24,
        (("length", place.length),),
    )


def multivalue(rng: random.Random, place: Place, sample_id: str) -> Sample:
    """Three codes of one city; all are asked for."""
    city = rng.choice(_CITIES)
    codes = [_code(rng) for _ in range(3)]
    facts = [f"One of the secret codes for {city} is {code}." for code in codes]
    return Sample(
        "niah_multivalue",
        sample_id,
        _with_facts(rng, place, facts, place.depths(rng, 3)),
        f"What are all the secret codes for {city}? List the three numbers.",
        tuple(codes),
        "contains_all",
        48,
        (("length", place.length),),
    )


def multiquery(rng: random.Random, place: Place, sample_id: str) -> Sample:
    """Four codes of four cities; two are asked for."""
    cities, codes, facts = _city_facts(rng, 4)
    a, b = rng.sample(range(4), 2)
    return Sample(
        "niah_multiquery",
        sample_id,
        _with_facts(rng, place, facts, place.depths(rng, 4)),
        f"What are the secret codes for {cities[a]} and for {cities[b]}? Answer with both numbers.",
        (codes[a], codes[b]),
        "contains_all",
        48,
        (("length", place.length),),
    )


def variable_tracking(rng: random.Random, place: Place, sample_id: str) -> Sample:
    """A value handed on once: who lends it, and what it is, are asked for."""
    lender, other, borrower = rng.sample(_NAMES, 3)
    value, other_value = _code(rng), _code(rng)
    facts = [
        f"The locker of {lender} has the number {value}.",
        f"The locker of {other} has the number {other_value}.",
        f"{borrower} uses the locker of {lender}.",
    ]
    return Sample(
        "variable_tracking",
        sample_id,
        _with_facts(rng, place, facts, place.depths(rng, 3)),
        f"Whose locker does {borrower} use, and what is its number? "
        "Answer with the name and the number.",
        (lender, value),
        "contains_all",
        32,
        (("length", place.length),),
    )


def common_words(rng: random.Random, place: Place, sample_id: str) -> Sample:
    """A list of words, two of which come again and again."""
    common = rng.sample(_WORDS, 2)
    rare = [word for word in _WORDS if word not in common]
    words: list[str] = []
    total = 0
    while total < place.num_tokens - 8:
        words.append(rng.choice(common) if rng.random() < 0.8 else rng.choice(rare))
        total += place.count_tokens(f" {words[-1]},")
    return Sample(
        "common_words",
        sample_id,
        "Here is a list of words: " + ", ".join(words) + ".",
        "Repeat the list of words. Begin with its two most common words.",
        tuple(common),
        "contains_all",
        32,
        (("length", place.length),),
    )


def qa_facts(rng: random.Random, place: Place, sample_id: str) -> Sample:
    """Where three made-up people were born; one is asked for.

    The answer's beginning is left to the model: the first token that it writes is computed with
    the whole prompt in view, so an answer of one token would tell nothing about the kept cache.
    """
    names = rng.sample(_NAMES, 3)
    cities = rng.sample(_CITIES, 3)
    facts = [f"{name} was born in {city}." for name, city in zip(names, cities, strict=True)]
    wanted = rng.randrange(3)
    return Sample(
        "qa_facts",
        sample_id,
        _with_facts(rng, place, facts, place.depths(rng, 3)),
        f"Question: Where was {names[wanted]} born?\nAnswer: {names[wanted]}",
        (cities[wanted],),
        "contains_all",
        16,
        (("length", place.length),),
        chat=False,
    )


def multi_instruct(rng: random.Random, place: Place, sample_id: str) -> Sample:
    """Three instructions spread over the context, each to write a word."""
    words = rng.sample(_WORDS, 3)
    facts = [
        f'Write "{word}" as the {ordinal} word.'
        for word, ordinal in zip(words, ("first", "second", "third"), strict=True)
    ]
    return Sample(
        "multi_instruct",
        sample_id,
        _with_facts(rng, place, facts, place.depths(rng, 3)),
        "Write the words that you were told to write.",
        tuple(f"mention:{word}" for word in words),
        "instructions_followed",
        48,
        (("length", place.length),),
    )


def many_shot_arithmetic(rng: random.Random, place: Place, sample_id: str) -> Sample:
    """Worked additions, many of them, then one to solve that is none of the examples."""
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    lines: list[str] = []
    total = 0
    while total < place.num_tokens:
        x, y = rng.randint(1, 12), rng.randint(1, 12)
        if {x, y} == {a, b}:
            continue
        # The sum is not the first thing that is written, for the reason told in `qa_facts`.
        lines.append(f"Question: {x} + {y}\nAnswer: {x} + {y} = {x + y}")
        total += place.count_tokens(lines[-1] + "\n")
    return Sample(
        "many_shot_arithmetic",
        sample_id,
        "\n".join(lines),
        f"Question: {a} + {b}\nAnswer:",
        (str(a + b),),
        "first_line_number",
        16,
        (("length", place.length),),
        joint="\n",
        chat=False,
    )


def summary(rng: random.Random, place: Place, sample_id: str) -> Sample:
    """A prose article to summarise; the score is agreement with the full cache's text."""
    article = rng.choice(prose())
    sentences = article.replace("\n\n", " ").split(". ")
    start = rng.randrange(max(1, len(sentences) // 3))
    chosen: list[str] = []
    total = 0
    for text in sentences[start:]:
        if total >= place.num_tokens:
            break
        chosen.append(text)
        total += place.count_tokens(" " + text + ".")
    return Sample(
        "summary",
        sample_id,
        ". ".join(chosen) + ".",
        "Summarise the text above in a few sentences.",
        (),
        "agreement",
        64,
        (("length", place.length),),
    )
