"""How far a quality run is: per sample within a setting, and for all settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from progress import Progress, duration, say


class RunProgress:
    """Lines on stderr for a run of many settings over the same samples.

    The full cache computes each prompt; later settings mostly find it in the prefix cache. So the
    rest of a run is estimated from settings of the same kind, and not at all before one was timed.

    Args:
        num_full: samples that the full cache still has to answer.
        num_compressed: those of all other settings together.
        num_settings: the full cache among them.
        every_s: seconds between two lines of one setting at least.
        out: where lines go; None = stderr.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        num_full: int,
        num_compressed: int,
        num_settings: int,
        *,
        every_s: float = 10.0,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._left = {True: num_full, False: num_compressed}
        self._done = {True: 0, False: 0}
        self._took_s = {True: 0.0, False: 0.0}
        self._num_settings, self._every_s, self._out, self._clock = (
            num_settings,
            every_s,
            out,
            clock,
        )
        self._start = clock()
        self._number = 0
        self._is_full = True
        # Of the setting that is going on.
        self._samples: Progress | None = None
        self._setting_done = 0
        say(
            f"{num_settings} settings, {num_full + num_compressed} samples to go, "
            f"{num_full} of them with the full cache, which comes first and is slowest",
            out,
        )

    def start(self, label: str, num_samples: int, is_full: bool = False) -> None:
        """A setting begins, of which so many samples are missing."""
        self._number += 1
        self._is_full = is_full
        name = f"[{self._number}/{self._num_settings}] {label}"
        if not num_samples:
            say(f"{name}: there already", self._out)
            return
        say(f"{name}: {num_samples} samples", self._out)
        self._samples = Progress(
            name,
            num_samples,
            "samples",
            every_s=self._every_s,
            note=self._note,
            out=self._out,
            clock=self._clock,
        )

    def advance(self, num_samples: int = 1) -> None:
        """So many more samples of the setting are done."""
        assert self._samples is not None
        self._setting_done += num_samples
        self._samples.advance(num_samples)

    def finish(self) -> None:
        """The setting is done."""
        self._left[self._is_full] -= self._setting_done
        self._done[self._is_full] += self._setting_done
        if self._samples is not None:
            self._took_s[self._is_full] += self._samples.elapsed_s
        self._samples, self._setting_done = None, 0

    def left_s(self) -> float | None:
        """Estimated seconds of the rest of the run; None while a kind of settings is not timed."""
        total = 0.0
        for is_full in (True, False):
            done, took_s = self._done[is_full], self._took_s[is_full]
            left = self._left[is_full]
            if self._samples is not None and is_full == self._is_full:
                left -= self._setting_done
                done += self._setting_done
                took_s += self._samples.elapsed_s
            if left and not done:
                return None
            total += took_s / done * left if left else 0.0
        return total

    def _note(self) -> str:
        left, passed = self.left_s(), duration(self._clock() - self._start)
        rest = "not known yet" if left is None else f"about {duration(left)}"
        return f"whole run: {passed}, rest {rest}"
