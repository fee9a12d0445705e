"""What Triton's pipeliner made of a kernel's loops, read from its GPU dialect (TTGIR).

A pipelined load is an asynchronous copy into one of N shared-memory buffers. Copies are committed
in groups, and `async_wait {num = k}` waits until at most the last k groups are under way. A load
with one buffer, or with nothing under way while the loop waits, does not overlap with compute.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

ITEM_BITS = {"i1": 8, "i8": 8, "i16": 16, "bf16": 16, "f16": 16, "i32": 32, "f32": 32, "i64": 64}
# Results of these are the same memory as their first operand, or an address in it.
_VIEWS = frozenset(
    (
        "tt.addptr",
        "tt.splat",
        "tt.broadcast",
        "tt.expand_dims",
        "tt.reshape",
        "tt.trans",
        "tt.bitcast",
        "ttg.convert_layout",
        "ttg.memdesc_index",
        "ttg.memdesc_subview",
        "ttg.memdesc_subslice",
        "ttg.memdesc_trans",
        "ttg.memdesc_reinterpret",
        "carried",
    )
)
_LOOPS = frozenset(("scf.for", "scf.while"))
_LINE = re.compile(r"^\s*(?:(%[\w#]+)(?::\d+)? = )?([a-z_]+\.[\w.]+)\b(.*)$")
_NAME = re.compile(r"%[\w]+")
_CARRIED = re.compile(r"(%\w+) = (%\w+)")
_WAIT = re.compile(r"num = (\d+)")
_CONTIGUITY = re.compile(r"contiguity = (\d+)")
_LOAD_TYPE = re.compile(r": tensor<((?:\d+x)+)!tt\.ptr<(\w+)>")
_COPY_TYPE = re.compile(r": tensor<((?:\d+x)+)!tt\.ptr<(\w+)>, (#\w+).* -> <")
_LAYOUT = re.compile(
    r"^(#\w+) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\].*order = \[(\d+)", re.MULTILINE
)
_ALLOC_TYPE = re.compile(r"!ttg\.memdesc<((?:\d+x)+)")


@dataclass(frozen=True)
class LoopLoad:
    """One load of a tensor in an innermost loop.

    Attributes:
        loop: number of the loop in the kernel.
        name: of the variable it is loaded into.
        source: the kernel's argument that its addresses come from, '?' where that is not seen.
        tile: its sizes and type, such as '64x128xbf16'.
        num_bytes: of one tile.
        item_bytes: of one of its elements.
        num_buffers: in shared memory; 0 if it goes straight into registers.
        num_ahead: tiles that are under way at least, whatever the loop waits for.
        copy_bytes: that one thread copies at once; 0 if the load is no asynchronous copy.
    """

    loop: int
    name: str
    source: str
    tile: str
    num_bytes: int
    item_bytes: int
    num_buffers: int
    num_ahead: int
    copy_bytes: int


@dataclass
class _Operation:
    result: str
    kind: str
    operands: list[str]
    text: str


@dataclass
class _Loop:
    """A loop's operations in order, those of branches in it included."""

    operations: list[_Operation] = field(default_factory=list)
    is_innermost: bool = True


def loop_loads(ttgir: str) -> list[LoopLoad]:
    """Loads of tensors in the innermost loops of a kernel, in the order of the text."""
    loops, definitions = _parsed(ttgir)
    # Neighbouring elements that a thread has in a layout.
    widths = {
        layout: int(sizes.split(",")[int(fastest)])
        for layout, sizes, fastest in _LAYOUT.findall(ttgir)
    }
    found: list[LoopLoad] = []
    for number, loop in enumerate(loops):
        if loop.is_innermost:
            found += _loads_of(number, loop, definitions, widths)
    return found


def _parsed(ttgir: str) -> tuple[list[_Loop], dict[str, _Operation]]:
    """All loops, and what defines each name."""
    loops: list[_Loop] = []
    definitions: dict[str, _Operation] = {}
    # The loop that each open brace belongs to.
    regions: list[int | None] = [None]
    for line in ttgir.splitlines():
        if line.startswith("#"):
            continue
        match = _LINE.match(line)
        inside = regions[-1]
        if match:
            result, kind, text = match[1] or "", match[2], match[3]
            if kind in _LOOPS:
                if inside is not None:
                    loops[inside].is_innermost = False
                loops.append(_Loop())
                for carried, initial in _CARRIED.findall(text.partition("iter_args(")[2]):
                    definitions[carried] = _Operation(carried, "carried", [initial], text)
            operation = _Operation(result, kind, _NAME.findall(text), text)
            if result:
                definitions[result] = operation
            if inside is not None:
                loops[inside].operations.append(operation)
        opened, closed = line.count("{"), line.count("}")
        # A brace pair on one line holds attributes; '} else {' closes first.
        for _ in range(max(closed - opened, 0)):
            regions.pop()
        is_loop = bool(match) and match[2] in _LOOPS
        regions += [len(loops) - 1 if is_loop else inside] * max(opened - closed, 0)
    return loops, definitions


def _root(name: str, definitions: dict[str, _Operation]) -> str:
    """What a view or an address was made from."""
    while name in definitions and definitions[name].kind in _VIEWS:
        name = definitions[name].operands[0]
    return name


def _source(name: str, definitions: dict[str, _Operation]) -> str:
    root = _root(name, definitions)
    return "?" if root in definitions else root.removeprefix("%")


def _plain(name: str) -> str:
    """A variable's name without the number that makes it unique."""
    return re.sub(r"_\d+$", "", name.removeprefix("%"))


def _tile(match: re.Match[str]) -> tuple[str, list[int], int]:
    """(sizes and type, sizes, bits of an element)."""
    sizes = [int(size) for size in match[1].split("x") if size]
    # Types of 8-bit floats have names such as f8E4M3FN.
    bits = 8 if match[2].startswith("f8") else ITEM_BITS[match[2]]
    return match[1] + match[2], sizes, bits


def _loads_of(
    number: int, loop: _Loop, definitions: dict[str, _Operation], widths: dict[str, int]
) -> Iterator[LoopLoad]:
    groups = list(_commits_and_waits(loop, definitions))
    seen: set[str] = set()
    for operation in loop.operations:
        is_copy = operation.kind == "ttg.async_copy_global_to_local"
        match = (_COPY_TYPE if is_copy else _LOAD_TYPE).search(operation.text)
        if match is None or not (is_copy or operation.kind == "tt.load"):
            continue
        tile, sizes, bits = _tile(match)
        num_bytes = math.prod(sizes) * bits // 8
        source = _source(operation.operands[0], definitions)
        if not is_copy:
            name = _plain(operation.result)
            yield LoopLoad(number, name, source, tile, num_bytes, bits // 8, 0, 0, 0)
            continue
        buffer = _root(operation.operands[1], definitions)
        if buffer in seen:
            continue
        seen.add(buffer)
        contiguity = _CONTIGUITY.search(operation.text)
        yield LoopLoad(
            number,
            _plain(operation.result),
            source,
            tile,
            num_bytes,
            bits // 8,
            _num_buffers(definitions.get(buffer), sizes),
            _num_ahead(buffer, groups),
            (int(contiguity[1]) if contiguity else widths.get(match[3], 1)) * bits // 8,
        )


def _num_buffers(alloc: _Operation | None, tile_sizes: list[int]) -> int:
    match = _ALLOC_TYPE.search(alloc.text) if alloc else None
    if match is None:
        raise ValueError(f"an asynchronous copy goes to what no local_alloc made: {alloc}")
    sizes = [int(size) for size in match[1].split("x") if size]
    return sizes[0] if len(sizes) > len(tile_sizes) else 1


def _commits_and_waits(
    loop: _Loop, definitions: dict[str, _Operation]
) -> Iterator[frozenset[str] | int]:
    """In order: a commit as the buffers that its group fills, a wait as groups it leaves."""
    open_buffers: set[str] = set()
    for operation in loop.operations:
        if operation.kind == "ttg.async_copy_global_to_local":
            open_buffers.add(_root(operation.operands[1], definitions))
        elif operation.kind == "ttg.async_commit_group":
            yield frozenset(open_buffers)
            open_buffers = set()
        elif operation.kind == "ttg.async_wait":
            match = _WAIT.search(operation.text)
            yield int(match[1]) if match else 0


def _num_ahead(buffer: str, groups: list[frozenset[str] | int]) -> int:
    """Groups that fill a buffer and that the strictest wait of the loop leaves under way."""
    commits_per_turn = sum(isinstance(group, frozenset) for group in groups)
    left = []
    for place, wait in enumerate(groups):
        if isinstance(wait, int):
            # What was committed before: in this turn of the loop, then in those before it.
            before = [g for g in groups[place:] + groups[:place] if isinstance(g, frozenset)]
            latest = [before[-1 - i % commits_per_turn] for i in range(wait)] if before else []
            left.append(sum(buffer in group for group in latest))
    return min(left, default=0)
