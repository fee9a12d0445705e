"""Attention of a step over compressed rows, how it is shared out, and where its tokens go."""

from vllm_kvcompress.ops.decode.attention import ragged_decode
from vllm_kvcompress.ops.decode.slots import token_slots
from vllm_kvcompress.ops.decode.work import (
    DecodeWork,
    decode_work,
    new_decode_work,
    num_multiprocessors,
)

__all__ = [
    "DecodeWork",
    "decode_work",
    "new_decode_work",
    "num_multiprocessors",
    "ragged_decode",
    "token_slots",
]
