"""How the decode attention of a step is shared out among a GPU's programs, for all its layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_kvcompress.ops.checks import check
from vllm_kvcompress.ops.decode import reference
from vllm_kvcompress.ops.dispatch import by_triton, choose, triton_kernels
from vllm_kvcompress.ops.limits import (
    HEAD_SIZES,
    MAX_GROUP,
    MAX_QUERY_LEN,
    check_page_offsets,
    check_query_starts,
    check_rows,
)
from vllm_kvcompress.ops.structs import Rows

_MULTIPROCESSORS_WITHOUT_GPU = 2
_SHARE_OUT = {"triton": by_triton("decode_work"), "reference": reference.decode_work}


@dataclass(frozen=True)
class DecodeWork:
    """Equal shares of the tiles of every layer, and room for what shared streams leave behind.

    A stream's tokens are cut into tiles; streams lie one after another in the order `row * H +
    head`, and so do the T tiles of a layer. Program p of P takes tiles `[p * T / P, (p + 1) * T /
    P)`; fewer programs work where each would have less than `tiles.least_tiles`. All tensors may be
    kept at fixed addresses for captured graphs, whose replays read what `decode_work` has written
    last. One step's launches must not overlap with another's.

    Attributes:
        tile_starts: [L, R * H + 1] int32, first tile of every stream; the rows may be fewer than R.
        num_tiles: [L] int32, T.
        first_streams: [L, P] int32, the stream that a program's first tile belongs to.
        pieces: [2 P, M, d] float32, results of streams that programs share, M query rows.
        piece_lse: [2 P, M] float32, base-2 logarithms of their sums.
        tickets: [P] int32, how many pieces there are already of the stream that program p begins;
            zeros between launches.
        tiles: `triton_kernels.DecodeTiles`, how a program works.
    """

    tile_starts: torch.Tensor
    num_tiles: torch.Tensor
    first_streams: torch.Tensor
    pieces: torch.Tensor
    piece_lse: torch.Tensor
    tickets: torch.Tensor
    tiles: Any

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        lists = [self.tile_starts, self.num_tiles, self.first_streams]
        shared = [self.pieces, self.piece_lse, self.tickets]
        return sum(tensor.numel() * tensor.element_size() for tensor in lists + shared)

    def for_rows(self, num_rows: int, num_kv_heads: int) -> DecodeWork:
        """New lists for so many rows. The room for pieces is shared: never launch both at once."""
        size = (self.tile_starts.shape[0], num_rows * num_kv_heads + 1)
        return replace(
            self,
            tile_starts=self.tile_starts.new_empty(size),
            num_tiles=torch.empty_like(self.num_tiles),
            first_streams=torch.empty_like(self.first_streams),
        )


def new_decode_work(
    num_rows: int,
    *,
    num_layers: int,
    num_kv_heads: int,
    group: int,
    head_size: int,
    pool_dtype: torch.dtype,
    device: torch.device,
    max_query_len: int = 1,
    num_sms: int | None = None,
    num_programs: int | None = None,
) -> DecodeWork:
    """Room for the work of steps of up to so many rows; nothing in it but the tickets' zeros.

    Args:
        num_rows: R, the most rows of a step.
        num_layers: L.
        num_kv_heads: H.
        group: query heads per KV head, 1 to 16.
        head_size: d.
        pool_dtype: of the KV pool.
        device: of the pool.
        max_query_len: most queries of a row, 1 to 8.
        num_sms: multiprocessors of the GPU; None = asked of `device`.
        num_programs: P; None = as many as the GPU holds at once.

    Raises:
        ValueError: on numbers that do not fit.
        RuntimeError: if Triton is missing.
    """
    check(num_rows >= 0 and num_layers > 0 and num_kv_heads > 0, "want rows, layers and KV heads")
    check(head_size in HEAD_SIZES, f"head size {head_size} is none of {HEAD_SIZES}")
    check(1 <= group <= MAX_GROUP, f"a KV head has 1 to {MAX_GROUP} query heads, not {group}")
    check(
        1 <= max_query_len <= MAX_QUERY_LEN,
        f"rows may have 1 to {MAX_QUERY_LEN} queries, not {max_query_len}",
    )
    check(num_programs is None or num_programs > 0, f"{num_programs} programs do no work")
    piece_rows = group * max_query_len
    padded_head_size = 1 << (head_size - 1).bit_length()
    tiles = triton_kernels().decode_tiles(piece_rows, padded_head_size, pool_dtype.itemsize)
    if num_programs is None:
        num_sms = num_multiprocessors(device) if num_sms is None else num_sms
        num_programs = tiles.programs_per_sm * num_sms
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
    return DecodeWork(
        tile_starts=torch.empty(num_layers, num_rows * num_kv_heads + 1, **ints),
        num_tiles=torch.empty(num_layers, **ints),
        first_streams=torch.empty(num_layers, num_programs, **ints),
        pieces=torch.empty(2 * num_programs, piece_rows, head_size, **floats),
        piece_lse=torch.empty(2 * num_programs, piece_rows, **floats),
        tickets=torch.zeros(num_programs, **ints),
        tiles=tiles,
    )


def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; few elsewhere, since the interpreter runs one program after another."""
    if device.type != "cuda":
        return _MULTIPROCESSORS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def decode_work(
    rows: Rows,
    *,
    num_kv_heads: int,
    block_size: int,
    out: DecodeWork,
    backend: str = "triton",
) -> DecodeWork:
    """Share out the work of a step, for every layer; needed once before its `ragged_decode` calls.

    Args:
        rows: as in `ragged_decode`.
        num_kv_heads: H.
        block_size: b.
        out: of `new_decode_work`, for at least as many rows; its lists are written.
        backend: 'triton' or 'reference'.

    Returns:
        `out`. One launch, no host sync, graph-safe, deterministic.

    Raises:
        ValueError: on shapes or types that do not fit.
        RuntimeError: if the backend cannot run here.
    """
    num_rows, num_layers = len(rows), out.num_tiles.shape[0]
    check_rows(rows)
    check_query_starts(rows)
    check_page_offsets(rows, num_layers, num_kv_heads)
    check(
        num_rows * num_kv_heads < out.tile_starts.shape[1],
        f"{num_rows} rows do not fit lists of {out.tile_starts.shape[1] - 1} streams",
    )
    choose(_SHARE_OUT, backend)(
        rows.descriptors,
        rows.page_offsets,
        rows.query_start_loc,
        out.tile_starts,
        out.num_tiles,
        out.first_streams,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        tile_tokens=out.tiles.num_keys,
        least_tiles=out.tiles.least_tiles,
    )
    return out
