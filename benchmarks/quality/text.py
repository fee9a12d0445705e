"""Text for haystacks and passages: made-up sentences, and prose that comes with Python."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from functools import cache

_PEOPLE = (
    "the miller", "a quiet clerk", "the old captain", "her neighbour", "the gardener",
    "a young baker", "our teacher", "the tailor from the hill", "his cousin", "the night guard",
    "a travelling singer", "the judge", "two students", "the ferryman", "a retired nurse",
    "the clockmaker", "my aunt", "the choir", "a stranger with a cane", "the postman",
    "the new librarian", "a painter from the coast", "the stationmaster", "both sisters",
)  # fmt: skip
_ACTS = (
    "walked to", "wrote a letter about", "remembered", "painted", "complained about",
    "was asked to repair", "dreamt of", "drew a map of", "kept away from", "argued over",
    "told a long story about", "took photographs of", "planned to visit", "had always loved",
    "could not explain", "measured", "searched for", "gave a speech beside", "slept near",
    "hummed a tune about",
)  # fmt: skip
_THINGS = (
    "the harbour", "the broken clock", "a field of barley", "the winter market", "the bridge",
    "an abandoned mill", "the narrow lane", "a chest of old books", "the river ferry",
    "the school garden", "the copper kettle", "a row of poplars", "the lighthouse",
    "the empty theatre", "a wooden boat", "the orchard wall", "the town fountain",
    "a pile of wet leaves", "the chapel roof", "the glass workshop", "a stray dog",
    "the north road", "the weather station", "the apple harvest",
)  # fmt: skip
_CLOSINGS = (
    "before the rain came", "without a word", "every spring", "and went home early",
    "because the road was closed", "while the bells rang", "in spite of the cold",
    "until somebody noticed", "with the help of friends", "for no clear reason",
    "long after the lamps were lit", "as the fog lifted", "on the first day of the month",
    "when the shops had closed", "and nobody was surprised", "during the dry summer",
    "as soon as the letter arrived", "to pass the time",
)  # fmt: skip
_SHAPES = (
    "{Person} {act} {thing} {closing}.",
    "{Closing}, {person} {act} {thing}.",
    "{Person} {act} {thing}, and {person2} {act2} {thing2} {closing}.",
    "It was said that {person} {act} {thing} {closing}.",
    "{Person} {act} {thing}; later, {person2} {act2} it too.",
    "Few people knew why {person} {act} {thing} {closing}.",
)


# About 4,500 tokens, of which a passage may begin anywhere in the first third.
_ARTICLE_CHARS = 20_000


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def sentence(rng: random.Random) -> str:
    """One made-up sentence."""
    parts = {
        "person": rng.choice(_PEOPLE),
        "person2": rng.choice(_PEOPLE),
        "act": rng.choice(_ACTS),
        "act2": rng.choice(_ACTS),
        "thing": rng.choice(_THINGS),
        "thing2": rng.choice(_THINGS),
        "closing": rng.choice(_CLOSINGS),
    }
    parts |= {_capital(name): _capital(parts[name]) for name in ("person", "closing")}
    return rng.choice(_SHAPES).format(**parts)


def haystack(rng: random.Random, num_tokens: int, count_tokens: Callable[[str], int]) -> list[str]:
    """Made-up sentences of `num_tokens` tokens together, to within one sentence."""
    sentences: list[str] = []
    total = 0
    while total < num_tokens:
        sentences.append(sentence(rng))
        total += count_tokens(" " + sentences[-1])
    return sentences


def insert(sentences: list[str], facts: list[str], depths: list[float]) -> str:
    """The sentences as one text, fact i after the fraction `depths[i]` of them."""
    places = sorted((round(depth * len(sentences)), i) for i, depth in enumerate(depths))
    out = list(sentences)
    for offset, (place, i) in enumerate(places):
        out.insert(place + offset, facts[i])
    return " ".join(out)


@cache
def prose() -> tuple[str, ...]:
    """Long prose articles: the language topics of this Python's own help, markup stripped.

    The text is part of Python's documentation (Python Software Foundation License, version 2).
    Topics repeat paragraphs of each other; each paragraph comes once. Neighbouring topics are
    joined to articles of at least `_ARTICLE_CHARS` characters.
    """
    from pydoc_data.topics import topics

    articles = []
    seen: set[str] = set()
    paragraphs: list[str] = []
    for name in sorted(topics):
        for raw in re.split(r"\n\s*\n", topics[name]):
            paragraph = " ".join(re.sub(r"[`*]+|\[\d+\]", "", raw).split())
            if _is_prose(raw) and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if sum(map(len, paragraphs)) >= _ARTICLE_CHARS:
            articles.append("\n\n".join(paragraphs))
            paragraphs = []
    return tuple(articles)


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    if len(words) < 12 or ">>>" in paragraph or "::=" in paragraph:
        return False
    # Code, tables and grammars have few plain words.
    plain = sum(re.fullmatch(r"[A-Za-z][a-z']*[.,;:]?", word) is not None for word in words)
    return plain / len(words) > 0.7


def prose_digest() -> str:
    """SHA-256 of the prose used, which differs between Python versions."""
    return hashlib.sha256("\n".join(prose()).encode()).hexdigest()
