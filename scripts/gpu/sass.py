"""Machine code of NVIDIA's GPUs, as cuobjdump prints it."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)[^;]*?(0x[0-9a-f]+)? *;"
)


def loop_stack_accesses(sass: str) -> int:
    """Loads and stores of a thread's stack inside innermost loops.

    A loop is what lies between a branch backwards and its target; the endless one at the end of
    every kernel is none.
    """
    stack, loops = [], []
    for address, kind, target in _INSTRUCTION.findall(sass):
        place = int(address, 16)
        if kind in ("LDL", "STL"):
            stack.append(place)
        elif kind == "BRA" and target and int(target, 16) < place:
            loops.append((int(target, 16), place))
    innermost = [
        (start, end)
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]
    return sum(any(start <= place <= end for start, end in innermost) for place in stack)
