"""Window scores on the paged pool, for many prompts of different lengths at once.

The steps of `ops.scoring` in the order in which the kernels fuse them: attention of the window to
all keys, reduced over the window (`window_scores`); what values do (`paged_value_effect`); pooling,
the group's query heads, weights and pages (`join_scores`). `planned_scores` makes all of them.
'triton' is for a GPU and takes several layers at once, 'native' is for a CPU, whose pages may have
any element order and any size. n is the number of layers that are scored.
"""

from vllm_kvcompress.ops.window.effect import paged_value_effect
from vllm_kvcompress.ops.window.join import join_scores
from vllm_kvcompress.ops.window.memory import score_width, token_score_bytes
from vllm_kvcompress.ops.window.plan import WindowPlan
from vllm_kvcompress.ops.window.planned import planned_scores
from vllm_kvcompress.ops.window.scores import num_score_parts, window_scores

__all__ = [
    "WindowPlan",
    "join_scores",
    "num_score_parts",
    "paged_value_effect",
    "planned_scores",
    "score_width",
    "token_score_bytes",
    "window_scores",
]
