"""How many blocks of a kernel one multiprocessor holds, by what each takes."""

from __future__ import annotations

from dataclasses import dataclass

WARP_THREADS = 32
# Registers are allocated per warp in this unit, from a quarter of the file each.
REGISTER_UNIT, REGISTERS, NUM_QUARTERS = 256, 65536, 4
SHARED_UNIT_BYTES = 128


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor has.

    Attributes:
        shared_bytes: shared memory for all blocks.
        reserved_bytes: of it, taken by the system for each block.
        max_threads: resident at once.
        max_blocks: resident at once.
    """

    shared_bytes: int
    reserved_bytes: int
    max_threads: int
    max_blocks: int

    @property
    def max_block_shared_bytes(self) -> int:
        """Most that one block may ask for."""
        return self.shared_bytes - self.reserved_bytes

    def blocks(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Blocks that fit at once; 0 if one is too large.

        Args:
            registers: per thread.
            shared_bytes: per block.
            num_warps: per block.
        """
        warp_registers = _rounded_up(max(registers, 1) * WARP_THREADS, REGISTER_UNIT)
        num_warps_held = NUM_QUARTERS * (REGISTERS // NUM_QUARTERS // warp_registers)
        block_shared = _rounded_up(shared_bytes + self.reserved_bytes, SHARED_UNIT_BYTES)
        return min(
            num_warps_held // num_warps,
            self.shared_bytes // block_shared if block_shared else self.max_blocks,
            self.max_threads // (num_warps * WARP_THREADS),
            self.max_blocks,
        )


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


# By compute capability x 10; CUDA C++ Programming Guide, technical specifications.
MULTIPROCESSORS = {
    75: Multiprocessor(64 << 10, 0, 1024, 16),
    80: Multiprocessor(164 << 10, 1 << 10, 2048, 32),
    86: Multiprocessor(100 << 10, 1 << 10, 1536, 16),
    87: Multiprocessor(164 << 10, 1 << 10, 1536, 16),
    89: Multiprocessor(100 << 10, 1 << 10, 1536, 24),
    90: Multiprocessor(228 << 10, 1 << 10, 2048, 32),
    100: Multiprocessor(228 << 10, 1 << 10, 2048, 32),
    103: Multiprocessor(228 << 10, 1 << 10, 2048, 32),
    120: Multiprocessor(100 << 10, 1 << 10, 1536, 24),
}
