"""Generation is paused and resumed while compressed prompts run, in an engine of its own process.

A tiny model in float32; what is expected are the texts that the same requests have undisturbed.
"""

from __future__ import annotations

import asyncio

import pytest
from in_process_engines import SHUTDOWN_S
from stepped_runs import params_of, prompt_of
from tiny_models import tiny_llama

pytestmark = pytest.mark.parametrize("device", ["cpu"], indirect=True, scope="module")
LENGTHS = (700, 300, 40, 450)
NUM_TOKENS = 60


class Engine:
    """An asynchronous engine, and the loop that its requests run in."""

    def __init__(self, path: str, dtype: str) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.loop = asyncio.new_event_loop()
        arguments = AsyncEngineArgs(
            model=path,
            dtype=dtype,
            max_model_len=1024,
            max_num_seqs=8,
            max_num_batched_tokens=256,
            block_size=32,
            num_gpu_blocks_override=80,
            kv_cache_memory_bytes=64 << 20,
            enforce_eager=True,
            enable_prefix_caching=True,
            additional_config={"kv_compress": {"method": "span", "ratio": 0.75}},
        )

        async def start():
            return AsyncLLM.from_engine_args(arguments)

        self.llm = self.run(start())

    def run(self, work):
        """The result of a coroutine."""
        return self.loop.run_until_complete(asyncio.wait_for(work, 300))

    async def ask(self, name: str, length: int, seen: dict[str, int]):
        """The last output of a request; `seen` follows how many tokens it has."""
        output = None
        async for output in self.llm.generate(
            prompt_of(length), params_of(max_tokens=NUM_TOKENS), name
        ):
            seen[name] = len(output.outputs[0].token_ids)
        return output

    def stop(self) -> None:
        """End the engine's process."""
        self.llm.shutdown(timeout=SHUTDOWN_S)
        self.loop.close()


@pytest.fixture(scope="module")
def engine(device, dtype, model, tmp_path_factory):
    engine = Engine(tiny_llama(tmp_path_factory.mktemp("llama"), model), dtype)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def texts(engine):
    """Tokens by prompt length, one request at a time."""
    return {n: _tokens(engine.run(engine.ask(f"alone{n}", n, {}))) for n in LENGTHS}


def _tokens(output) -> list[int]:
    return list(output.outputs[0].token_ids)


async def _until_some_tokens(seen: dict[str, int], num_tokens: int) -> None:
    while not any(length >= num_tokens for length in seen.values()):
        await asyncio.sleep(0.002)


async def _settled(seen: dict[str, int]) -> dict[str, int]:
    """How many tokens there are once what was under way has arrived."""
    await asyncio.sleep(0.5)
    return dict(seen)


def _start_all(engine, seen):
    return {n: asyncio.create_task(engine.ask(f"r{n}", n, seen)) for n in LENGTHS}


async def _cached_tokens(engine, length: int) -> int:
    return (await engine.ask("again", length, {})).num_cached_tokens


@pytest.mark.parametrize("clear_cache", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_kept_requests_go_on(engine, texts, clear_cache, num_tokens) -> None:
    """Clearing the cache preempts them, in whatever phase each of them is."""

    async def run():
        seen: dict[str, int] = {}
        tasks = _start_all(engine, seen)
        await _until_some_tokens(seen, num_tokens)
        await engine.llm.pause_generation(mode="keep", clear_cache=clear_cache)
        assert await engine.llm.is_paused()
        late = asyncio.create_task(engine.ask("late", 300, seen))
        before = await _settled(seen)
        await asyncio.sleep(0.3)
        assert seen == before and sum(before.values()) < NUM_TOKENS * len(LENGTHS)
        await engine.llm.resume_generation()
        assert not await engine.llm.is_paused()
        outputs = {n: await task for n, task in tasks.items()}
        return outputs, await late

    outputs, late = engine.run(run())
    assert {n: _tokens(output) for n, output in outputs.items()} == texts
    assert _tokens(late) == texts[300]


def test_waited_for_requests_end_first(engine, texts) -> None:
    async def run():
        seen: dict[str, int] = {}
        tasks = _start_all(engine, seen)
        await _until_some_tokens(seen, 3)
        await engine.llm.pause_generation(mode="wait", clear_cache=True)
        # Paused as they are, the requests have ended.
        assert await engine.llm.is_paused()
        outputs = {n: await task for n, task in tasks.items()}
        await engine.llm.resume_generation()
        return outputs, await _cached_tokens(engine, 700)

    outputs, cached = engine.run(run())
    assert {n: _tokens(output) for n, output in outputs.items()} == texts
    assert cached == 0


def test_aborted_requests_leave_an_engine_that_serves(engine, texts) -> None:
    async def run():
        seen: dict[str, int] = {}
        tasks = _start_all(engine, seen)
        await _until_some_tokens(seen, 3)
        await engine.llm.pause_generation(mode="abort")
        outputs = [await task for task in tasks.values()]
        await engine.llm.resume_generation()
        cached = await _cached_tokens(engine, 700)
        return outputs, cached, {n: await engine.ask(f"new{n}", n, {}) for n in LENGTHS}

    outputs, cached, after = engine.run(run())
    reasons = {output.outputs[0].finish_reason for output in outputs}
    assert reasons == {"abort"}
    assert cached == 0
    assert {n: _tokens(output) for n, output in after.items()} == texts


@pytest.mark.parametrize("level", [0, 1])
def test_sleep_and_wake_up(engine, texts, level) -> None:
    """On a CPU sleeping frees no memory; it pauses, and from level 1 on empties the cache."""

    async def run():
        seen: dict[str, int] = {}
        tasks = _start_all(engine, seen)
        await _until_some_tokens(seen, 3)
        await engine.llm.sleep(level, mode="keep")
        before = await _settled(seen)
        await asyncio.sleep(0.3)
        assert seen == before
        await engine.llm.wake_up()
        return {n: await task for n, task in tasks.items()}

    outputs = engine.run(run())
    assert {n: _tokens(output) for n, output in outputs.items()} == texts
