"""vLLM's scheduler with our block manager, and a made-up model that answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_kvcompress.config import KVCompressConfig
from vllm_kvcompress.vllm_integration.scheduler.spec import KVCompressSpec

BLOCK_SIZE = 16
# Any model's config will do.
_MODEL = Path(__file__).parents[2] / "configs" / "models" / "llama-3.1-8b"
_TOKEN, _STOP_TOKEN = 7, 9


@dataclass
class Trace:
    """What a run did.

    Attributes:
        steps: request ids and tokens of each step.
        num_preempted: requests preempted, over all steps.
        most_running: requests that ran at once.
    """

    steps: list[dict[str, int]] = field(default_factory=list)
    num_preempted: int = 0
    most_running: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return sum(sum(step.values()) for step in self.steps)


def make_scheduler(
    kv_compress: dict[str, Any] | None,
    num_blocks: int,
    max_model_len: int,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 2048,
) -> Any:
    """vLLM's synchronous scheduler, ours if there is a setting.

    Args:
        kv_compress: the setting; None for stock vLLM.
        num_blocks: usable blocks of `BLOCK_SIZE` tokens.
        max_model_len: tokens of the longest request.
        max_num_seqs: requests that run at once.
        max_num_batched_tokens: of a step.
    """
    settings = {} if kv_compress is None else {"kv_compress": kv_compress}
    config = EngineArgs(
        model=str(_MODEL),
        skip_tokenizer_init=True,
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        async_scheduling=False,
        additional_config=settings,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = num_blocks + 1
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=3, head_size=64, dtype=torch.bfloat16
    )
    if kv_compress is not None:
        one_shot = max_num_batched_tokens - max_num_seqs
        own = KVCompressConfig.from_dict(kv_compress)
        spec = KVCompressSpec.from_full_attention(spec, own, one_shot_tokens=one_shot)
    cache_config = KVCacheConfig(
        num_blocks=num_blocks + 1,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        prefix_cache_retention_interval=config.cache_config.prefix_cache_retention_interval,
    )
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=cache_config,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )


def make_requests(
    num: int, prompt_len: int, max_tokens: int, is_certain: bool = True
) -> list[Request]:
    """Requests without a token in common.

    Args:
        num: of them.
        prompt_len: tokens of each prompt.
        max_tokens: tokens of each answer at most.
        is_certain: whether answers have exactly that many.
    """
    init_none_hash(sha256)
    return [
        Request(
            f"r{i}",
            list(range(i * prompt_len, (i + 1) * prompt_len)),
            SamplingParams(
                max_tokens=max_tokens,
                ignore_eos=is_certain,
                stop_token_ids=None if is_certain else [_STOP_TOKEN],
            ),
            None,
            block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
        )
        for i in range(num)
    ]


def run(
    scheduler: Any, requests: Sequence[Request], answer_lens: Sequence[int] | None = None
) -> Trace:
    """Schedule until all requests have ended.

    Args:
        scheduler: of `make_scheduler`.
        requests: all there at once.
        answer_lens: tokens after which each answer stops; None: at its max_tokens.
    """
    for request in requests:
        scheduler.add_request(request)
    lens = answer_lens or [request.max_tokens for request in requests]
    ends = dict(zip((request.request_id for request in requests), lens, strict=True))
    trace = Trace()
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        assert names, "nothing is scheduled, with requests left"
        trace.steps.append(dict(output.num_scheduled_tokens))
        trace.num_preempted += len(output.preempted_req_ids or ())
        trace.most_running = max(trace.most_running, len(scheduler.running))
        sampled = []
        for name in names:
            request = scheduler.requests[name]
            is_whole = request.num_computed_tokens >= request.num_tokens
            is_last = request.num_output_tokens + 1 >= ends[name]
            sampled.append([_STOP_TOKEN if is_last else _TOKEN] if is_whole else [])
        places = {name: i for i, name in enumerate(names)}
        model_output = ModelRunnerOutput(
            req_ids=names, req_id_to_index=places, sampled_token_ids=sampled
        )
        scheduler.update_from_output(output, model_output)
    return trace
