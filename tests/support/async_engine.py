"""vLLM's AsyncLLM, its engine in a process of its own, for tests that are not asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable
from typing import Any

from in_process_engines import SHUTDOWN_S, SMALL

# Seconds; an engine that has died answers at once, one that hangs does not.
_PATIENCE = 240


class AsyncEngine:
    """An engine with test-sized defaults; `stop` it."""

    def __init__(self, path: str, **settings: Any) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._loop = asyncio.new_event_loop()
        args = AsyncEngineArgs(model=path, **{**SMALL, "dtype": "float32", **settings})
        self.llm = AsyncLLM.from_engine_args(args)
        self._num_requests = 0

    def stop(self) -> None:
        """Shut the engine down."""
        self.llm.shutdown(timeout=SHUTDOWN_S)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def wait(self, *work: Awaitable[Any]) -> list[Any]:
        """Results of what is done side by side, exceptions in the place of results."""

        async def all_of_it() -> list[Any]:
            return await asyncio.gather(*work, return_exceptions=True)

        return self._loop.run_until_complete(asyncio.wait_for(all_of_it(), _PATIENCE))

    async def tokens(self, prompt: Any, params: dict[str, Any], most: int = 0, **how: Any) -> list:
        """Token ids of an answer; the first `most` of them, after which it is aborted.

        Args:
            prompt: token ids, or anything else that vLLM takes.
            params: of sampling; 8 tokens that are the likeliest, unless they say otherwise.
            most: 0 = all.
            how: other arguments of `generate`.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._num_requests += 1
        defaults = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
        sampling = SamplingParams(**{**defaults, **params}, output_kind=RequestOutputKind.DELTA)
        if isinstance(prompt, list):
            prompt = {"prompt_token_ids": prompt}
        found: list[int] = []
        outputs = self.llm.generate(prompt, sampling, f"request-{self._num_requests}", **how)
        async for output in outputs:
            for sample in output.outputs:
                found += sample.token_ids
            if most and len(found) >= most:
                # vLLM aborts a request whose generator is closed.
                await outputs.aclose()
                break
        return found

    def session(self, parts: Iterable[list[int]], params: dict[str, Any], **how: Any) -> Any:
        """As `tokens`, of a streaming-input session whose prompt comes in parts."""
        return self.tokens(_inputs(parts, how.pop("pause", 0.0)), params, **how)

    def is_idle(self) -> bool:
        """Whether no request holds a block: only then vLLM can reset its prefix cache."""
        (is_reset,) = self.wait(self.llm.reset_prefix_cache())
        return is_reset is True

    def stats(self) -> dict[str, Any]:
        """Counts of compression."""
        ((rank,),) = self.wait(self.llm.collective_rpc("kv_compress_stats"))
        return rank


async def _inputs(parts: Iterable[list[int]], pause: float) -> AsyncGenerator[Any, None]:
    from vllm.engine.protocol import StreamingInput

    for part in parts:
        yield StreamingInput(prompt={"prompt_token_ids": part})
        await asyncio.sleep(pause)
