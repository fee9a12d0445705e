"""vLLM's CUDA platform: FlashAttention for prompts, our decode kernel for all that is ragged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_kvcompress import ops
from vllm_kvcompress.config import DEFAULT_BLOCK_SIZE, KVCompressConfigError
from vllm_kvcompress.model_layers import FULL
from vllm_kvcompress.vllm_integration.platforms.base import Platform

if TYPE_CHECKING:
    import torch

    from vllm_kvcompress.memory import CacheShape
    from vllm_kvcompress.vllm_integration.worker.engine import EngineParts, WorkerEngine

logger = init_logger(f"vllm.{__name__}")

_FOLDER = "vllm_kvcompress.vllm_integration.platforms.cuda"


class CUDA(Platform):
    """See the module."""

    name = "CUDA"
    worker = f"{_FOLDER}.worker.KVCompressCUDAWorker"
    block_size = DEFAULT_BLOCK_SIZE["CUDA"]
    attention = f"{_FOLDER}.attention.KVCompressCUDABackend"
    attention_name = "CUSTOM"
    counts_memory = True
    caveat = "the CUDA backend of this release has been tested without a GPU only"

    def is_current(self) -> bool:
        """Whether vLLM runs on NVIDIA GPUs."""
        from vllm.platforms import current_platform

        return current_platform.is_cuda()

    def refusals(self, vllm_config: Any) -> tuple[tuple[bool, str], ...]:
        """What does not work on a GPU."""
        from vllm import envs

        attention, parallel = vllm_config.attention_config, vllm_config.parallel_config
        chosen = attention.backend_per_kind.get(FULL, attention.backend)
        return (
            (
                chosen is not None and chosen.name not in (self.attention_name, "FLASH_ATTN"),
                f"the attention backend {chosen.name if chosen else None} for full-attention "
                "layers (it brings its own, on FlashAttention); drop --attention-backend",
            ),
            (parallel.use_ubatching, "microbatches; drop --enable-dbo"),
            (envs.VLLM_BATCH_INVARIANT, "batch invariance; unset VLLM_BATCH_INVARIANT"),
        )

    def check_heads(self, head_size: int, num_queries_per_kv: int) -> None:
        """Heads that the decode kernel takes."""
        if head_size not in ops.HEAD_SIZES:
            known = ", ".join(map(str, ops.HEAD_SIZES))
            raise KVCompressConfigError(
                f"KV compression takes heads of size {known} on a GPU; those of this model's "
                f"layers with full attention have {head_size}"
            )
        if num_queries_per_kv > ops.MAX_GROUP:
            raise KVCompressConfigError(
                f"KV compression takes at most {ops.MAX_GROUP} query heads per KV head on a GPU; "
                f"this model has {num_queries_per_kv}"
            )

    def use_attention(self, attention_config: Any) -> None:
        """Name our backend for full-attention layers; windowed ones keep theirs."""
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        attention_config.backend_per_kind = {
            **attention_config.backend_per_kind,
            FULL: AttentionBackendEnum[self.attention_name],
        }

    def make_engine(
        self, parts: EngineParts, attention: dict[str, Any], is_first_rank: bool
    ) -> WorkerEngine:
        """An engine that selects by compiled ops, if there are any."""
        from vllm_kvcompress.vllm_integration.platforms.cuda.engine import CUDAEngine

        missing = ops.native_problem("cuda")
        if missing and is_first_rank:
            logger.info("kv-compress: no compiled selection, Triton's instead: %s", missing)
        return CUDAEngine(
            parts,
            select_backend=None if missing else "native",
            # Layers are scored together: all of them tell their sums, or nobody is asked.
            tells_lse=all(layer.impl.tells_lse for layer in attention.values()),
        )

    def step_buffer_bytes(
        self, shape: CacheShape, max_num_reqs: int, dtype: torch.dtype, device: torch.device
    ) -> int:
        """What graphs read, and the decode kernel's parts of streams."""
        import torch

        from vllm_kvcompress.vllm_integration.platforms.cuda.step_buffers import StepBuffers

        meta, num_sms = torch.device("meta"), ops.num_multiprocessors(device)
        return StepBuffers(shape, max_num_reqs, dtype, meta, num_sms).num_bytes

    def warm_up(self, engine: WorkerEngine, attention: Any, max_len: int) -> None:
        """Our own kernels; vLLM warms up its own with made-up batches."""
        from vllm_kvcompress.vllm_integration.platforms.cuda.engine import CUDAEngine

        assert isinstance(engine, CUDAEngine)
        attention.warm_up(engine)
        engine.warm_up(max_len)
