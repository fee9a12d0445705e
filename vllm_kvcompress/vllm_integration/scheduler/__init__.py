"""What runs in the scheduler: blocks, chunks and admission."""

# vLLM's scheduler first meets the spec when it unpickles one, so importing this folder registers
# the spec's manager.
from vllm_kvcompress.vllm_integration.scheduler.manager import KVCompressManager

__all__ = ["KVCompressManager"]
