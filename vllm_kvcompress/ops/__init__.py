"""The front door to every computation: checks arguments, then runs the chosen backend.

Backends: 'torch' (vectorised, any device), 'triton' (CUDA's paged pool), 'native' (compiled, for
CPU and CUDA, where it is built) and 'reference' (float64 loops, slow and obvious, the judge of the
others).
"""

from vllm_kvcompress.ops.decode import ragged_decode, store_tokens, token_slots
from vllm_kvcompress.ops.decode_work import (
    DecodeWork,
    decode_work,
    new_decode_work,
    num_multiprocessors,
)
from vllm_kvcompress.ops.native import instruction_set
from vllm_kvcompress.ops.native import problem as native_problem
from vllm_kvcompress.ops.paged import (
    PageOrder,
    copy_pages,
    gather_tokens,
    pack_pages,
    ragged_page_table,
    region_page_ids,
    unpack_pages,
)
from vllm_kvcompress.ops.pool_checks import HEAD_SIZES, MAX_GROUP, MAX_QUERY_LEN
from vllm_kvcompress.ops.scoring import (
    joint_top_counts,
    output_root,
    page_scores,
    pool_scores,
    projected_value_norm,
    select_top,
    value_effect,
    window_attention,
)
from vllm_kvcompress.ops.selection import (
    apportion,
    compact,
    joint_page_counts,
    move_entries,
    select_and_compact,
    select_entries,
)
from vllm_kvcompress.ops.window import (
    MAX_POOL_KERNEL,
    join_scores,
    num_score_parts,
    paged_value_effect,
    score_width,
    token_score_bytes,
    window_scores,
)
from vllm_kvcompress.row_descriptor import ROW_FIELDS, RowDescriptor

__all__ = [
    "DecodeWork",
    "HEAD_SIZES",
    "MAX_GROUP",
    "MAX_POOL_KERNEL",
    "MAX_QUERY_LEN",
    "PageOrder",
    "ROW_FIELDS",
    "RowDescriptor",
    "apportion",
    "compact",
    "copy_pages",
    "decode_work",
    "gather_tokens",
    "instruction_set",
    "join_scores",
    "joint_page_counts",
    "joint_top_counts",
    "move_entries",
    "native_problem",
    "new_decode_work",
    "num_multiprocessors",
    "num_score_parts",
    "pack_pages",
    "page_scores",
    "paged_value_effect",
    "pool_scores",
    "output_root",
    "projected_value_norm",
    "ragged_decode",
    "ragged_page_table",
    "region_page_ids",
    "score_width",
    "select_and_compact",
    "select_entries",
    "select_top",
    "store_tokens",
    "token_score_bytes",
    "token_slots",
    "value_effect",
    "unpack_pages",
    "window_attention",
    "window_scores",
]
