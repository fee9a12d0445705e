"""A model of how long decode attention takes. Arithmetic, nothing measured.

    python scripts/gpu/decode_model.py

What it assumes of one layer's launch:

* Persistent programs, as many as the GPU holds at once, share the tiles equally; where each would
  have fewer than `least_tiles`, fewer work. The share is rounded up to whole tiles.
* All keys and values come at a part of the bandwidth of a copy (`page_efficiency`: pages lie in any
  order), or as slowly as one program gets through its share, if that is longer: it has its tiles
  under way once per latency of the memory, and starts anew with each further stream.
* Starting takes loads that wait for each other: of the share, of the row, of the block table, of
  the first tile. Once, for all programs together; further starts leave the memory to others.
* Every program that works leaves two pieces of streams that it shares, unless shares are whole
  streams. They are written, and read by the last of a stream's programs, which waits for a ticket
  and for them. That adds to the time of the launch.
* A launch has a fixed cost, which the next kernel of a graph cannot hide.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.shapes import ModelShape, read_shapes

POINTS = ((1, 4096), (8, 1024), (32, 1024), (32, 4096), (256, 1024))
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Gpu:
    """What a GPU is assumed to do.

    Attributes:
        copy_gbs: GB/s of a large copy.
        num_sms: multiprocessors.
        page_efficiency: part of that which reading pages in any order reaches.
        latency_us: of one load from memory that is busy.
        launch_us: from one kernel of a graph to the next.
    """

    name: str
    copy_gbs: float
    num_sms: int = 132
    page_efficiency: float = 0.92
    latency_us: float = 0.9
    launch_us: float = 1.5


@dataclass(frozen=True)
class Kernel:
    """What the decode kernel is compiled to, and how it works.

    Attributes:
        tile_tokens: of a tile.
        programs_per_sm: that fit at once.
        tiles_ahead: under way while the loop computes.
        least_tiles: of a program that works.
        start_loads: loads that wait for each other before a stream's first product.
        merge_loads: the same of merging: ticket, pieces.
    """

    tile_tokens: int = 32
    programs_per_sm: int = 4
    tiles_ahead: int = 2
    least_tiles: int = 4
    start_loads: int = 4
    merge_loads: int = 2


@dataclass(frozen=True)
class Estimate:
    """One layer of one step.

    Attributes:
        num_programs: launched.
        num_working: of them, with tiles.
        floor_us: of moving keys and values at the bandwidth of a copy.
        estimate_us: of the launch.
    """

    num_programs: int
    num_working: int
    floor_us: float
    estimate_us: float

    @property
    def of_copy(self) -> float:
        """Share of the bandwidth of a copy."""
        return self.floor_us / self.estimate_us


def estimate(gpu: Gpu, kernel: Kernel, shape: ModelShape, batch: int, kept: int) -> Estimate:
    """A layer of a step of `batch` rows with `kept` tokens in every KV head."""
    num_streams = batch * shape.num_kv_heads
    tiles_per_stream = math.ceil(kept / kernel.tile_tokens)
    num_tiles = num_streams * tiles_per_stream
    num_programs = gpu.num_sms * kernel.programs_per_sm
    num_working = min(num_programs, math.ceil(num_tiles / kernel.least_tiles))
    share = math.ceil(num_tiles / num_working)
    tile_bytes = kernel.tile_tokens * shape.token_bytes
    bytes_per_us = gpu.copy_gbs * 1000
    floor_us = num_streams * kept * shape.token_bytes / bytes_per_us
    start_us = kernel.start_loads * gpu.latency_us
    # A share may begin and end inside streams.
    further_starts = math.ceil((share - 1) / tiles_per_stream)
    memory_us = share * num_working * tile_bytes / (bytes_per_us * gpu.page_efficiency)
    program_us = share * gpu.latency_us / (1 + kernel.tiles_ahead) + further_starts * start_us
    merge_us = 0.0
    if share % tiles_per_stream or num_tiles % num_working:
        piece_bytes = shape.group * (shape.head_size + 1) * FLOAT_BYTES
        merge_us = kernel.merge_loads * gpu.latency_us
        merge_us += 2 * 2 * num_working * piece_bytes / bytes_per_us
    total = gpu.launch_us + start_us + max(memory_us, program_us) + merge_us
    return Estimate(num_programs, num_working, floor_us, total)


def table(gpus: list[Gpu], kernel: Kernel, shape: ModelShape) -> str:
    """Markdown, a row per batch and length; the first GPU's times, and every GPU's share."""
    shares = " / ".join(gpu.name for gpu in gpus)
    lines = [
        f"{shape.name}, one layer; a model, not measured: tiles of {kernel.tile_tokens} tokens, "
        f"{kernel.programs_per_sm} programs per multiprocessor, {gpus[0].latency_us} us per load, "
        f"{gpus[0].launch_us} us per launch, pages at {gpus[0].page_efficiency:.0%} of copies of "
        + " and ".join(f"{gpu.copy_gbs / 1000:.1f} TB/s ({gpu.name})" for gpu in gpus),
        "",
        f"| batch x kept | programs working / launched | floor us, {gpus[0].name} | estimate us | "
        f"% of copy {shares} |",
        "|---|---|---|---|---|",
    ]
    for batch, kept in POINTS:
        found = [estimate(gpu, kernel, shape, batch, kept) for gpu in gpus]
        first = found[0]
        percent = " / ".join(f"{100 * each.of_copy:.0f}" for each in found)
        lines.append(
            f"| {batch} x {kept} | {first.num_working} / {first.num_programs} | "
            f"{first.floor_us:.1f} | {first.estimate_us:.1f} | {percent} |"
        )
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes, usual = read_shapes(), Kernel()
    parser.add_argument("--shape", choices=list(shapes), default="Llama-3.1-8B")
    for name, default in vars(usual).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--latency-us", type=float, default=Gpu.latency_us, help="of one load")
    parser.add_argument(
        "--launch-us", type=float, default=Gpu.launch_us, help="of a graph's kernel"
    )
    arguments = parser.parse_args()
    costs = {"latency_us": arguments.latency_us, "launch_us": arguments.launch_us}
    gpus = [Gpu("H100", 3000, **costs), Gpu("H200", 4300, **costs)]
    kernel = Kernel(**{name: getattr(arguments, name) for name in vars(usual)})
    print(table(gpus, kernel, shapes[arguments.shape]))


if __name__ == "__main__":
    main()
