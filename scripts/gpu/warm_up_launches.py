"""Record what the engine of `engine_run.py` warms up before it serves; for fill_triton_cache.py.

Its worker's engine and attention run their warm-up on torch's device 'meta', which has no contents.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from gpu import engine_run, recording
from gpu.check_site import load_driver
from gpu.shapes import read_shapes

SHAPE, BLOCK_SIZE = "Llama-3.1-8B", 16
# As vLLM takes them for an offline engine of this shape, and as `gpu_plan` has them.
STEP_TOKENS = 16384
NUM_BLOCKS = 8192


def warm_up(has_graphs: bool) -> None:
    """What `CompressionWorker.compile_or_warm_up_model` launches of ours."""
    from vllm_kvcompress.compaction.parameters import LayerParameters
    from vllm_kvcompress.config import KVCompressConfig
    from vllm_kvcompress.memory import CacheShape, PageFormat
    from vllm_kvcompress.vllm_integration.platforms.cuda.attention import KVCompressCUDAImpl
    from vllm_kvcompress.vllm_integration.platforms.cuda.engine import CUDAEngine
    from vllm_kvcompress.vllm_integration.platforms.cuda.platform import CUDA
    from vllm_kvcompress.vllm_integration.worker.engine import EngineParts
    from vllm_kvcompress.vllm_integration.worker.metrics import CompressionStats

    model = read_shapes()[SHAPE]
    settings = engine_run.gpu_plan(has_graphs).settings
    shape = CacheShape(
        model.num_layers,
        model.num_kv_heads,
        model.group,
        PageFormat(str(model.pool_dtype).removeprefix("torch."), BLOCK_SIZE, model.head_size),
    )
    size = (NUM_BLOCKS, model.num_layers, model.num_kv_heads, BLOCK_SIZE, 2 * model.head_size)
    pool = torch.empty(size, dtype=model.pool_dtype, device="meta")
    d = model.head_size
    root = torch.empty(model.num_kv_heads, d, d, dtype=model.dtype, device="meta")
    parameters = LayerParameters(d**-0.5, 0.0, None, root, None)
    config = {"method": engine_run.METHOD, "ratio": engine_run.REMOVED}
    parts = EngineParts(
        config=KVCompressConfig.from_dict(config),
        shape=shape,
        layer_views={f"layers.{i}": pool[:, i] for i in range(model.num_layers)},
        layers=[parameters] * model.num_layers,
        row_names=lambda common: SimpleNamespace(),
        max_num_reqs=settings["max_num_seqs"],
        stats=CompressionStats(log=False),
        one_shot_tokens=STEP_TOKENS,
    )
    # As much of it as its warm-up reads; stock constructors want a GPU.
    impl = object.__new__(KVCompressCUDAImpl)
    vars(impl).update(
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_size=d,
        scale=d**-0.5,
        logits_soft_cap=0,
        sinks=None,
        vllm_flash_attn_version=3,
    )
    engine = CUDAEngine(parts, tells_lse=impl.tells_lse)
    CUDA().warm_up(engine, impl, settings["max_model_len"])


def main() -> None:
    """See the module."""
    with tempfile.TemporaryDirectory() as name:
        load_driver(Path(name))
    for has_graphs in (False, True):
        launches = recording.record(lambda has_graphs=has_graphs: warm_up(has_graphs))
        print(f"{len({launch.variant for launch in launches})} kernels to warm up")


if __name__ == "__main__":
    main()
