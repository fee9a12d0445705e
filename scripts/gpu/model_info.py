"""Put into vLLM's cache what it asks of a model's class before it starts an engine with it.

    VLLM_CACHE_ROOT=DIR PYTHONPATH=SITE python scripts/gpu/model_info.py LlamaForCausalLM

Without it vLLM starts a process that imports the model, which takes a good part of a minute where
nothing is compiled yet. It is found again where the model's source is the same. Needs no GPU. Exit
status 1 if vLLM has kept nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.check_site import load_driver


def main() -> None:
    """See the module."""
    with tempfile.TemporaryDirectory() as name:
        load_driver(Path(name))
    from vllm.model_executor.models import registry

    # Another process would look for the driver's library in vain.
    registry._run_in_subprocess = lambda inspect: inspect()
    for architecture in sys.argv[1:]:
        registry.ModelRegistry.models[architecture].inspect_model_cls()
    kept = list(Path(os.environ["VLLM_CACHE_ROOT"]).glob("modelinfos/*.json"))
    print(f"{len(kept)} models are known")
    if len(kept) != len(sys.argv) - 1:
        sys.exit(f"vLLM has kept {[path.name for path in kept]} of {sys.argv[1:]}")


if __name__ == "__main__":
    main()
