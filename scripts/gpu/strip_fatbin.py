"""Empty the GPU code of other architectures in a shared library, so that it packs small.

    python scripts/gpu/strip_fatbin.py IN.so OUT.so --arch 90

CUDA libraries hold their kernels in the ELF section `.nv_fatbin`: one container per source file,
each with an entry per architecture (machine code or PTX). What a GPU of `--arch` takes of a
container moves to its front, the rest becomes zeros, and the container's size says what is left.
The file keeps its size, and all that lies outside the containers stays as it was.

Of a container without machine code for the architecture small PTX stays, which the driver can
compile. What has neither gets a copy of the smallest code there is, whose GPU is another one: to
the driver it is what it was before, a container with nothing for this GPU. An empty one might be an
error to it.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECTION = b".nv_fatbin"
MAGIC = 0xBA55ED50
PTX, MACHINE_CODE = 1, 2
# PTX up to this many bytes stays where there is no machine code.
MAX_PTX_BYTES = 64 << 10
# Magic, version, bytes of this header, bytes of all entries.
_CONTAINER = struct.Struct("<IHHQ")
# Kind, version, bytes of this header, bytes of the payload, 12 bytes of no interest, architecture.
_ENTRY = struct.Struct("<HHIQ12xI")


@dataclass(frozen=True)
class Entry:
    """One architecture's code in a container.

    Attributes:
        kind: `PTX` or `MACHINE_CODE`.
        arch: compute capability x 10.
        start: of its header in the file, bytes.
        header_bytes, payload_bytes: sizes.
    """

    kind: int
    arch: int
    start: int
    header_bytes: int
    payload_bytes: int

    @property
    def end(self) -> int:
        """Where the next entry begins, bytes from the file's start."""
        return self.start + self.header_bytes + self.payload_bytes


@dataclass(frozen=True)
class Container:
    """Entries of one source file; `start` and `header_bytes` as in `Entry`."""

    start: int
    header_bytes: int
    entries: tuple[Entry, ...]

    @property
    def end(self) -> int:
        """Where it ends, bytes from the file's start."""
        return self.entries[-1].end if self.entries else self.start + self.header_bytes


def section_bounds(library: bytes, name: bytes = SECTION) -> tuple[int, int]:
    """(start, end) of a section of a 64-bit ELF file, in bytes.

    Raises:
        ValueError: if the file is none, or has no such section.
    """
    if library[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", library, 0x28)
    entry_bytes, num_sections, names_index = struct.unpack_from("<HHH", library, 0x3A)
    # Name's offset, and the section's offset and size.
    headers = [
        struct.unpack_from("<I20xQQ", library, table + i * entry_bytes) for i in range(num_sections)
    ]
    names = headers[names_index][1]
    for name_offset, start, num_bytes in headers:
        begin = names + name_offset
        if library[begin : library.index(b"\0", begin)] == name:
            return start, start + num_bytes
    raise ValueError(f"no section {name.decode()}")


def has_gpu_code(library: bytes) -> bool:
    """Whether a file is a library with containers."""
    try:
        section_bounds(library)
    except ValueError:
        return False
    return True


def containers(library: bytes) -> Iterator[Container]:
    """All containers of a library, in the order of the file.

    Raises:
        ValueError: if sizes do not add up.
    """
    place, end = section_bounds(library)
    while place < end:
        if not any(library[place : place + 8]):
            # What an emptied container leaves behind, or padding.
            place += 8
            continue
        magic, _, header_bytes, num_bytes = _CONTAINER.unpack_from(library, place)
        if magic != MAGIC:
            raise ValueError(f"no container at byte {place}")
        entries = tuple(_entries(library, place + header_bytes, num_bytes))
        container = Container(place, header_bytes, entries)
        if container.end != place + header_bytes + num_bytes or container.end > end:
            raise ValueError(f"entries of the container at byte {place} do not fill it")
        yield container
        place = container.end


def _entries(library: bytes, start: int, num_bytes: int) -> Iterator[Entry]:
    place, end = start, start + num_bytes
    while place < end:
        kind, _, header_bytes, payload_bytes, arch = _ENTRY.unpack_from(library, place)
        if kind not in (PTX, MACHINE_CODE) or not header_bytes:
            raise ValueError(f"no entry at byte {place}")
        yield Entry(kind, arch, place, header_bytes, payload_bytes)
        place += header_bytes + payload_bytes


def kept(container: Container, arch: int) -> list[Entry]:
    """What a GPU of the architecture takes of a container; see the module."""
    code = [e for e in container.entries if e.kind == MACHINE_CODE and e.arch == arch]
    if code:
        return code
    # Machine code of an older minor version runs too: 8.6 takes 8.0's.
    older = [
        e
        for e in container.entries
        if e.kind == MACHINE_CODE and e.arch // 10 == arch // 10 and e.arch < arch
    ]
    if older:
        return [max(older, key=lambda e: e.arch)]
    ptx = [e for e in container.entries if e.kind == PTX and e.arch <= arch]
    newest = max(ptx, key=lambda e: e.arch, default=None)
    return [newest] if newest and newest.payload_bytes <= MAX_PTX_BYTES else []


def strip(library: bytes, arch: int) -> bytes:
    """The library with code for one architecture only; as long as it was."""
    out = bytearray(library)
    everything = [entry for container in containers(library) for entry in container.entries]
    foreign = [e for e in everything if e.kind == MACHINE_CODE and e.arch // 10 != arch // 10]
    for container in containers(library):
        chosen = kept(container, arch)
        if not chosen:
            chosen = [min((*container.entries, *foreign), key=lambda e: e.end - e.start)]
        first = container.start + container.header_bytes
        code = b"".join(library[entry.start : entry.end] for entry in chosen)
        out[first : container.end] = code.ljust(container.end - first, b"\0")
        # The size is the header's last field.
        struct.pack_into("<Q", out, container.start + 8, len(code))
    assert len(out) == len(library)
    return bytes(out)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--arch", type=int, default=90, help="compute capability x 10")
    arguments = parser.parse_args()
    library = arguments.source.read_bytes()
    stripped = strip(library, arguments.arch)
    arguments.target.write_bytes(stripped)
    arguments.target.chmod(arguments.source.stat().st_mode)
    left = [kept(container, arguments.arch) for container in containers(library)]
    num_entries = sum(len(container.entries) for container in containers(library))
    print(
        f"{arguments.source.name}: {sum(map(len, left))} of {num_entries} pieces of GPU code are "
        f"left, {left.count([])} of {len(left)} containers have none for sm_{arguments.arch}"
    )


if __name__ == "__main__":
    main()
