"""Engines of the test's own process, stepped by hand: what happens between two steps is certain."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any


def prompt_of(length: int, seed: int = 0) -> dict[str, list[int]]:
    """A prompt of random tokens, the same for the same arguments."""
    draw = random.Random(1000 * seed + length).randrange
    return {"prompt_token_ids": [draw(5, 40_000) for _ in range(length)]}


def params_of(**settings: Any):
    """Greedy sampling to the last token, unless said otherwise."""
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": 24, "ignore_eos": True, **settings})


def alone(engine: Any, prompt: dict, **settings: Any):
    """The output of a request that has the engine to itself, on an empty prefix cache."""
    assert engine.reset_prefix_cache()
    return engine.generate(prompt, params_of(**settings), use_tqdm=False)[0]


def step_through(
    engine: Any,
    requests: Iterable[tuple[str, dict, Any]] = (),
    on_step: Callable[[int, dict], None] | None = None,
) -> dict[str, Any]:
    """Add the requests and step until none is left.

    Args:
        engine: of this process.
        requests: id, prompt and sampling parameters of each.
        on_step: called after each step with its number, from 0, and the outputs so far.

    Returns:
        The last output of each request by its id.
    """
    llm_engine, outputs, step = engine.llm_engine, {}, 0
    for name, prompt, params in requests:
        llm_engine.add_request(name, prompt, params)
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            # Each sample of a request comes by itself.
            new = {sample.index for sample in output.outputs}
            known = outputs.get(output.request_id)
            others = [s for s in known.outputs if s.index not in new] if known else []
            output.outputs = sorted([*others, *output.outputs], key=lambda s: s.index)
            outputs[output.request_id] = output
        if on_step is not None:
            on_step(step, outputs)
        step += 1
        assert step < 5000, "the engine makes no progress"
    return outputs


def preempt_all(engine: Any) -> None:
    """Preempt every running request; they are computed again, the prefix cache being empty."""
    assert engine.llm_engine.reset_prefix_cache(reset_running_requests=True)


def scheduler_of(engine: Any):
    """The engine's scheduler."""
    return engine.llm_engine.engine_core.engine_core.scheduler


def assert_pool_is_whole(engine: Any) -> None:
    """No request is left, each block but the null block is free, and none is remembered.

    What a failed test has left is aborted first, so that the next one starts from nothing.
    """
    from vllm_kvcompress.vllm_integration.scheduler.manager import compressing_manager

    scheduler = scheduler_of(engine)
    left = list(scheduler.requests)
    if left:
        engine.llm_engine.abort_request(left, internal=True)
        engine.llm_engine.step()
    assert not left
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    manager = compressing_manager(scheduler.kv_cache_manager.coordinator)
    assert not any(manager.req_to_blocks.values())


def records_of(engine: Any) -> dict[str, dict]:
    """What was kept, by request id."""
    return {record["request_id"]: record for record in engine.kv_compress_stats()["requests"]}


def tokens_of(output: Any) -> list[int]:
    """The first sample's."""
    return list(output.outputs[0].token_ids)
