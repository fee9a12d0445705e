"""Streaming-input sessions, whose prompt grows: stock vLLM's texts, beside compressed prompts."""

from __future__ import annotations

import random

import pytest
from async_engine import AsyncEngine
from tiny_models import tiny_llama

from vllm_kvcompress.vllm_integration.register import register

SETTING = {"method": "span", "ratio": 0.75}
# Tokens of each part.
SESSIONS = [(600, 50), (20, 50), (33, 700, 1, 90, 300), (800,)]


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(f"{length} {seed}").randrange
    return [draw(5, 40_000) for _ in range(length)]


def parts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    return [prompt(length, i) for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"), model)


@pytest.fixture(scope="module")
def stock_texts(path):
    """Of all sessions, without compression."""
    engine = AsyncEngine(path)
    texts = [engine.wait(engine.session(parts_of(lengths), {}))[0] for lengths in SESSIONS]
    engine.stop()
    return texts


@pytest.fixture(scope="module")
def engine(path):
    register()
    engine = AsyncEngine(path, additional_config={"kv_compress": SETTING})
    yield engine
    engine.stop()


@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_texts_are_those_of_stock_vllm(engine, stock_texts, pause):
    for lengths, expected in zip(SESSIONS, stock_texts, strict=True):
        (text,) = engine.wait(engine.session(parts_of(lengths), {}, pause=pause))
        assert text == expected, lengths
        record = engine.stats()["requests"][-1]
        # Of each answer but the last, the prompt takes in all but the last token.
        assert record["prompt_len"] == sum(lengths) + 7 * (len(lengths) - 1)
        assert not record["compressed"] and record["num_prefills"] == 1
    assert engine.is_idle()


def test_beside_compressed_prompts(engine, stock_texts):
    ordinary = prompt(900, 9)
    (alone,) = engine.wait(engine.tokens(ordinary, {"max_tokens": 40}))
    before = engine.stats()["totals"]
    *texts, beside = engine.wait(
        *(engine.session(parts_of(lengths), {}, pause=0.1) for lengths in SESSIONS),
        engine.tokens(ordinary, {"max_tokens": 40}),
    )
    assert texts == stock_texts and beside == alone
    totals = {key: value - before[key] for key, value in engine.stats()["totals"].items()}
    assert (totals["prompts"], totals["compressed_prompts"]) == (len(SESSIONS) + 1, 1)
    grown = sum(7 * (len(lengths) - 1) for lengths in SESSIONS)
    assert totals["prompt_tokens"] == sum(map(sum, SESSIONS)) + grown + 900
    assert engine.is_idle()


@pytest.mark.parametrize("most", [1, 8, 12])
def test_an_aborted_session_harms_nobody(engine, stock_texts, most):
    ordinary = prompt(900, 9)
    (alone,) = engine.wait(engine.tokens(ordinary, {"max_tokens": 40}))
    part, text, beside = engine.wait(
        engine.session(parts_of((600, 50, 200)), {}, most=most, pause=0.2),
        engine.session(parts_of(SESSIONS[0]), {}),
        engine.tokens(ordinary, {"max_tokens": 40}),
    )
    assert len(part) >= most
    assert text == stock_texts[0] and beside == alone
    assert engine.is_idle()


def test_a_prompt_that_goes_on_from_a_sessions(engine):
    """What a session leaves in the prefix cache is exact, so that others may read it."""
    parts = parts_of((600, 50))
    (text,) = engine.wait(engine.session(parts, {}))
    ordinary = [*parts[0], *text[:7], *parts[1], *prompt(300)]
    (after,) = engine.wait(engine.tokens(ordinary, {"max_tokens": 20}))
    assert engine.is_idle()
    (alone,) = engine.wait(engine.tokens(ordinary, {"max_tokens": 20}))
    assert after == alone
