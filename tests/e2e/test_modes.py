"""Ways to run the same engine: eager or compiled (on a GPU in captured graphs), scheduling ahead or
not, either of vLLM's model runners. The texts are the same.

The CUDA side without a GPU is in test_platforms.py.
"""

from __future__ import annotations

import random

import pytest
from devices import ON_A_GPU, Text, assert_same_texts
from in_process_engines import start, stop
from tiny_models import tiny_llama

pytestmark = pytest.mark.parametrize("device", ["cpu", ON_A_GPU], indirect=True, scope="module")
# (Model Runner V2, settings), by name; the first is what the others are compared with.
MODES = {
    "cpu": {
        "eager_sync": (False, {"async_scheduling": False}),
        "compiled_async": (False, {"enforce_eager": False}),
    },
    "cuda": {
        "v2_eager_sync": (True, {"async_scheduling": False}),
        "v2_eager_async": (True, {}),
        "v2_graphs_sync": (True, {"enforce_eager": False, "async_scheduling": False}),
        "v2_graphs_async": (True, {"enforce_eager": False}),
        "v1_graphs_async": (False, {"enforce_eager": False}),
    },
}
LENGTHS = (300, 611, 40, 352, 277, 95, 480)
# Chunks and whole prompts, blocks for some of them at a time.
ENGINE = {
    "kv_compress": "span",
    "kv_compress_ratio": 0.75,
    "max_model_len": 1024,
    "max_num_batched_tokens": 320,
    "num_gpu_blocks_override": 41,
    "async_scheduling": True,
}


def _prompt(length: int) -> list[int]:
    draw = random.Random(length).randrange
    return [draw(5, 40_000) for _ in range(length)]


def _generate(path: str, dtype: str, settings: dict) -> tuple[list[Text], list[bool]]:
    from vllm import SamplingParams

    engine = start(path, dtype=dtype, **{**ENGINE, **settings})
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=4)
    prompts = [{"prompt_token_ids": _prompt(n)} for n in LENGTHS]
    texts = [Text.of(output) for output in engine.generate(prompts, params, use_tqdm=False)]
    records = {r["request_id"]: r for r in engine.kv_compress_stats()["requests"]}
    stop(engine)
    return texts, [records[text.id]["compressed"] for text in texts]


def test_texts_are_the_same(device, dtype, model, tmp_path_factory, monkeypatch) -> None:
    # Compiling takes longer than all else, the more so the more layers.
    path = tiny_llama(tmp_path_factory.mktemp("llama"), model, num_hidden_layers=2)
    expected: list[Text] = []
    for is_v2, settings in MODES[device].values():
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(is_v2)))
        texts, compressed = _generate(path, dtype, settings)
        assert compressed == [length > 40 for length in LENGTHS]
        expected = expected or texts
        assert_same_texts(texts, expected, device)
