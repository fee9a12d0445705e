"""vLLM engines in the test's own process, whose workers can be looked into, one at a time."""

from __future__ import annotations

from typing import Any

# For engines in processes of their own. After its own 5 seconds vLLM kills what is left, and fails
# if a process has just ended by itself.
SHUTDOWN_S = 60.0
# An engine for tests.
SMALL = {
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 32,
    "enforce_eager": True,
}


def start(path: str, **settings: Any):
    """An engine with test-sized defaults; `stop` it before the next one."""
    from vllm_kvcompress import LLM

    return LLM(path, **{**SMALL, "disable_log_stats": False, **settings})


def stop(engine: Any) -> None:
    """Shut an engine down, and leave a process that can start another."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
