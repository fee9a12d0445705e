"""Times of calls: replays of captured graphs on a GPU, plain calls on a CPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from gpu.shapes import ModelShape

from timing.case import Call

NUM_HOST_CALLS = 3
COPY_BYTES = {"cuda": 2**30, "cpu": 2**24}
MATRIX_SIZE = {"cuda": 8192, "cpu": 256}

Measure = Callable[[Call], dict[str, Any]]


def captured(run: Call) -> tuple[Call, str]:
    """(what to time, how): the replay of a graph of one call, or the call itself.

    What the call returns stays in the graph's own memory until the replay is dropped.
    """
    # Compiles, and takes memory that is not to be taken in the capture.
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception as error:
        print(f"not captured: {type(error).__name__}: {error}")
        torch.cuda.synchronize()
        return run, "eager"
    return graph.replay, "graph"


def time_us(run: Call) -> dict[str, Any]:
    """p20, p50 and p80 of a call on a GPU, in microseconds, L2 flushed before each."""
    timed, how = captured(run)
    quantiles = triton.testing.do_bench(timed, warmup=50, rep=200, quantiles=[0.2, 0.5, 0.8])
    return _quantiles_us([1000 * q for q in quantiles], how)


def host_time_us(run: Call) -> dict[str, Any]:
    """The same of plain calls on a CPU: only for a dry run."""
    run()
    times = []
    for _ in range(NUM_HOST_CALLS):
        start = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - start))
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return _quantiles_us([fifths[0], statistics.median(times), fifths[3]], "call")


def _quantiles_us(times: list[float], how: str) -> dict[str, Any]:
    return {**dict(zip(("p20_us", "p50_us", "p80_us"), times, strict=True)), "timed": how}


def measure_on(device: torch.device) -> Measure:
    """How calls are timed there."""
    return time_us if device.type == "cuda" else host_time_us


def free_bytes(device: torch.device) -> float:
    """What a GPU has left, once tensors that are gone are given back; no limit on a CPU."""
    if device.type != "cuda":
        return float("inf")
    # Cases refer to themselves.
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a plain copy, read and written bytes."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = measure_on(device)(lambda: target.copy_(source))
    return 2 * source.numel() / times["p50_us"] / 1000


def matmul_rate(device: torch.device) -> float:
    """bf16 TFLOP/s of a square product."""
    size = MATRIX_SIZE[device.type]
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / measure_on(device)(lambda: a @ a)["p50_us"] / 1e6


def prefill_us(shape: ModelShape, prompt_len: int, tflops: float) -> float:
    """Prefill of a prompt at a matrix rate: 2 x parameters x tokens, and causal attention."""
    linear = 2 * shape.num_parameters * prompt_len
    attention = 2 * shape.num_layers * shape.num_heads * shape.head_size * prompt_len**2
    return (linear + attention) / tflops / 1e6
