"""Log of collective calls entered and pending on this process.

Calls are counted per group of ranks. The heartbeats of a process report the calls it has entered
and those that it waits in, by which `opensmp.distributed.watchdog.verdicts.deadlock` tells a slow
run from one that can never continue. Entering a call costs about a microsecond.
"""

from __future__ import annotations

import contextlib
import resource
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_NAMES_KEPT = 4
RUNNING, WAITING, FINISHED = "running", "waiting", "finished"


class Group:
    """Ranks whose calls are counted together.

    There is one object for each value, so that comparing and hashing groups takes the same time for
    any number of ranks.

    Attributes:
        ranks: The ranks, ascending.
        lane: Separates series of calls of the same ranks whose order is free, such as messages in
            either direction.
    """

    __slots__ = ("lane", "ranks")
    ranks: tuple[int, ...]
    lane: str

    def __new__(cls, ranks: tuple[int, ...], lane: str = "") -> Group:
        """Returns the group with these values."""
        known = _groups.get((ranks, lane))
        if known is None:
            made = super().__new__(cls)
            made.ranks, made.lane = ranks, lane
            known = _groups.setdefault((ranks, lane), made)  # the same one in all threads
        return known

    def __repr__(self) -> str:
        return f"Group({self.ranks}, {self.lane!r})"


_groups: dict[tuple[tuple[int, ...], str], Group] = {}


class Wait(NamedTuple):
    """A call that has been entered and not yet left.

    Attributes:
        group: The participating ranks.
        number: Number of the call in this group, from 1.
        name: Its name, the same on all ranks.
        computes: Whether the process may compute in it before it waits for others, as in a run of a
            traced function.
    """

    group: Group
    number: int
    name: str
    computes: bool = False


class Entered(NamedTuple):
    """How many calls of a group a process has entered, and the last ones' names, oldest first."""

    number: int
    names: tuple[str, ...]


class Report(NamedTuple):
    """State of a process, as its heartbeats tell it; see `heartbeat.py` in this folder.

    Attributes:
        state: `"running"`, `"waiting"` or `"finished"`.
        moment: Counter of changes: equal numbers mean that nothing has changed in between.
        wait: The innermost call that the main thread is in.
        entered: The calls entered so far, by group.
        steps: Number of training steps that have ended.
        worked: CPU seconds that the process has used, without the reporting thread.
        faults: Major page faults of the same threads: a process being swapped in makes progress
            without using the CPU.
        aside: The calls that other threads are in.
    """

    state: str
    moment: int
    wait: Wait | None
    entered: Mapping[Group, Entered]
    steps: int = 0
    worked: float = 0.0
    faults: int = 0
    aside: tuple[Wait, ...] = ()

    @property
    def calls(self) -> tuple[Wait, ...]:
        """The calls that this process is in, that of the main thread first."""
        return (self.wait, *self.aside) if self.wait else self.aside


class CallLog:
    """The log of one process.

    Any thread may enter calls. A process counts as waiting only while its main thread is in a call,
    since other threads may still do what its peers wait for.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moment = 0
        self._steps = 0
        self._finished = False
        self._counts: dict[Group, int] = {}
        self._names: dict[Group, deque[str]] = {}
        self._open: list[Wait] = []  # main thread, innermost last
        self._aside: list[Wait] = []  # other threads
        self._generation = 0

    def enter(
        self, name: str, ranks: tuple[int, ...], lane: str = "", *, computes: bool = False
    ) -> Wait:
        """Logs the begin of a call that needs all these ranks; returns the argument for `leave`.

        `name` and `ranks` are the same on all of them; see `Group` and `Wait`. A call that
        `computes` is attributed to the main thread, whichever thread enters it.
        """
        with self._lock:
            self._moment += 1
            group = Group(ranks, f"{lane}#{self._generation}" if self._generation else lane)
            number = self._counts[group] = self._counts.get(group, 0) + 1
            self._names.setdefault(group, deque(maxlen=_NAMES_KEPT)).append(name)
            wait = Wait(group, number, name, computes)
            in_main = threading.current_thread() is threading.main_thread()
            if in_main and not computes:
                # Python runs on the main thread, so that runs logged as pending have ended by an
                # error.
                self._open = [each for each in self._open if not each.computes]
            (self._open if in_main or computes else self._aside).append(wait)
            return wait

    def leave(self, wait: Wait) -> None:
        """Logs the end of a call."""
        with self._lock:
            self._moment += 1
            for calls in (self._open, self._aside):
                if wait in calls:
                    calls.remove(wait)

    @contextlib.contextmanager
    def entered(self, name: str, ranks: tuple[int, ...], lane: str = "") -> Iterator[None]:
        """Context that calls `enter` and `leave`."""
        wait = self.enter(name, ranks, lane)
        try:
            yield
        finally:
            self.leave(wait)

    def forget_runs(self) -> None:
        """Removes pending runs of functions: they have ended by an error."""
        with self._lock:
            self._moment += 1
            self._open = [each for each in self._open if not each.computes]

    def begin_anew(self, generation: int) -> None:
        """Restarts counting after an error, because ranks have entered different calls.

        `generation` grows each time, the same on all ranks. Earlier counts belong to other groups.
        """
        with self._lock:
            self._moment += 1
            self._generation = generation
            self._counts.clear()
            self._names.clear()
            self._open.clear()

    def progress(self) -> None:
        """Logs the end of a training step."""
        with self._lock:
            self._steps += 1

    def finish(self) -> None:
        """Logs that the program has ended and will enter no more calls."""
        with self._lock:
            self._moment += 1
            self._finished = True

    @property
    def is_finished(self) -> bool:
        """Whether the program has ended."""
        return self._finished

    def report(self) -> Report:
        """The current state; to be called on a dedicated thread, whose CPU time is not counted."""
        worked, faults = _used_by_others()
        with self._lock:
            wait = self._open[-1] if self._open else None
            state = FINISHED if self._finished else WAITING if wait else RUNNING
            return Report(
                state=state,
                moment=self._moment,
                wait=wait,
                entered={
                    group: Entered(count, tuple(self._names[group]))
                    for group, count in self._counts.items()
                },
                steps=self._steps,
                worked=worked,
                faults=faults,
                aside=tuple(self._aside),
            )


def _used_by_others() -> tuple[float, int]:
    """CPU seconds and major page faults of all threads but this one."""
    own = resource.getrusage(resource.RUSAGE_THREAD)
    all_ = resource.getrusage(resource.RUSAGE_SELF)
    worked = all_.ru_utime + all_.ru_stime - own.ru_utime - own.ru_stime
    return worked, all_.ru_majflt - own.ru_majflt


waits = CallLog()
"""The call log of this process."""
