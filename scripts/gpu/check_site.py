"""Import what an engine on a GPU imports, on a machine that has none.

    PYTHONPATH=SITE python scripts/gpu/check_site.py

for folders that `bundle.py` made. The driver's library is replaced by one whose functions fail.
Compiled parts are loaded, and a function of each is looked up. Exit status 1 says what is missing.
"""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

MODULES = (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.platforms.cuda",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu.sample.sampler",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.input_processor",
    "vllm.v1.engine.output_processor",
    "vllm.v1.structured_output",
    "vllm.v1.cudagraph_dispatcher",
    "vllm.v1.attention.selector",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.model_loader.dummy_loader",
    "vllm.model_executor.warmup.kernel_warmup",
    "vllm.compilation.backends",
    "vllm.compilation.cuda_graph",
    "vllm.utils.jit_monitor",
    "vllm._C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa3_C",
    "vllm_kvcompress",
    "vllm_kvcompress.vllm_integration.register",
    "vllm_kvcompress.vllm_integration.platforms.cuda.worker",
    "vllm_kvcompress.vllm_integration.platforms.cuda.attention",
)
FUNCTIONS = (("_C", "rms_norm"), ("_C", "silu_and_mul"), ("_vllm_fa3_C", "fwd"))
# Of the driver's library; 999 is its unknown error.
DRIVER = ("cuGetProcAddress_v2", "cuPointerGetAttribute", "cuTensorMapEncodeTiled")


def load_driver(folder: Path) -> None:
    """A library of the driver's name, for those that link to it."""
    source, out = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in DRIVER))
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(out)]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(out), mode=ctypes.RTLD_GLOBAL)


def main() -> None:
    """See the module."""
    with tempfile.TemporaryDirectory() as name:
        load_driver(Path(name))
    for name in MODULES:
        importlib.import_module(name)
    import torch

    for library, function in FUNCTIONS:
        getattr(getattr(torch.ops, library), function)
    native = find_spec("vllm_kvcompress").origin
    print(f"{len(MODULES)} modules, torch {torch.__version__}, Python {sys.version.split()[0]}")
    library = Path(native).parent / "_native_cuda.so"
    if not library.is_file():
        sys.exit(f"no {library}")


if __name__ == "__main__":
    main()
