"""Every method, both granularities and the compaction point before the prompt's end, in one
engine of this process that is given one setting after another.

On a CPU the model runs in float32, so that greedy texts do not depend on how prompts are chunked.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from devices import Text, assert_same_texts
from paper_forms import paper_options

from vllm_kvcompress import KVCompressConfig, KVCompressConfigError
from vllm_kvcompress.policies import RECIPES, scorer_class
from vllm_kvcompress.policies.builtin import budgets_class

BUDGET = 320
NUM_LAYERS, NUM_HEADS, GROUP, HEAD_SIZE = 30, 3, 3, 64
# Weights per layer and head; few enough of the pages go anywhere to stay below the prompts.
TABLE = [[1 + (layer + head) % 3 for head in range(NUM_HEADS)] for layer in range(NUM_LAYERS)]
ALL_QUERIES = [name for name, r in RECIPES.items() if "all_queries" in scorer_class(r.scorer).needs]


@pytest.fixture(scope="module")
def engine(start_engine, dtype, engines_in_process, tmp_path_factory):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_kvcompress.vllm_integration.register import register

    # As loading the plugins does, for the flags.
    register()
    table = tmp_path_factory.mktemp("table") / "table.json"
    table.write_text(json.dumps(TABLE))
    options = {"budgets": "static", "table": str(table), "suffix_tokens": 1}
    flags = ["--kv-compress", "snapkv", "--kv-compress-budget", str(BUDGET)]
    flags += ["--kv-compress-options", json.dumps(options)]
    args = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags)
    return start_engine(
        additional_config=AsyncEngineArgs.from_cli_args(args).additional_config,
        dtype=dtype,
        # A prompt of these tests takes more than one chunk, if little of it is cached.
        max_num_batched_tokens=640,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=384 << 20,
    )


@pytest.fixture(scope="module", autouse=True)
def pool_is_whole_in_the_end(engine, read_metric):
    yield
    _generate(engine, [{"prompt_token_ids": [5, 6, 7]}], max_tokens=2)
    assert read_metric(engine, "vllm:kv_cache_usage_perc") == 0.0


@pytest.fixture
def in_float32(dtype) -> None:
    """What is compared with other people's numbers has theirs."""
    if dtype != "float32":
        pytest.skip(f"compares with numbers in float32; the model runs in {dtype}")


def _generate(engine, prompts, max_tokens=6, **settings):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, **settings)
    return engine.generate(prompts, params, use_tqdm=False)


def _records(engine, outputs) -> list[dict]:
    """What was recorded of the prompts of some outputs, the newest engine calls."""
    return engine.kv_compress_stats()["requests"][-len(outputs) :]


def _token_ids(engine, chat) -> list[int]:
    tokenizer = engine.get_tokenizer()
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def prompts(engine, needle) -> list[dict]:
    """Two prompts of other lengths that are in the prefix cache."""
    ids = [_token_ids(engine, needle(seed, sentences)[0]) for seed, sentences in ((1, 58), (2, 67))]
    prompts = [{"prompt_token_ids": one} for one in ids]
    engine.kv_compress_reconfigure(method="knorm", budget=BUDGET)
    _generate(engine, prompts)
    return prompts


def _pages(record: dict, recent: int, suffix: int = 0) -> list[list[int]]:
    """Region pages of each layer and head, checked for what holds under every method.

    `recent` tokens before the compaction point are kept in any case.
    """
    compact_len = record["prompt_len"] - suffix
    assert record["compressed"]
    num_candidate_blocks = (compact_len - recent) // 32
    assert record["blocks_returned"] == num_candidate_blocks
    dense = record["prompt_len"] - num_candidate_blocks * 32
    pages = [[(tokens - dense) / 32 for tokens in layer] for layer in record["kept_per_head"]]
    assert (len(pages), {len(layer) for layer in pages}) == (NUM_LAYERS, {NUM_HEADS})
    assert all(page == int(page) >= 1 for layer in pages for page in layer)
    assert sum(map(sum, pages)) == record["region_blocks"] * NUM_LAYERS * NUM_HEADS
    assert BUDGET - 32 < record["kept_tokens"] - suffix <= BUDGET
    return pages


def test_static_table_from_a_file_on_the_command_line(engine, needle) -> None:
    # Before any other setting: this is the one that the engine was started with.
    prompt = {"prompt_token_ids": _token_ids(engine, needle(3, 70)[0])}
    outputs = _generate(engine, [prompt])
    (record,) = _records(engine, outputs)
    pages = _pages(record, recent=KVCompressConfig("snapkv").window, suffix=1)
    unit = record["region_blocks"] / (sum(map(sum, TABLE)) / NUM_LAYERS / NUM_HEADS)
    for layer, weights in zip(pages, TABLE, strict=True):
        for page, weight in zip(layer, weights, strict=True):
            assert abs(page - weight * unit) <= 1
    assert pages[0][0] < pages[0][1] < pages[0][2]


@pytest.mark.parametrize("granularity", ["page", "token"])
@pytest.mark.parametrize("method", RECIPES)
def test_method_keeps_its_budget_and_generates(
    engine, prompts, read_metric, method, granularity
) -> None:
    engine.kv_compress_reconfigure(method=method, budget=BUDGET, granularity=granularity)
    hits_before = read_metric(engine, "vllm:prefix_cache_hits")
    outputs = _generate(engine, prompts)
    config = KVCompressConfig(method)
    hits = read_metric(engine, "vllm:prefix_cache_hits") - hits_before
    # Whatever an earlier method computed is used, unless every query has to be seen.
    lens = [len(prompt["prompt_token_ids"]) for prompt in prompts]
    usable = [0 if method in ALL_QUERIES else (n - config.window) // 32 * 32 for n in lens]
    assert [output.num_cached_tokens for output in outputs] == usable
    assert hits == sum(usable)
    budgets = RECIPES[method].budgets
    records = _records(engine, outputs)
    assert [record["prompt_len"] for record in records] == lens
    for output, record in zip(outputs, records, strict=True):
        assert len(output.outputs[0].token_ids) >= 1
        pages = _pages(record, recent=config.recent_tokens)
        by_layer = [sum(layer) for layer in pages]
        if "pyramid" in budgets:
            assert by_layer == sorted(by_layer, reverse=True)
            assert by_layer[0] > by_layer[-1]
        else:
            assert (len(set(by_layer)) > 1) == (budgets_class(budgets).scope == "model")
        is_uneven = any(len(set(layer)) > 1 for layer in pages)
        assert is_uneven == (budgets_class(budgets).scope != "head")


KVPRESS = json.loads((Path(__file__).parents[1] / "data" / "kvpress" / "answers.json").read_text())[
    "cases"
]


@pytest.mark.parametrize(
    "case", KVPRESS, ids=lambda c: f"{c['press']}-{c['kept']}-of-{c['prompt_len']}"
)
def test_same_answers_as_kvpress(engine, in_float32, case) -> None:
    """Where both keep as many tokens of the same kind; see kvpress_answers.py."""
    options = paper_options(case["press"])
    if case["press"] in ("snapkv", "criticalkv"):
        # kvpress' pooling; ours is the papers'.
        options |= {"pool_kernel": 5, "pool_kind": "avg"}
    kept = case["kept"]
    engine.kv_compress_reconfigure(
        method=case["press"], budget=kept, window=case["window"], options=options
    )
    outputs = _generate(engine, [{"prompt_token_ids": case["prompt"]}], max_tokens=12)
    (record,) = _records(engine, outputs)
    assert record["kept_tokens"] == kept
    assert {n for layer in record["kept_per_head"] for n in layer} == {kept}
    assert list(outputs[0].outputs[0].token_ids) == case["answer"]


def test_kvpress_answers_are_not_those_of_the_full_cache() -> None:
    for press in {case["press"] for case in KVPRESS}:
        assert any(case["answer"] != case["full"] for case in KVPRESS if case["press"] == press)


def test_attention_scores_find_what_a_control_loses(engine, needle) -> None:
    chats, codes = zip(*(needle(seed, 67) for seed in range(20, 24)), strict=True)
    prompts = [{"prompt_token_ids": _token_ids(engine, chat)} for chat in chats]
    found = {}
    for method in ("ada-snapkv", "random"):
        engine.kv_compress_reconfigure(method=method, budget=BUDGET - 128)
        outputs = _generate(engine, prompts, max_tokens=24)
        found[method] = sum(c in o.outputs[0].text for c, o in zip(codes, outputs, strict=True))
    assert found["ada-snapkv"] > found["random"]


# The compaction point before the prompt's end.

QUESTIONS = (
    "\nWhat is the secret code of the vault? Answer with the number only.<|im_end|>\n"
    "<|im_start|>assistant\n",
    "\nWho wrote a letter about the winter market, and why did he go home early?<|im_end|>\n"
    "<|im_start|>assistant\n",
)


def _context_and_questions(engine, needle, seed, sentences=60) -> tuple[list[int], list[list[int]]]:
    """A context that hides a code, and two questions of the same number of tokens."""
    tokenizer = engine.get_tokenizer()
    chat, _ = needle(seed, sentences)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    context = tokenizer.encode(text[: text.index("\nWhat is")], add_special_tokens=False)
    questions = [tokenizer.encode(question, add_special_tokens=False) for question in QUESTIONS]
    length = max(map(len, questions))
    filler = tokenizer.encode("\n", add_special_tokens=False)
    assert len(filler) == 1
    return context, [filler * (length - len(question)) + question for question in questions]


@pytest.mark.parametrize("method", ["kvc", "ada-snapkv", "h2o"])
def test_what_is_kept_does_not_depend_on_the_suffix(engine, needle, method) -> None:
    context, questions = _context_and_questions(engine, needle, 5)
    prompts = [{"prompt_token_ids": context + question} for question in questions]
    setting = {"method": method, "budget": BUDGET, "budgets": "joint"}
    kept = {}
    for suffix in (0, len(questions[0])):
        engine.kv_compress_reconfigure(**setting, suffix_tokens=suffix)
        outputs = _generate(engine, prompts)
        records = _records(engine, outputs)
        for record in records:
            _pages(record, KVCompressConfig(method).recent_tokens, suffix)
        kept[suffix > 0] = [record["kept_per_head"] for record in records]
    assert kept[True][0] == kept[True][1]
    assert kept[False][0] != kept[False][1]


def test_suffix_over_everything_kept_is_full_attention(
    engine, in_float32, needle, monkeypatch
) -> None:
    from vllm_kvcompress.memory.geometry import Geometry, RequestGeometry

    compressing = Geometry._of

    def keep_everything(self, prompt_len):
        geometry = compressing(self, prompt_len)
        # Only for prompts of this test; the rows of longer ones would not fit.
        if not geometry.is_compressed or prompt_len > 1300:
            return geometry
        num_blocks = geometry.first_kept_block
        return RequestGeometry(prompt_len, 32, num_blocks, num_blocks, geometry.compact_len)

    context, questions = _context_and_questions(engine, needle, 6)
    prompts = [{"prompt_token_ids": context + question} for question in questions]
    engine.kv_compress_reconfigure(method="snapkv", ratio=0.0)
    expected = _generate(engine, prompts, max_tokens=24, ignore_eos=True, logprobs=1)
    assert not any(record["compressed"] for record in _records(engine, expected))
    monkeypatch.setattr(Geometry, "_of", keep_everything)
    for granularity in ("page", "token"):
        # A budget that no other test uses: geometries are kept by setting.
        engine.kv_compress_reconfigure(
            method="ada-snapkv",
            budget=BUDGET - 1,
            granularity=granularity,
            suffix_tokens=len(questions[0]) - 3,
        )
        outputs = _generate(engine, prompts, max_tokens=24, ignore_eos=True, logprobs=1)
        for output, one, record in zip(outputs, expected, _records(engine, outputs), strict=True):
            assert record["compressed"] and record["evicted_tokens"] == 0
            assert output.outputs[0].token_ids == one.outputs[0].token_ids
            for mine, theirs in zip(
                output.outputs[0].logprobs, one.outputs[0].logprobs, strict=True
            ):
                token = next(iter(theirs))
                assert mine[token].logprob == pytest.approx(theirs[token].logprob, abs=2e-4)


def test_evicted_fact_is_unknown_to_the_suffix(engine, needle) -> None:
    chats, codes, prompts, suffixes = [], [], [], set()
    for seed in range(30, 34):
        context, questions = _context_and_questions(engine, needle, seed)
        chats.append(context)
        codes.append(needle(seed, 60)[1])
        prompts.append({"prompt_token_ids": context + questions[0]})
        suffixes.add(len(questions[0]))
    (suffix,) = suffixes
    found = {}
    for name, setting in {
        "dense": {"method": "streamingllm", "ratio": 0.0},
        "evicted": {"method": "streamingllm", "budget": BUDGET, "suffix_tokens": suffix},
    }.items():
        engine.kv_compress_reconfigure(**setting)
        outputs = _generate(engine, prompts, max_tokens=24)
        found[name] = sum(c in o.outputs[0].text for c, o in zip(codes, outputs, strict=True))
    assert found["dense"] >= 2
    assert found["evicted"] == 0


def test_suffixes_beside_other_rows_give_the_texts_they_give_alone(engine, device, needle) -> None:
    context, questions = _context_and_questions(engine, needle, 7)
    suffix = len(questions[0])
    engine.kv_compress_reconfigure(method="ada-snapkv", budget=BUDGET, suffix_tokens=suffix)
    prompts = [
        {"prompt_token_ids": context[: len(context) - 40 * i] + question}
        for i in range(3)
        for question in questions
    ]
    short = {"prompt_token_ids": context[:20] + questions[0]}
    settings = {"max_tokens": 16, "ignore_eos": True, "logprobs": 4}
    alone = [_generate(engine, [prompt], **settings)[0] for prompt in (*prompts, short)]
    together = _generate(engine, [*prompts, short], **settings)
    assert_same_texts(
        [Text.of(output) for output in together], [Text.of(output) for output in alone], device
    )
    records = {r["prompt_len"]: r["compressed"] for r in _records(engine, together)}
    assert not records.pop(20 + suffix)
    assert set(records.values()) == {True}


# What the scorers are told of the model.


def _parameters(engine, *needs):
    (layers,) = engine.collective_rpc(lambda worker: worker._layer_parameters(frozenset(needs)))
    assert len(layers) == NUM_LAYERS
    return layers


def test_output_weight_is_that_of_the_checkpoint(engine, in_float32, model) -> None:
    from safetensors import safe_open

    layers = _parameters(engine, "output_weight")
    with safe_open(Path(model) / "model.safetensors", framework="pt") as weights:
        for i, layer in enumerate(layers):
            expected = weights.get_tensor(f"model.layers.{i}.self_attn.o_proj.weight").float()
            expected = expected.t().view(NUM_HEADS, GROUP, HEAD_SIZE, -1)
            assert torch.equal(layer.output_weight, expected)
            assert layer.scale == HEAD_SIZE**-0.5
            assert layer.rotary is None


def test_output_root_is_a_root_of_the_projections_squares(engine, in_float32, model) -> None:
    weights = _parameters(engine, "output_weight")
    for layer, weight in zip(_parameters(engine, "output_root"), weights, strict=True):
        assert layer.output_weight is None
        assert layer.output_root.shape == (NUM_HEADS, HEAD_SIZE, HEAD_SIZE)
        columns = weight.output_weight.double()
        squares = (columns @ columns.mT).mean(dim=1)
        root = layer.output_root.double()
        torch.testing.assert_close(root @ root.mT, squares, rtol=1e-4, atol=1e-4)


def test_rotary_is_that_of_transformers(engine, in_float32, model) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rotary = _parameters(engine, "rotary")[7].rotary
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(model))
    query = torch.randn(1, 2, 40, HEAD_SIZE, generator=torch.Generator().manual_seed(0))
    for first in (0, 1, 1000, 2500):
        positions = torch.arange(first, first + 40)[None]
        cos, sin = theirs(query, positions)
        rotated, _ = apply_rotary_pos_emb(query, query, cos, sin)
        torch.testing.assert_close(rotary.unrotate(rotated, first), query, atol=1e-4, rtol=1e-4)
        # One query, rotated to each of the positions, and the mean of these.
        same = query[:, :, :1].expand(-1, -1, 40, -1)
        mean = apply_rotary_pos_emb(same, same, cos, sin)[0].mean(dim=2)
        matrix = rotary.mean_rotation(first, 40, HEAD_SIZE)
        torch.testing.assert_close(query[:, :, 0] @ matrix.t(), mean, atol=1e-4, rtol=1e-4)


# What cannot be reconfigured.


def _setting(engine) -> tuple[KVCompressConfig, KVCompressConfig]:
    """The scheduler's and the worker's."""
    core = engine.llm_engine.engine_core.engine_core
    (manager,) = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    (worker,) = engine.collective_rpc(lambda worker: worker._engine.config)
    return manager.kv_cache_spec.kv_compress, worker


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"method": "snapkv", "ratio": 0.3}, r"needs rows of \d+ blocks, .* started with \d+; "),
        ({"method": "snapkv", "budget": BUDGET + 64}, "needs rows of 91 blocks, .* with 89; "),
        (
            {"method": "snapkv", "budget": 47},
            "47 is smaller than the tokens always kept plus",
        ),
        ({"method": "best"}, "unknown KV-compression method 'best'"),
        (
            {"method": "knorm", "budgets": "static", "table": [1, 2, 3], "budget": BUDGET},
            "the budget table has 3 layers, the model 30",
        ),
        (
            {"method": "knorm", "budgets": "static", "table": [[1, 2]] * 30, "budget": BUDGET},
            "the budget table has 2 heads, the model 3",
        ),
    ],
    ids=["ratio", "budget", "no_page", "method", "layers", "heads"],
)
def test_refused_setting_leaves_the_old_one_in_place(engine, prompts, setting, message) -> None:
    engine.kv_compress_reconfigure(method="tova", budget=BUDGET)
    with pytest.raises(KVCompressConfigError, match=message) as error:
        engine.kv_compress_reconfigure(**setting)
    assert "\n" not in str(error.value)
    expected = KVCompressConfig("tova", budget=BUDGET)
    assert _setting(engine) == (expected, expected)
    (record,) = _records(engine, _generate(engine, prompts[:1], max_tokens=2))
    _pages(record, expected.recent_tokens)


def test_reloaded_weights_are_what_scores_are_made_of(engine, in_float32) -> None:
    engine.kv_compress_reconfigure(method="span", budget=BUDGET)

    def roots(worker, is_spoilt=False):
        layers = worker._engine.compactor.scoring.layers
        if is_spoilt:
            worker._engine.use_parameters(
                [replace(layer, output_root=layer.output_root * 0) for layer in layers]
            )
        return [layer.output_root.clone() for layer in worker._engine.compactor.scoring.layers]

    (before,) = engine.collective_rpc(roots)
    (spoilt,) = engine.collective_rpc(roots, args=(True,))
    assert not any(root.any() for root in spoilt)
    engine.collective_rpc("reload_weights")
    (after,) = engine.collective_rpc(roots)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
