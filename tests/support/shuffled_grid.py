"""Triton's interpreter with a launch's programs in random order, or with several of them at once.

The interpreter runs the programs of a launch one after another, in ascending order. A GPU promises
no order, and runs many at a time. `shuffled_grid` draws an order for every launch.
`interleaved_grid` also keeps several programs under way and changes between them where one reads
or writes memory. What a kernel writes must not depend on either.
"""

from __future__ import annotations

import inspect
import itertools
import random
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from triton.runtime import interpreter

GridIndex = tuple[int, int, int]

# Before each of these of the builder a program may be interrupted.
_MEMORY_OPS = (
    "create_masked_load",
    "create_masked_store",
    "create_atomic_rmw",
    "create_atomic_cas",
)
# Programs that take turns, and how often one that reads or writes is interrupted.
_AWAKE_PROGRAMS = 8
_SWITCH_PROBABILITY = 0.4
# Of the interrupted ones, some sleep until nobody else can go on; so many at a time.
_SLEEP_PROBABILITY = 0.3
_MOST_SLEEPING = 32


@dataclass
class ShuffledLaunches:
    """What has been run in another order so far.

    Attributes:
        num_programs: of each launch.
        num_switches: from one unfinished program to another; none where programs take turns.
    """

    num_programs: list[int] = field(default_factory=list)
    num_switches: int = 0

    @property
    def has_shuffled(self) -> bool:
        """Whether any launch had programs to shuffle."""
        return any(number > 1 for number in self.num_programs)


def _all_programs(grid: GridIndex) -> list[GridIndex]:
    return list(itertools.product(*(range(size) for size in grid)))


@contextmanager
def shuffled_grid(seed: int) -> Iterator[ShuffledLaunches]:
    """Run the programs of every launch one after another, in an order drawn from `seed`."""
    launches = ShuffledLaunches()
    rng = random.Random(seed)
    builder = interpreter.InterpreterBuilder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    order: Iterator[GridIndex] = iter(())

    def set_grid_dim(self: Any, *grid: int) -> None:
        nonlocal order
        set_dim(self, *grid)
        programs = _all_programs(grid)
        launches.num_programs.append(len(programs))
        rng.shuffle(programs)
        order = iter(programs)

    def set_grid_idx(self: Any, *_: int) -> None:
        set_index(self, *next(order))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_dim", set_grid_dim)
        patch.setattr(builder, "set_grid_idx", set_grid_idx)
        yield launches


class _Programs:
    """The programs of one launch, each in a thread of its own, of which one runs at a time."""

    def __init__(
        self, run: Callable[[GridIndex], None], order: list[GridIndex], rng: random.Random
    ):
        self.num_switches = 0
        self._run = run
        self._rng = rng
        self._not_started = order
        self._turns: dict[threading.Thread, threading.Semaphore] = {}
        self._awake: list[threading.Thread] = []
        self._sleeping: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self._all_done = threading.Semaphore(0)

    def finish(self) -> None:
        """Run all of them to their ends.

        Raises:
            BaseException: the first that a program raised.
        """
        self._give_turn()
        self._all_done.acquire()
        if self._errors:
            raise self._errors[0]

    def interrupt(self) -> None:
        """Let another program run, sometimes; called by the one that has the turn."""
        if self._rng.random() >= _SWITCH_PROBABILITY:
            return
        self.num_switches += 1
        own = threading.current_thread()
        if self._rng.random() < _SLEEP_PROBABILITY and len(self._sleeping) < _MOST_SLEEPING:
            self._awake.remove(own)
            self._sleeping.append(own)
        self._give_turn()
        self._turns[own].acquire()

    def _give_turn(self) -> None:
        while self._not_started and len(self._awake) < _AWAKE_PROGRAMS:
            thread = threading.Thread(
                target=self._program, args=(self._not_started.pop(),), daemon=True
            )
            self._turns[thread] = threading.Semaphore(0)
            self._awake.append(thread)
            thread.start()
        if not self._awake and self._sleeping:
            # One only: the others sleep as long as it has anything to do.
            self._awake.append(self._sleeping.pop(self._rng.randrange(len(self._sleeping))))
        if self._awake:
            self._turns[self._rng.choice(self._awake)].release()
        else:
            self._all_done.release()

    def _program(self, index: GridIndex) -> None:
        own = threading.current_thread()
        self._turns[own].acquire()
        try:
            if not self._errors:
                self._run(index)
        except BaseException as error:
            self._errors.append(error)
        self._awake.remove(own)
        self._give_turn()


def _in_place_of(kernel: Callable, run: Callable[[dict[str, Any]], None]) -> Callable:
    """A function with the kernel's parameters and globals that calls `run` with its arguments."""

    def stand_in(**arguments: Any) -> None:
        run(arguments)

    # The interpreter looks for `triton.language` among the globals.
    function = types.FunctionType(
        stand_in.__code__, kernel.__globals__, kernel.__name__, None, stand_in.__closure__
    )
    function.__signature__ = inspect.signature(kernel)
    return function


@contextmanager
def interleaved_grid(seed: int) -> Iterator[ShuffledLaunches]:
    """Run several programs of every launch at a time, in an order drawn from `seed`."""
    launches = ShuffledLaunches()
    rng = random.Random(seed)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    local = threading.local()
    started: list[GridIndex] = []
    running: list[_Programs] = []

    def run_all(kernel: Callable, arguments: dict[str, Any]) -> None:
        # Called once per program by the interpreter's own loop; the last call runs them.
        started.append(local.index)
        dims = interpreter.interpreter_builder.grid_dim
        if len(started) < len(_all_programs(dims)):
            return

        def run(index: GridIndex) -> None:
            local.index = index
            kernel(**arguments)

        order = started.copy()
        started.clear()
        launches.num_programs.append(len(order))
        rng.shuffle(order)
        running.append(_Programs(run, order, rng))
        try:
            running[-1].finish()
        finally:
            launches.num_switches += running.pop().num_switches

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        init_executor(self, *args, **kwargs)
        kernel = self.fn
        self.fn = _in_place_of(kernel, lambda arguments: run_all(kernel, arguments))

    def interrupted(memory_op: Callable) -> Callable:
        def op(*args: Any, **kwargs: Any) -> Any:
            if running:
                running[-1].interrupt()
            return memory_op(*args, **kwargs)

        return op

    init_executor = executor.__init__
    index = property(lambda self: local.index, lambda self, value: setattr(local, "index", value))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "__init__", init)
        patch.setattr(builder, "grid_idx", index, raising=False)
        for name in _MEMORY_OPS:
            patch.setattr(builder, name, interrupted(getattr(builder, name)))
        yield launches
