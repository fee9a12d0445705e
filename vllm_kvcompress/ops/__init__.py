"""The front door to every computation: checks arguments, then runs the chosen backend.

Backends: 'torch' (vectorised, any device), 'triton' (CUDA's paged pool), 'native' (compiled, for
CPU and CUDA, where it is built) and 'reference' (float64 loops, slow and obvious, the judge of the
others). `dispatch.py` says how a backend's name becomes code.
"""

from vllm_kvcompress.ops.decode import (
    DecodeWork,
    decode_work,
    new_decode_work,
    num_multiprocessors,
    ragged_decode,
    token_slots,
)
from vllm_kvcompress.ops.limits import HEAD_SIZES, MAX_GROUP, MAX_QUERY_LEN
from vllm_kvcompress.ops.move import compact, move_entries, select_and_compact
from vllm_kvcompress.ops.native import instruction_set
from vllm_kvcompress.ops.native import problem as native_problem
from vllm_kvcompress.ops.pages import (
    PageOrder,
    copy_pages,
    gather_tokens,
    pack_pages,
    ragged_page_table,
    region_page_ids,
    unpack_pages,
)
from vllm_kvcompress.ops.scoring import (
    joint_top_counts,
    nan_last,
    output_root,
    page_scores,
    pool_scores,
    projected_value_norm,
    select_top,
    value_effect,
    window_attention,
)
from vllm_kvcompress.ops.select import apportion, joint_page_counts, select_entries
from vllm_kvcompress.ops.structs import Logits, Pool, Prompts, Rows
from vllm_kvcompress.ops.window import (
    WindowPlan,
    join_scores,
    num_score_parts,
    paged_value_effect,
    planned_scores,
    score_width,
    token_score_bytes,
    window_scores,
)
from vllm_kvcompress.row_descriptor import ROW_FIELDS, RowDescriptor

__all__ = [
    "DecodeWork",
    "HEAD_SIZES",
    "Logits",
    "MAX_GROUP",
    "MAX_QUERY_LEN",
    "PageOrder",
    "Pool",
    "Prompts",
    "ROW_FIELDS",
    "RowDescriptor",
    "Rows",
    "WindowPlan",
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
    "nan_last",
    "native_problem",
    "new_decode_work",
    "num_multiprocessors",
    "num_score_parts",
    "output_root",
    "pack_pages",
    "page_scores",
    "paged_value_effect",
    "planned_scores",
    "pool_scores",
    "projected_value_norm",
    "ragged_decode",
    "ragged_page_table",
    "region_page_ids",
    "score_width",
    "select_and_compact",
    "select_entries",
    "select_top",
    "token_score_bytes",
    "token_slots",
    "unpack_pages",
    "value_effect",
    "window_attention",
    "window_scores",
]
