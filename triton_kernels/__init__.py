"""Triton kernels on vLLM's paged KV pool, installed as `vllm_kvcompress.triton_kernels`.

Imports nothing of the package around it. The launchers take tensors that fit each other and
check nothing: `vllm_kvcompress.ops` is the front door that does. None of them reads a value
back to the host.

Words used throughout: R requests (rows of the batch), L layers, H KV heads, g query heads per
KV head, d head size, b tokens per page, S = L * H streams. The pool is [num_pages, b, 2 d], page
`(block * L + layer) * H + head`, a token's key before its value.
"""

from .compact import compact, move_entries
from .decode_work import decode_work
from .defensive_score import num_score_parts
from .join_scores import join_scores
from .paging import is_interpreted
from .ragged_decode import DecodeTiles, decode_tiles, ragged_decode
from .select import joint_page_counts, select_entries
from .slots import token_slots
from .value_effect import value_effect
from .window_score import num_score_groups, window_scores

__all__ = [
    "DecodeTiles",
    "compact",
    "decode_tiles",
    "decode_work",
    "is_interpreted",
    "join_scores",
    "joint_page_counts",
    "move_entries",
    "num_score_groups",
    "num_score_parts",
    "ragged_decode",
    "select_entries",
    "token_slots",
    "value_effect",
    "window_scores",
]
