"""What compiled kernels must have to keep an H100's memory busy, and which kernels stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpu.pipelining import LoopLoad

# What one multiprocessor must have under way: 4.8 TB/s (H200) over 132 of them, for an assumed
# latency of 0.9 us; and 5.5 TB/s for 0.3 us of what is read again and stays in the L2 cache.
MEMORY_BYTES, CACHE_BYTES = 32 << 10, 14 << 10
# Smaller loads in a loop are indices.
LEAST_TILE_BYTES = 1 << 10


@dataclass(frozen=True)
class Stream:
    """What a kernel reads in its loop, and what that asks for.

    Attributes:
        source: the argument that points at it.
        min_blocks: per multiprocessor.
        why: it is a stream.
        is_pipelined: whether the next tile must be under way while the loop computes. Where few
            tiles are read, mostly from the L2 cache, other blocks are enough.
    """

    source: str
    min_blocks: int
    why: str
    is_pipelined: bool = True


STREAMS = {
    "ragged_decode_kernel": Stream("pool_ptr", 3, "all kept keys and values"),
    "window_sums_kernel": Stream("pool_ptr", 2, "all keys of a prompt"),
    "window_scores_kernel": Stream("pool_ptr", 2, "all keys of a prompt"),
    "defensive_scores_kernel": Stream("pool_ptr", 2, "all keys of a prompt"),
    "value_effect_kernel": Stream("pool_ptr", 2, "all values of a prompt"),
    "joint_digit_kernel": Stream("scores_ptr", 6, "scores of a stream, by four launches", False),
    "select_kernel": Stream("scores_ptr", 6, "scores of a stream, five times", False),
}
# Kernels with loops that read tensors, but no stream: why not.
NO_STREAMS = {
    "join_scores_kernel": "sums of parts of a head's scores, a turn for 256 of them",
    "decode_work_kernel": "a few words per stream, once per step",
    "move_entries_kernel": "one turn, a few where an entry is larger than a tile",
}
# Blocks per multiprocessor of every other kernel.
MIN_BLOCKS = 2
# Copies have all their loads under way at once, and other blocks to overlap with.
MIN_BLOCKS_OF = {"compact_kernel": 4, "move_entries_kernel": 4}
# Launches that may do with one block and half the bytes, by what they are asked for: rows of
# several queries are rare, and take more registers.
RELAXED = {("ragged_decode_kernel", "as many queries as it takes")}
# The same by warps. Eight mean 128 query rows: with the pooling some 320 operations per byte of a
# key, more than memory can keep waiting (an H100 does 295).
RELAXED_WARPS = {"defensive_scores_kernel": 8}
# A few registers kept elsewhere while a loop runs cost nothing; in the loop none may be.
MAX_STACK_BYTES = 16
# Elements that a thread copies at once of a pipelined stream, 16 bytes at most.
COPY_ELEMENTS = 8


def faults(
    kernel: str,
    launch: str,
    num_warps: int,
    loads: Sequence[LoopLoad],
    blocks: int,
    stack_bytes: int,
    loop_stack_accesses: int,
    narrow_loads: int,
) -> Iterator[str]:
    """What is wrong with a kernel compiled for compute capability 9.0, one line each.

    Args:
        kernel: its name.
        launch: what it is asked for.
        num_warps: of a block.
        loads: of its innermost loops.
        blocks: that one multiprocessor holds.
        stack_bytes: per thread.
        loop_stack_accesses: instructions in innermost loops that use it.
        narrow_loads: instructions that load one or two bytes.
    """
    stream = STREAMS.get(kernel)
    is_relaxed = (kernel, launch) in RELAXED or RELAXED_WARPS.get(kernel) == num_warps
    if stream is not None:
        yield from _stream_faults(stream, loads, blocks, is_relaxed)
    elif kernel not in NO_STREAMS:
        for load in loads:
            if load.num_bytes >= LEAST_TILE_BYTES:
                yield (
                    f"{load.name}: {load.tile} from {load.source} in a loop of a kernel that is in "
                    "neither STREAMS nor NO_STREAMS"
                )
    least = stream.min_blocks if stream else MIN_BLOCKS_OF.get(kernel, MIN_BLOCKS)
    if blocks < (1 if is_relaxed else least):
        yield f"{blocks} blocks per multiprocessor, wanted {least}"
    if stack_bytes > MAX_STACK_BYTES:
        yield f"{stack_bytes} bytes of stack, at most {MAX_STACK_BYTES}"
    if loop_stack_accesses:
        yield f"{loop_stack_accesses} accesses to the stack in a loop"
    if narrow_loads:
        yield f"{narrow_loads} loads of one or two bytes"


def _stream_faults(
    stream: Stream, loads: Sequence[LoopLoad], blocks: int, is_relaxed: bool
) -> Iterator[str]:
    streamed = [load for load in loads if load.source == stream.source]
    if not streamed:
        yield f"no loop loads from {stream.source}"
        return
    if stream.is_pipelined:
        for load in streamed:
            if load.num_buffers < 2:
                yield f"{load.name}: number of buffers {load.num_buffers}, wanted 2"
            if load.num_ahead < 1:
                yield f"{load.name}: nothing under way while the loop waits"
            wanted = min(16, COPY_ELEMENTS * load.item_bytes)
            if load.num_buffers and load.copy_bytes < wanted:
                yield f"{load.name}: {load.copy_bytes} bytes at once, wanted {wanted}"
    under_way = blocks * block_bytes(streamed)
    wanted = MEMORY_BYTES if stream.is_pipelined else CACHE_BYTES
    wanted //= 1 + is_relaxed
    if under_way < wanted:
        yield f"{under_way} bytes under way per multiprocessor, wanted {wanted}"


def block_bytes(streamed: Sequence[LoopLoad]) -> int:
    """Bytes that one block has under way in the loop that has fewest.

    The tile that a block waits for, and those behind it.
    """
    by_loop: dict[int, int] = {}
    for load in streamed:
        num_bytes = (1 + load.num_ahead) * load.num_bytes
        by_loop[load.loop] = by_loop.get(load.loop, 0) + num_bytes
    return min(by_loop.values())
