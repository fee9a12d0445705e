"""What single requests are refused for, as a 400, where vLLM validates their sampling parameters.

Of what is loaded there, only custom logits processors are asked about parameters. These change no
logits. vLLM's model runners want a class each.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2


class _NoPromptLogprobs:
    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse log-probabilities of a prompt's tokens, its own or given ones.

        Raises:
            ValueError: which vLLM answers the request with.
        """
        given_tokens = getattr(sampling_params, "prompt_logprob_token_ids", None)
        if sampling_params.prompt_logprobs is not None or given_tokens is not None:
            raise ValueError(
                "prompt_logprobs cannot be had with the KV compression option suffix_tokens: the "
                "prompt's last tokens do not see all of it"
            )


class NoPromptLogprobs(_NoPromptLogprobs, LogitsProcessor):
    """For Model Runner V1."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        """Nothing is needed of vLLM's configuration."""

    def is_argmax_invariant(self) -> bool:
        """The likeliest token stays the same."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Nothing is kept of a batch."""

    def apply(self, logits: Any) -> Any:
        """The same logits."""
        return logits


class NoPromptLogprobsV2(_NoPromptLogprobs, LogitsProcessorV2):
    """For Model Runner V2."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Whether a request's logits are to be changed: never."""
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        """The same logits."""
        return logits
