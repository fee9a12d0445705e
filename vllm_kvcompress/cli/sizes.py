"""Amounts of memory as a person writes and reads them."""

from __future__ import annotations

import re
from decimal import Decimal

_DECIMAL = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_UNITS = {**_BINARY, **{f"{unit}ib": _BINARY[unit] for unit in "kmgt"}, **_DECIMAL}


def parse_size(text: str) -> int:
    """Bytes of a size such as '20GiB', '20G' (the same) or '20GB'.

    Raises:
        ValueError: if it is no size.
    """
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]+)?) *([a-z]*)", text.strip().lower())
    if match is None or match.group(2) not in _UNITS:
        raise ValueError(f"not a size: {text!r} (e.g. 20GiB)")
    return int(Decimal(match.group(1)) * _UNITS[match.group(2)])


def format_size(num_bytes: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    for unit, unit_bytes in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.1f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"
