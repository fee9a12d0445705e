"""Samples of every task, from a seed: the same everywhere, others for another seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from quality import families
from quality.families import Sample
from quality.text import haystack, prose, prose_digest

__all__ = [
    "TASKS",
    "Passage",
    "Rendered",
    "Sample",
    "build_passages",
    "build_tasks",
    "haystack",
    "prose_digest",
    "render",
]

TASKS: dict[str, families.Family] = {
    "needle": families.needle,
    "niah_multikey": families.multikey,
    "niah_multivalue": families.multivalue,
    "niah_multiquery": families.multiquery,
    "variable_tracking": families.variable_tracking,
    "common_words": families.common_words,
    "qa_facts": families.qa_facts,
    "multi_instruct": families.multi_instruct,
    "many_shot_arithmetic": families.many_shot_arithmetic,
    "summary": families.summary,
}
# Tokens of the chat template and the question, for which the context leaves room.
_OVERHEAD = 70


@dataclass(frozen=True)
class Rendered:
    """A sample as the model sees it.

    Attributes:
        token_ids: the whole prompt.
        num_suffix_tokens: last tokens, from the first one that shows anything of the question.
    """

    token_ids: tuple[int, ...]
    num_suffix_tokens: int


@dataclass(frozen=True)
class Passage:
    """A piece of prose for likelihoods, cut in two: token ids."""

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]


def build_tasks(
    names: Iterable[str],
    seed: int,
    lengths: Sequence[int],
    samples_per_task: int,
    count_tokens: Callable[[str], int],
) -> list[Sample]:
    """Samples of the named tasks, spread evenly over the lengths.

    Args:
        names: keys of `TASKS`.
        seed: of everything random.
        lengths: prompt lengths, tokens.
        samples_per_task: per task; needles take whole rows of depths per length.
        count_tokens: tokens of a text.
    """
    samples = []
    for name in names:
        for i in range(samples_per_task):
            rng = random.Random(f"{seed}-{name}-{i}")
            length = lengths[i % len(lengths)]
            place = families.Place(
                index=i // len(lengths),
                count=-(-samples_per_task // len(lengths)),
                length=length,
                num_tokens=max(length - _OVERHEAD, 50),
                count_tokens=count_tokens,
            )
            samples.append(TASKS[name](rng, place, f"{seed}-{i}"))
    return samples


def render(sample: Sample, tokenizer: Any) -> Rendered:
    """Token ids of a sample: one user message, the question last.

    Context and question are tokenised apart, so that no token holds parts of both. A model
    without a chat template gets the bare text, with the token that begins its texts.
    """
    # A character that no text of ours holds.
    marker = "\ue000"
    text = f"{sample.context}{sample.joint}{marker}{sample.question}"
    chat = sample.chat and bool(tokenizer.chat_template)
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
    before, after = text.split(marker)
    head = tokenizer(before, add_special_tokens=False)["input_ids"]
    tail = tokenizer(after, add_special_tokens=False)["input_ids"]
    # Chat templates write it themselves.
    if not chat and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        head = [tokenizer.bos_token_id, *head]
    return Rendered((*head, *tail), len(tail))


def build_passages(
    seed: int, count: int, context_tokens: int, continuation_tokens: int, tokenizer: Any
) -> list[Passage]:
    """Passages of prose that do not overlap, in an order and at places from the seed."""
    rng = random.Random(f"{seed}-passages")
    size = context_tokens + continuation_tokens
    pieces = []
    for text in prose():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        spare = len(ids) % size
        start = rng.randint(0, spare)
        pieces += [ids[i : i + size] for i in range(start, len(ids) - size + 1, size)]
    if len(pieces) < count:
        raise ValueError(f"{count} passages asked for, the prose holds {len(pieces)} of {size}")
    return [
        Passage(tuple(piece[:context_tokens]), tuple(piece[context_tokens:]))
        for piece in rng.sample(pieces, count)
    ]
