"""A model in transformers' own code (`--model-impl transformers`) keeps and says the same.

A tiny model in float32; what is expected is vLLM's own implementation of it.
"""

from __future__ import annotations

import pytest
from devices import Text, assert_same_texts
from in_process_engines import start, stop
from stepped_runs import params_of, prompt_of
from tiny_models import tiny_llama

pytestmark = pytest.mark.parametrize("device", ["cpu"], indirect=True, scope="module")
PROMPTS = [prompt_of(length) for length in (700, 333, 40)]


def _run(path, dtype, model_impl):
    """Texts, what each head kept, and the name of the model's class."""
    engine = start(
        path,
        dtype=dtype,
        model_impl=model_impl,
        kv_compress="span",
        kv_compress_ratio=0.75,
        max_num_batched_tokens=512,
    )
    outputs = engine.generate(PROMPTS, params_of(logprobs=4), use_tqdm=False)
    records = {r["request_id"]: r["kept_per_head"] for r in engine.kv_compress_stats()["requests"]}
    (name,) = engine.apply_model(lambda model: type(model).__name__)
    stop(engine)
    texts = [Text.of(output) for output in outputs]
    return texts, [records[text.id] for text in texts], name


def test_texts_and_kept_tokens_are_the_same(
    device, dtype, engines_in_process, model, tmp_path_factory
) -> None:
    path = tiny_llama(tmp_path_factory.mktemp("llama"), model)
    texts, kept, name = _run(path, dtype, "vllm")
    assert name == "LlamaForCausalLM"
    other_texts, other_kept, other_name = _run(path, dtype, "transformers")
    assert other_name.startswith("Transformers")
    assert_same_texts(other_texts, texts, device)
    assert other_kept == kept
    assert sum(map(sum, kept[0])) < 0.3 * 700 * sum(map(len, kept[0]))
