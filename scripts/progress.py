"""Lines on stderr that say how far long work is and how long the rest will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO


def duration(seconds: float) -> str:
    """Rounded for a reader: 45 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def say(text: str, out: TextIO | None = None) -> None:
    """One line on stderr, at once."""
    print(text, file=out or sys.stderr, flush=True)


class Progress:
    """Counts one piece of work and prints a line now and then.

    Args:
        name: of the work, at the start of each line.
        total: amount of all of it.
        unit: of the amounts, e.g. "samples".
        every_s: seconds between two lines at least; the last line is always printed.
        note: what a line ends with, asked each time; "" = nothing.
        out: where lines go; None = stderr.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        name: str,
        total: float,
        unit: str,
        *,
        every_s: float = 10.0,
        note: Callable[[], str] | None = None,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._every_s, self._note, self._out, self._clock = every_s, note, out, clock
        self._done = 0.0
        self._start = self._last_line = clock()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the work began."""
        return self._clock() - self._start

    @property
    def left_s(self) -> float | None:
        """Estimated seconds of the rest; None while nothing is done."""
        if not self._done:
            return None
        return self.elapsed_s / self._done * max(0.0, self._total - self._done)

    def advance(self, amount: float = 1) -> None:
        """So much more is done."""
        self._done += amount
        is_last = self._done >= self._total
        if is_last or self._clock() - self._last_line >= self._every_s:
            self._last_line = self._clock()
            self._print()

    def _print(self) -> None:
        parts = [f"{self._done:.0f} of {self._total:.0f} {self._unit}", duration(self.elapsed_s)]
        left = self.left_s
        if left:
            parts.append(f"about {duration(left)} left")
        if self._note is not None and self._note():
            parts.append(self._note())
        say(f"{self._name}: {', '.join(parts)}", self._out)
