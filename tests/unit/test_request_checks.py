"""Single requests that are refused where vLLM validates their sampling parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import validate_logits_processors_parameters
from vllm.v1.worker.gpu.sample.logits_processor import (
    build_custom_logits_processors_params_validator,
)

from vllm_kvcompress.vllm_integration.register import register

# Any model's config will do.
MODEL = Path(__file__).parents[2] / "configs" / "models" / "llama-3.1-8b"
V2 = "vllm_kvcompress.vllm_integration.request_checks:NoPromptLogprobsV2"


def processors(**options):
    """Logits processors of an engine with these options."""
    register()
    setting = {"method": "snapkv", "ratio": 0.5, "options": options}
    config = EngineArgs(
        model=str(MODEL),
        skip_tokenizer_init=True,
        max_model_len=4096,
        additional_config={"kv_compress": setting},
    ).create_engine_config()
    return config.model_config.logits_processors


@pytest.mark.parametrize("wanted", [0, 5, -1])
def test_a_suffix_has_no_prompt_logprobs(wanted):
    found = processors(suffix_tokens=20)
    with pytest.raises(VLLMValidationError, match="prompt_logprobs cannot be had"):
        validate_logits_processors_parameters(found, SamplingParams(prompt_logprobs=wanted))
    validate_logits_processors_parameters(found, SamplingParams(logprobs=5))


def test_a_suffix_has_no_logprobs_of_given_tokens():
    found = processors(suffix_tokens=20)
    params = SamplingParams(prompt_logprob_token_ids=[[1, 2]])
    with pytest.raises(VLLMValidationError, match="prompt_logprobs cannot be had"):
        validate_logits_processors_parameters(found, params)


def test_without_a_suffix_nothing_is_added():
    assert not processors()


def test_on_model_runner_v2():
    check = build_custom_logits_processors_params_validator([V2])
    with pytest.raises(VLLMValidationError, match="prompt_logprobs cannot be had"):
        check(SamplingParams(prompt_logprobs=1))
    check(SamplingParams(logprobs=1))
