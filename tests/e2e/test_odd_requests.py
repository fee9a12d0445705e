"""Odd requests, each beside an ordinary one: what stock vLLM refuses or serves, so does this.

Prompts within the budget have stock vLLM's tokens. The ordinary request beside is never harmed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from async_engine import AsyncEngine
from tiny_models import tiny_llama

from vllm_kvcompress.vllm_integration.register import register

SETTING = {"method": "span", "ratio": 0.75}
MAX_LEN, HIDDEN, VOCABULARY = 1024, 192, 49152
SETTINGS = {
    "max_model_len": MAX_LEN,
    # Longer prompts come in chunks.
    "max_num_batched_tokens": 512,
    "enable_prompt_embeds": True,
}


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(f"{length} {seed}").randrange
    return [draw(5, 40_000) for _ in range(length)]


def embeds(length: int, number: float | None = None) -> dict[str, torch.Tensor]:
    numbers = torch.randn(length, HIDDEN, generator=torch.manual_seed(length)) * 0.02
    if number is not None:
        numbers[length // 2 :: 7] = number
    return {"prompt_embeds": numbers}


ORDINARY, ORDINARY_PARAMS = prompt(700, 1), {"max_tokens": 30}
LONG, SHORT = prompt(400), prompt(12)


@dataclass
class Odd:
    """A request.

    Attributes:
        prompt: of `AsyncEngine.tokens`.
        params: of sampling; or what makes them once vLLM may be imported.
        how: other arguments of `generate`; likewise.
        is_stock: whether its tokens are stock vLLM's.
    """

    prompt: Any
    params: dict[str, Any] | Callable[[], dict[str, Any]] = field(default_factory=dict)
    how: dict[str, Any] | Callable[[], dict[str, Any]] = field(default_factory=dict)
    is_stock: bool = False

    def run(self, engine: AsyncEngine) -> Any:
        params, how = (x() if callable(x) else x for x in (self.params, self.how))
        return engine.tokens(self.prompt, params, **how)


def structured(**constraint: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        from vllm.sampling_params import StructuredOutputsParams

        return {"structured_outputs": StructuredOutputsParams(**constraint), "ignore_eos": False}

    return make


def unknown_lora() -> dict[str, Any]:
    from vllm.lora.request import LoRARequest

    return {"lora_request": LoRARequest("nobody", 1, "/nowhere")}


# Embeddings of another width are not among them: they end stock vLLM's engine.
ODD = {
    "embeds": Odd(embeds(400)),
    "short embeds": Odd(embeds(12), is_stock=True),
    "embeds in half precision": Odd({"prompt_embeds": embeds(400)["prompt_embeds"].half()}),
    "embeds of one dimension": Odd({"prompt_embeds": torch.zeros(400)}),
    "no embeds": Odd({"prompt_embeds": torch.zeros(0, HIDDEN)}),
    "one token": Odd([7], is_stock=True),
    "no token": Odd([]),
    "no text": Odd(""),
    "one new token": Odd(LONG, {"max_tokens": 1}),
    "no new token": Odd(LONG, {"max_tokens": 0}),
    "a biased token": Odd(LONG, {"logit_bias": {5: 100.0}}),
    "a biased token that is none": Odd(LONG, {"logit_bias": {VOCABULARY + 5: 100.0}}),
    "no allowed token": Odd(LONG, {"allowed_token_ids": []}),
    "bad words": Odd(LONG, {"bad_words": ["the"]}),
    "a token that is none": Odd([*LONG, VOCABULARY + 9]),
    "a negative token": Odd([*LONG, -3]),
    "samples": Odd(LONG, {"n": 3, "temperature": 0.8}),
    "samples in chunks": Odd(prompt(900), {"n": 3, "temperature": 0.8}),
    "the longest prompt": Odd(prompt(MAX_LEN - 1)),
    "as long as the model": Odd(prompt(MAX_LEN)),
    "longer than the model": Odd(prompt(MAX_LEN + 5)),
    "up to the model's end": Odd(prompt(MAX_LEN - 20), {"max_tokens": 100}),
    "a prompt's log-probabilities": Odd(prompt(900), {"prompt_logprobs": 3}),
    "no prompt's log-probabilities": Odd(LONG, {"prompt_logprobs": 0}),
    "all of a prompt's log-probabilities": Odd(LONG, {"prompt_logprobs": -1}),
    "too few log-probabilities": Odd(LONG, {"prompt_logprobs": -2}),
    "all log-probabilities": Odd(LONG, {"logprobs": -1}),
    "no reading of the prefix cache": Odd(LONG, {"skip_reading_prefix_cache": True}),
    "odd arguments": Odd(LONG, {"extra_args": {"kv_compress": [], "": None, "kv_compress_ids": 1}}),
    "a transfer": Odd(LONG, {"extra_args": {"kv_transfer_params": {"do_remote_prefill": True}}}),
    "an odd transfer": Odd(LONG, {"extra_args": {"kv_transfer_params": 7}}),
    "a bad grammar": Odd(LONG, structured(grammar="root ::= (((")),
    "a bad expression": Odd(LONG, structured(regex="(")),
    "a bad schema": Odd(LONG, structured(json='{"type": ')),
    "an expression": Odd(LONG, structured(regex="[0-9]{3}")),
    "a short expression": Odd(SHORT, structured(regex="[0-9]{3}"), is_stock=True),
    "an image": Odd({"prompt_token_ids": LONG, "multi_modal_data": {"image": object()}}),
    "an unknown adapter": Odd(LONG, how=unknown_lora),
    "a priority": Odd(LONG, how={"priority": 5}),
    "a salt": Odd({"prompt_token_ids": LONG, "cache_salt": "salt"}),
    "an empty salt": Odd({"prompt_token_ids": LONG, "cache_salt": ""}),
    "more tokens": Odd(LONG, {"min_tokens": 6, "ignore_eos": False}),
    "more tokens than there may be": Odd(LONG, {"min_tokens": 9}),
    "a cut prompt": Odd(
        {"prompt": "the old clock " * 900},
        how={"tokenization_kwargs": {"truncate_prompt_tokens": 300}},
    ),
    "a prompt cut to nothing": Odd(
        {"prompt": "the old clock " * 90},
        how={"tokenization_kwargs": {"truncate_prompt_tokens": 0}},
    ),
    "penalties": Odd(LONG, {"repetition_penalty": 1.3, "presence_penalty": -1.0}),
    "a temperature that is none": Odd(LONG, {"temperature": float("nan")}),
    "a replayed answer": Odd(LONG, {"trace_decode_token_ids": [7, 8, 9]}),
    "a rank that is not there": Odd(LONG, how={"data_parallel_rank": 3}),
}

# What they leave in the pool's blocks is no number, and vLLM's attention on a CPU lets others read
# it, with or without compression. So they come last.
NO_NUMBERS = {
    "embeds that are not numbers": Odd(embeds(400, float("nan"))),
    "embeds in chunks that are not numbers": Odd(embeds(900, float("nan"))),
    "embeds without bound": Odd(embeds(400, float("inf"))),
    "huge embeds": Odd(embeds(400, 3e38)),
}


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"), model)


@pytest.fixture(scope="module")
def stock(path):
    """What stock vLLM makes of each: its tokens, or what it raises."""
    engine = AsyncEngine(path, **SETTINGS)
    requests = {**ODD, **NO_NUMBERS}
    results = {name: engine.wait(odd.run(engine))[0] for name, odd in requests.items()}
    engine.stop()
    return results


@pytest.fixture(scope="module")
def engine(path, stock):
    register()
    engine = AsyncEngine(path, additional_config={"kv_compress": SETTING}, **SETTINGS)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def ordinary(engine):
    """Tokens of the ordinary request, alone."""
    return engine.wait(engine.tokens(ORDINARY, ORDINARY_PARAMS))[0]


@pytest.mark.parametrize("name", ODD)
def test_is_served_or_refused_as_by_stock_vllm(engine, ordinary, stock, name):
    odd, expected = ODD[name], stock[name]
    beside, result = engine.wait(engine.tokens(ORDINARY, ORDINARY_PARAMS), odd.run(engine))
    assert beside == ordinary
    if isinstance(expected, Exception):
        assert (type(result), str(result)) == (type(expected), str(expected))
    elif odd.is_stock:
        assert result == expected
    else:
        assert isinstance(result, list) and len(result) == len(expected), result
    assert engine.is_idle()


def test_most_are_served(stock):
    """The list is not one of refusals, nor of what is always served."""
    refused = [name for name, result in stock.items() if isinstance(result, Exception)]
    assert 10 < len(refused) < len(stock) - 10, refused


def test_pooling_is_refused_alone(engine, ordinary):
    from vllm import PoolingParams

    async def encode():
        outputs = engine.llm.encode({"prompt_token_ids": LONG}, PoolingParams(task="embed"), "p")
        return [output async for output in outputs]

    beside, result = engine.wait(engine.tokens(ORDINARY, ORDINARY_PARAMS), encode())
    assert beside == ordinary
    assert "does not support pooling" in str(result)
    assert engine.is_idle()


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_number_ends_no_engine(engine, ordinary, stock, name):
    odd = NO_NUMBERS[name]
    beside, result = engine.wait(engine.tokens(ORDINARY, ORDINARY_PARAMS), odd.run(engine))
    assert len(beside) == len(ordinary)
    assert len(result) == len(stock[name])
    assert engine.is_idle()
