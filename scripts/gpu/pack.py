"""Pack folders into archives that a machine without network unpacks again, within a limit.

    python scripts/gpu/pack.py OUT --limit-mib 58 --part NAME=FOLDER...

Writes OUT/NAME.tar.xz of every folder and OUT/manifest.json with size in bytes and SHA-256 of all
files in OUT. Exit status 1 if these are larger together than the limit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import machine

MIB = 1 << 20
MANIFEST = "manifest.json"


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The same bytes for the same contents: nobody's name, no time."""
    if "__pycache__" in info.name.split("/"):
        return None
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def archive(folder: Path, out: Path) -> None:
    """A .tar.xz of what a folder holds, without the folder itself."""
    partial = out.with_suffix(".partial")
    with tarfile.open(partial, "w:xz", preset=6) as target:
        for path in sorted(folder.iterdir()):
            target.add(path, path.name, filter=_plain)
    partial.rename(out)


def manifest(folder: Path) -> dict[str, object]:
    """Commit, and size and SHA-256 of every file of a folder but the manifest's own."""
    files = {
        path.name: {
            "num_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    return {"commit": machine.commit(), "files": files}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit-mib", type=float, required=True)
    parser.add_argument("--part", action="append", default=[], metavar="NAME=FOLDER")
    arguments = parser.parse_args()
    for part in arguments.part:
        name, _, folder = part.partition("=")
        archive(Path(folder), arguments.out / f"{name}.tar.xz")
    found = manifest(arguments.out)
    (arguments.out / MANIFEST).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    total = sum(path.stat().st_size for path in arguments.out.iterdir())
    for path in sorted(arguments.out.iterdir()):
        print(f"{path.stat().st_size / MIB:8.2f} MiB  {path.name}")
    print(f"{total / MIB:8.2f} MiB of at most {arguments.limit_mib:g}")
    if total > arguments.limit_mib * MIB:
        sys.exit(f"{arguments.out} is larger than {arguments.limit_mib:g} MiB")


if __name__ == "__main__":
    main()
