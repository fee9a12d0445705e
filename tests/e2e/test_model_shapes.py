"""Compression in models of every shape that vLLM can mix: tiny, with random weights.

On a CPU they run in float32, where greedy texts do not depend on the batch and compare token by
token. A GPU has half precision and kernels of its own: there, texts may part where two tokens are
about equally likely.
"""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace

import pytest
import torch
from devices import EVERYWHERE, TOLERANCES, Text, assert_same_texts
from in_process_engines import start, stop
from plain_model import PlainModel
from tiny_models import (
    FULL,
    WINDOWED,
    tiny_gemma3,
    tiny_gemma3n,
    tiny_gemma4,
    tiny_gpt_oss,
    tiny_llama,
    tiny_qwen3,
)

from vllm_kvcompress import ops

RATIO, LOW_RATIO = 0.75, 0.6
BLOCK, NUM_HEADS = 32, 2
# Full-attention layers of each, and how to build it.
SHAPES = {
    "llama": (3, tiny_llama),
    "qwen3_qk_norm": (3, tiny_qwen3),
    "gemma3_windows": (2, functools.partial(tiny_gemma3, layer_types=[WINDOWED, FULL] * 2)),
    "gemma3n_shared_caches": (
        2,
        functools.partial(tiny_gemma3n, layer_types=[WINDOWED, FULL] * 3, num_shared=2),
    ),
    "gemma4_larger_heads": (
        2,
        functools.partial(tiny_gemma4, layer_types=[WINDOWED, WINDOWED, FULL] * 2, head_size=128),
    ),
    "gemma4_larger_heads_shared_caches": (
        2,
        functools.partial(
            tiny_gemma4,
            layer_types=[WINDOWED, FULL] * 2 + [WINDOWED] * 2 + [FULL] * 2,
            head_size=256,
            num_kv_shared_layers=4,
        ),
    ),
    "gpt_oss_windows_and_sinks": (2, functools.partial(tiny_gpt_oss, sliding_window=128)),
    "gpt_oss_sinks_no_windows": (4, functools.partial(tiny_gpt_oss, sliding_window=None)),
}
# Together they have all that the plain platform's attention can do.
PLAIN_SHAPES = ("gemma3n_shared_caches", "gpt_oss_windows_and_sinks")


def cases():
    """Devices and the shapes that run there."""
    for name in SHAPES:
        for device in EVERYWHERE:
            if device == "plain" and name not in PLAIN_SHAPES:
                continue
            if isinstance(device, str):
                yield device, name
            else:
                yield pytest.param(*device.values, name, marks=device.marks)


pytestmark = pytest.mark.parametrize(("device", "shape"), [*cases()], indirect=True, scope="module")


def prompt(length):
    draw = random.Random(length).randrange
    return [draw(5, 40_000) for _ in range(length)]


PROMPTS = [prompt(length) for length in (333, 600, 40, 449)]


@pytest.fixture(scope="module")
def shape(request, device, model, tmp_path_factory, engines_in_process):
    num_layers, build = SHAPES[request.param]
    path = build(tmp_path_factory.mktemp(request.param), model)
    return SimpleNamespace(
        path=path,
        num_layers=num_layers,
        has_sinks="sinks" in request.param,
        table=[[1 + (layer + 2 * head) % 3 for head in range(2)] for layer in range(num_layers)],
    )


@pytest.fixture(scope="module")
def stock(shape, dtype):
    """What vLLM without compression generates."""
    engine = start(shape.path, dtype=dtype)
    outputs = generate(engine, PROMPTS)
    stop(engine)
    return outputs


@pytest.fixture(scope="module")
def engine(shape, dtype, stock):
    # After the stock engine: one at a time in a process. The largest regions of all tests.
    engine = start(
        shape.path,
        dtype=dtype,
        kv_compress="streamingllm",
        kv_compress_ratio=LOW_RATIO,
        # Of the layers that are compressed.
        kv_compress_options={"budgets": "static", "table": shape.table},
    )
    yield engine
    stop(engine)


def generate(engine, prompts, max_tokens=16):
    """Tokens of each, and the log-probabilities of the likeliest ones at each place."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=4)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [Text.of(output) for output in engine.generate(requests, params, use_tqdm=False)]


def configure(engine, method, ratio=RATIO, **options):
    engine.kv_compress_reconfigure(method=method, ratio=ratio, options=options)
    engine.reset_prefix_cache()


def records_of(engine, outputs):
    by_id = {record["request_id"]: record for record in engine.kv_compress_stats()["requests"]}
    return [by_id[output.id] for output in outputs]


def test_nothing_evicted_is_stock(engine, stock, device) -> None:
    configure(engine, "span", ratio=0.0)
    outputs = generate(engine, PROMPTS)
    assert_same_texts(outputs, stock, device)
    assert not any(record["compressed"] for record in records_of(engine, outputs))


@pytest.mark.parametrize("method", ["span", "ada-pyramidkv", "h2o"])
def test_budget_is_kept_to_the_page(shape, engine, device, stock, method, read_metric) -> None:
    configure(engine, method)
    outputs = generate(engine, PROMPTS)
    records = records_of(engine, outputs)
    is_long = [len(prompt) > 40 for prompt in PROMPTS]
    assert [record["compressed"] for record in records] == is_long
    for prompt_tokens, record in zip(PROMPTS, records, strict=True):
        if not record["compressed"]:
            continue
        num_freed = record["blocks_returned"] + record["blocks_not_taken"]
        dense = len(prompt_tokens) - num_freed * BLOCK
        kept = record["kept_per_head"]
        assert [len(heads) for heads in kept] == [NUM_HEADS] * shape.num_layers
        pages = [(tokens - dense) / BLOCK for heads in kept for tokens in heads]
        assert all(page == int(page) >= 1 for page in pages)
        assert sum(pages) == record["region_blocks"] * len(pages)
        asked = len(prompt_tokens) - int(RATIO * len(prompt_tokens))
        # A ratio is rounded to the nearest page.
        assert abs(record["kept_tokens"] - asked) <= BLOCK / 2
        assert num_freed > record["region_blocks"] > 0
    # The short prompt stays whole; what is evicted of the others matters.
    assert_same_texts(outputs[2:3], stock[2:3], device)
    differs = [a.tokens != b.tokens for a, b in zip(outputs, stock, strict=True)]
    assert sum(differs) >= 2
    generate(engine, [[5, 6, 7]], max_tokens=2)
    assert read_metric(engine, "vllm:kv_cache_usage_perc") == 0.0


@pytest.mark.parametrize("method", ["span", "tova", "h2o"])
def test_one_shot_prompts_get_the_same_texts(engine, device, method) -> None:
    texts = {}
    for one_shot in ("never", "always"):
        configure(engine, method, one_shot=one_shot)
        outputs = generate(engine, PROMPTS)
        texts[one_shot] = outputs
        flags = [r["one_shot"] for r in records_of(engine, outputs) if r["compressed"]]
        assert flags == [one_shot == "always"] * 3
    assert_same_texts(texts["always"], texts["never"], device)


@pytest.fixture(scope="module")
def plain(shape):
    return PlainModel(shape.path)


def assert_like_plain(output, expected, prompt_len, device):
    """The engine's log-probabilities at every place of a text are the plain model's."""
    places = range(prompt_len - 1, prompt_len - 1 + len(output.tokens))
    for place, given in zip(places, output.logprobs, strict=True):
        for token, logprob in given.items():
            assert logprob == pytest.approx(float(expected[place, token]), abs=TOLERANCES[device])


def largest_shift(expected, other, output, prompt_len):
    """Largest change of the text's own log-probabilities behind its first token."""
    places = torch.arange(prompt_len, prompt_len - 1 + len(output.tokens))
    tokens = torch.tensor(output.tokens[1:])
    return float((expected[places, tokens] - other[places, tokens]).abs().max())


def test_decode_attends_to_just_what_each_head_kept(shape, engine, plain, device) -> None:
    # Of this method it is known which pages every head keeps: the first, and the most recent.
    configure(engine, "streamingllm", ratio=LOW_RATIO, budgets="static", table=shape.table)
    prompt_tokens = PROMPTS[1]
    (output,) = generate(engine, [prompt_tokens], max_tokens=2 * BLOCK)
    (record,) = records_of(engine, [output])
    num_candidates = (record["blocks_returned"] + record["blocks_not_taken"]) * BLOCK
    # Of each head, the first candidate of its most recent pages.
    recent = [
        [len(prompt_tokens) - (n - BLOCK) for n in heads] for heads in record["kept_per_head"]
    ]
    assert len({first for heads in recent for first in heads}) > 1
    assert all(BLOCK < first < num_candidates for heads in recent for first in heads)
    kept = [
        [torch.cat([torch.arange(BLOCK), torch.arange(first, num_candidates)]) for first in heads]
        for heads in recent
    ]
    tokens, prompt_len = prompt_tokens + output.tokens, len(prompt_tokens)
    expected = plain.logprobs(tokens, prompt_len, kept, num_candidates)
    assert_like_plain(output, expected, prompt_len, device)
    # It would show if a head had kept another page, or everything.
    whole = plain.logprobs(tokens, prompt_len)
    assert largest_shift(expected, whole, output, prompt_len) > 10 * TOLERANCES["cpu"]
    kept[-1][0] = kept[-1][0][BLOCK:]
    other = plain.logprobs(tokens, prompt_len, kept, num_candidates)
    assert largest_shift(expected, other, output, prompt_len) > 10 * TOLERANCES["cpu"]
    if shape.has_sinks:
        without = PlainModel(shape.path, drop_sinks=True).logprobs(tokens, prompt_len)
        assert largest_shift(whole, without, output, prompt_len) > 10 * TOLERANCES["cpu"]


def test_scores_are_of_the_models_own_attention(shape, engine, plain, device, monkeypatch) -> None:
    if device.startswith("cuda"):
        pytest.skip("the CUDA side's selection stays on the device")
    selections = []
    select = ops.select_and_compact

    def recording(*args, **options):
        selections.append(select(*args, **options))
        return selections[-1]

    monkeypatch.setattr(ops, "select_and_compact", recording)
    configure(engine, "snapkv", published=True, pool_kernel=1)
    prompt_tokens = PROMPTS[0]
    prompt_len = len(prompt_tokens)
    (output,) = generate(engine, [prompt_tokens])
    (record,) = records_of(engine, [output])
    num_candidates = (record["blocks_returned"] + record["blocks_not_taken"]) * BLOCK
    ((page_offsets, indices),) = selections
    counts = (page_offsets[0].diff() * BLOCK).tolist()
    parts = indices[0].long().split(counts)
    kept = [list(parts[2 * i : 2 * i + 2]) for i in range(len(counts) // 2)]
    expected = plain.logprobs(prompt_tokens + output.tokens, prompt_len, kept, num_candidates)
    assert_like_plain(output, expected, prompt_len, device)
    assert len(plain.weights) == len(kept) == shape.num_layers
    for weights, heads in zip(plain.weights, kept, strict=True):
        window = weights[:, prompt_len - 32 : prompt_len, :num_candidates]
        scores = window.mean(dim=1).unflatten(0, (NUM_HEADS, -1)).mean(dim=1)
        for score, positions in zip(scores, heads, strict=True):
            is_kept = torch.zeros(num_candidates, dtype=torch.bool)
            is_kept[positions] = True
            assert 0 < int(is_kept.sum()) < num_candidates
            # Rounding may swap scores that are all but equal.
            assert score[is_kept].min() > score[~is_kept].max() * (1 - 1e-3)
