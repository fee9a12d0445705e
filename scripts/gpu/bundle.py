"""Pack vLLM for a GPU machine that has torch but no network, into parts of limited size.

    python scripts/gpu/bundle.py --out bundle --python 3.12 --have have.txt
    python -m zipfile -e bundle/part-1.zip SITE          # there, for every part
    PYTHONPATH=SITE scripts/gpu/verify.sh                # there

`have.txt` names what that machine has already, as `pip list --format=freeze` prints it, torch and
Triton among it. vLLM's wheel for CUDA asks for one torch, but its compiled parts keep to torch's
stable ABI and load in others. What a Hopper GPU does not need for a dense model is left out (see
`LEFT_OUT` and `UNNEEDED`): FlashAttention 3 is the attention there is.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

MIB = 1 << 20
# Of vLLM's wheel.
LEFT_OUT = (
    "vllm/vllm-rs",
    "vllm/_deepselect_C*",
    "vllm/_flashkda_C*",
    "vllm/_flashmla*_C*",
    "vllm/_qutlass_C*",
    "vllm/third_party/deep_gemm/*",
    "vllm/third_party/fmha_sm100/*",
    "vllm/vllm_flash_attn/_vllm_fa2_C*",
)
# What vLLM asks for but imports only where it is used: other builds of torch, other GPUs, video.
UNNEEDED = frozenset(
    {
        "fastsafetensors",
        "flashinfer-python",
        "humming-kernels",
        "instanttensor",
        "nvidia-cudnn-frontend",
        "nvidia-cutlass-dsl",
        "nvtx",
        "opencv-python-headless",
        "opentelemetry-api",
        "opentelemetry-exporter-otlp",
        "opentelemetry-sdk",
        "opentelemetry-semantic-conventions-ai",
        "pynvvideocodec",
        "quack-kernels",
        "tilelang",
        "tokenspeed-mla",
        "torch",
        "torchaudio",
        "torchcodec",
        "torchvision",
    }
)
PLATFORMS = (
    *(f"manylinux_2_{glibc}_x86_64" for glibc in (35, 34, 31, 28, 27, 24, 17, 12, 5)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)


@dataclass(frozen=True)
class Member:
    """One file of a wheel, and its size in bytes there, packed."""

    wheel: Path
    name: str
    num_bytes: int


def requirements(wheel: Path, python: str, extras: Iterable[str] = ()) -> list[Requirement]:
    """What a wheel asks for on Linux, with the given extras.

    Args:
        wheel: its file.
        python: version, such as '3.12'.
        extras: of the wheel.
    """
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        asked = message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    there = {"python_version": python, "python_full_version": f"{python}.0"}
    found = []
    for requirement in map(Requirement, asked):
        marker, requirement.marker = requirement.marker, None
        if marker is None or any(
            marker.evaluate({**there, "extra": extra}) for extra in ("", *extras)
        ):
            found.append(requirement)
    return found


def closure(
    wheel: Path, python: str, have: Container[str], fetch: Callable[[Requirement], Path]
) -> list[Path]:
    """All wheels that one needs beside what there is, in the order in which they are asked for.

    Args:
        wheel: where to begin; not among the result.
        python: version.
        have: names, as indexes compare them, that nothing is fetched for.
        fetch: gets the wheel of a requirement.

    Raises:
        ValueError: if a wheel was fetched for one requirement and does not meet another.
    """
    wheels: dict[str, Path] = {}
    seen: set[str] = set()
    waiting = requirements(wheel, python)
    while waiting:
        asked = waiting.pop(0)
        name = canonicalize_name(asked.name)
        if name in have or str(asked) in seen:
            continue
        seen.add(str(asked))
        if name not in wheels:
            wheels[name] = fetch(asked)
        _, version, *_ = parse_wheel_filename(wheels[name].name)
        if not asked.specifier.contains(version, prereleases=True):
            raise ValueError(f"{wheels[name].name} does not meet {asked}")
        waiting += requirements(wheels[name], python, asked.extras)
    return list(wheels.values())


def download(asked: str, python: str, folder: Path) -> Path:
    """The wheel that pip finds for a Python on Linux."""
    target = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(target)]
    command += ["--only-binary=:all:", "--python-version", python]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, asked], check=True)
    (wheel,) = target.glob("*.whl")
    return wheel


def members(wheels: Iterable[Path], left_out: Sequence[str] = LEFT_OUT) -> Iterator[Member]:
    """Their files, less those that match a pattern."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                if info.is_dir() or any(fnmatch.fnmatch(info.filename, p) for p in left_out):
                    continue
                yield Member(wheel, info.filename, info.compress_size)


def make_parts(files: Iterable[Member], limit_bytes: int) -> list[list[Member]]:
    """Files in as few parts as first-fit finds, largest first.

    Raises:
        ValueError: if a file is larger than the limit.
    """
    parts: list[list[Member]] = []
    sizes: list[int] = []
    for file in sorted(files, key=lambda f: (-f.num_bytes, f.name)):
        # Zip's own entry of a file.
        size = file.num_bytes + 200 + 2 * len(file.name)
        if size > limit_bytes:
            raise ValueError(f"{file.name} has {size} bytes; a part takes {limit_bytes}")
        place = next((i for i, used in enumerate(sizes) if used + size <= limit_bytes), len(parts))
        if place == len(parts):
            parts.append([])
            sizes.append(0)
        parts[place].append(file)
        sizes[place] += size
    return parts


def write_part(part: Iterable[Member], path: Path) -> None:
    """A zip of the files at the places that an installation has them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as target:
        for wheel in sorted({file.wheel for file in part}):
            with zipfile.ZipFile(wheel) as source:
                for file in part:
                    if file.wheel == wheel:
                        # Wheels keep some of their files apart, for pip to move.
                        name = re.sub(r"^[^/]+\.data/(pure|plat)lib/", "", file.name)
                        target.writestr(name, source.read(file.name))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vllm", default="0.32.0", help="version")
    parser.add_argument("--python", default="3.12", help="version of the other machine's")
    parser.add_argument("--have", type=Path, required=True, help="distributions that are there")
    parser.add_argument("--limit", type=float, default=56.0, help="MiB of a part")
    arguments = parser.parse_args()
    lines = arguments.have.read_text().splitlines()
    have = {canonicalize_name(Requirement(line).name) for line in lines if line.strip()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:

        def fetch(asked: Requirement | str) -> Path:
            return download(str(asked), arguments.python, Path(name))

        vllm = fetch(f"vllm=={arguments.vllm}")
        needed = closure(vllm, arguments.python, have | UNNEEDED, fetch)
        files = list(members([vllm, *needed]))
        for number, part in enumerate(make_parts(files, int(arguments.limit * MIB)), 1):
            path = arguments.out / f"part-{number}.zip"
            write_part(part, path)
            print(f"{path}: {len(part)} files, {path.stat().st_size / MIB:.1f} MiB")
    print("from", ", ".join(sorted(wheel.name.split("-")[0] for wheel in (vllm, *needed))))


if __name__ == "__main__":
    main()
