"""vLLM for a GPU machine that has torch but no network: a folder that goes on Python's path.

    python scripts/gpu/bundle.py --out SITE --wheels CACHE

vLLM's wheel for CUDA asks for one torch, but its compiled parts keep to torch's stable ABI and load
beside others. What one Hopper GPU does not need for a dense model is left out (`LEFT_OUT`), and of
its GPU code what is for other GPUs. Of what vLLM asks for only `NEEDED` is fetched: what its engine
imports beside torch, transformers and what `prepare.sh` says is there.
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
from email import message_from_bytes
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import strip_fatbin

ARCH = 90
# FlashAttention 3 is the attention there is; `_moe_C` is imported only if it is there.
LEFT_OUT = (
    "vllm/vllm-rs",
    "vllm/_deepselect_C*",
    "vllm/_flashkda_C*",
    "vllm/_flashmla*_C*",
    "vllm/_moe_C*",
    "vllm/_qutlass_C*",
    "vllm/third_party/deep_gemm/*",
    "vllm/third_party/fmha_sm100/*",
    "vllm/vllm_flash_attn/_vllm_fa2_C*",
    # Commands, which a folder on the path does not install.
    "*.data/scripts/*",
)
# By trial: without any of these the imports of `check_site.py` fail.
NEEDED = frozenset(
    {
        "annotated-types",
        "apache-tvm-ffi",
        "cachetools",
        "cbor2",
        "fastapi",
        "httpx2",
        "llguidance",
        "msgspec",
        "openai",
        "oss-harmony",
        "partial-json-parser",
        "pybase64",
        "pydantic",
        "pydantic-core",
        "pyzmq",
        "sniffio",
        "starlette",
        "typing-inspection",
        "xgrammar",
    }
)
PLATFORMS = (
    *(f"manylinux_2_{glibc}_x86_64" for glibc in (35, 34, 31, 28, 27, 24, 17, 12, 5)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)


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
    wheel: Path, python: str, needed: Container[str], fetch: Callable[[Requirement], Path]
) -> list[Path]:
    """The wheels that one asks for, and those that these ask for, as far as they are needed.

    Args:
        wheel: where to begin; not among the result.
        python: version.
        needed: names, as indexes compare them; nothing else is fetched.
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
        if name not in needed or str(asked) in seen:
            continue
        seen.add(str(asked))
        if name not in wheels:
            wheels[name] = fetch(asked)
        _, version, *_ = parse_wheel_filename(wheels[name].name)
        if not asked.specifier.contains(version, prereleases=True):
            raise ValueError(f"{wheels[name].name} does not meet {asked}")
        waiting += requirements(wheels[name], python, asked.extras)
    return list(wheels.values())


def download(asked: str, python: str, cache: Path) -> Path:
    """The wheel that pip finds for a Python on Linux, once per requirement and cache folder."""
    target = cache / re.sub(r"[^\w.=-]+", "_", f"{python}-{asked}")
    if not (found := list(target.glob("*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        for platform in PLATFORMS:
            command += ["--platform", platform]
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as name:
            subprocess.run([*command, "-d", name, asked], check=True)
            # A download that was stopped leaves no half wheel there.
            Path(name).chmod(0o755)
            target.mkdir(exist_ok=True)
            for wheel in Path(name).glob("*.whl"):
                wheel.rename(target / wheel.name)
        found = list(target.glob("*.whl"))
    (wheel,) = found
    return wheel


def members(wheel: Path, left_out: Sequence[str] = LEFT_OUT) -> Iterator[tuple[str, zipfile.Path]]:
    """(place in an installation, file) of a wheel, less what matches a pattern."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if info.is_dir() or any(fnmatch.fnmatch(info.filename, p) for p in left_out):
                continue
            # Wheels keep some of their files apart, for pip to move.
            place = re.sub(r"^[^/]+\.data/(pure|plat)lib/", "", info.filename)
            yield place, zipfile.Path(archive, info.filename)


def install(wheel: Path, site: Path, arch: int = ARCH) -> None:
    """Lay a wheel's files into a folder, with GPU code for one architecture only."""
    for place, file in members(wheel):
        target = site / place
        target.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes()
        if place.endswith(".so") and strip_fatbin.has_gpu_code(content):
            content = strip_fatbin.strip(content, arch)
        target.write_bytes(content)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, required=True, help="where downloads stay")
    parser.add_argument("--vllm", default="0.32.0", help="version")
    parser.add_argument("--python", default="3.12", help="version of the other machine's")
    arguments = parser.parse_args()

    def fetch(asked: Requirement | str) -> Path:
        return download(str(asked), arguments.python, arguments.wheels)

    vllm = fetch(f"vllm=={arguments.vllm}")
    wheels = [vllm, *closure(vllm, arguments.python, NEEDED, fetch)]
    for wheel in wheels:
        install(wheel, arguments.out)
        print(wheel.name, flush=True)
    missing = NEEDED - {canonicalize_name(wheel.name.split("-")[0]) for wheel in wheels}
    if missing:
        sys.exit(f"nothing asks for {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
