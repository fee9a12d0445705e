"""Which entries every stream keeps: shares by competition, and the best entries of each.

An entry is what scores are given to: a page, or a token. Streams are (layer, KV head), layer first.
"""

from vllm_kvcompress.ops.select.apportion import apportion
from vllm_kvcompress.ops.select.entries import joint_page_counts, select_entries

__all__ = ["apportion", "joint_page_counts", "select_entries"]
