"""Which call that needs other processes this process is in, and which ones it has been in.

Every such call is counted in its group. A process says in its signs of life what it has
entered and what it waits in; from that `opensmp.distributed.watchdog.deadlock` tells a slow run,
which is nobody's fault, from one that can never go on. Entering costs about a microsecond.
"""

from __future__ import annotations

import contextlib
import resource
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

_NAMES_KEPT = 4
RUNNING, WAITING, FINISHED = "running", "waiting", "finished"


class Group(NamedTuple):
    """Ranks whose calls are counted together.

    Attributes:
        ranks: The ranks, ascending.
        lane: Tells series of calls of the same ranks apart, where their order is free, such
            as messages in either direction.
    """

    ranks: tuple[int, ...]
    lane: str = ""


class Wait(NamedTuple):
    """A call that has been entered and not yet left.

    Attributes:
        group: Who takes part.
        number: How many calls in this group this is, from 1.
        name: What it is, the same on all ranks.
        computes: Whether the process may compute a while in it before it waits for others, as
            in a run of a traced function.
    """

    group: Group
    number: int
    name: str
    computes: bool = False

    def to_json(self) -> list[Any]:
        """A form that JSON can carry."""
        return [list(self.group.ranks), self.group.lane, self.number, self.name, self.computes]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Wait:
        """The call that `to_json` wrote."""
        ranks, lane, number, name, computes = data
        return cls(Group(tuple(ranks), lane), number, name, computes)


class Entered(NamedTuple):
    """The calls of one group that a process has entered.

    Attributes:
        number: How many they are.
        names: The names of the last of them, oldest first.
    """

    number: int
    names: tuple[str, ...]


class Report(NamedTuple):
    """What a process says about itself.

    Attributes:
        state: `"running"`, `"waiting"` or `"finished"`.
        moment: Grows with every change: equal numbers mean that nothing has changed between.
        wait: The innermost call that the main thread is in.
        entered: The calls entered so far, by group.
        steps: Training steps that have ended.
        worked: Processor seconds that the process has used, without the thread that reports.
        faults: Major page faults of the same threads: a process that is swapped in uses no
            processor, but gets on.
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
        """The calls that this process is in, the one of the main thread first."""
        return (self.wait, *self.aside) if self.wait else self.aside

    def to_json(self) -> dict[str, Any]:
        """A form that JSON can carry."""
        return {
            "state": self.state,
            "moment": self.moment,
            "wait": self.wait and self.wait.to_json(),
            "aside": [wait.to_json() for wait in self.aside],
            "entered": [
                [list(group.ranks), group.lane, done.number, list(done.names)]
                for group, done in self.entered.items()
            ],
            "steps": self.steps,
            "worked": self.worked,
            "faults": self.faults,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_json` wrote."""
        return cls(
            state=data["state"],
            moment=data["moment"],
            wait=data["wait"] and Wait.from_json(data["wait"]),
            aside=tuple(map(Wait.from_json, data["aside"])),
            entered={
                Group(tuple(ranks), lane): Entered(number, tuple(names))
                for ranks, lane, number, names in data["entered"]
            },
            steps=data["steps"],
            worked=data["worked"],
            faults=data["faults"],
        )


class Waits:
    """The record of one process.

    Calls may be entered on any thread. A process counts as waiting only while its main thread
    is in a call, since the other threads of a program may always do what its peers wait for.

    Example:
        ```python
        with waits.entered("smp.barrier", ranks=(0, 1)):
            ...  # the collective operation
        ```
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moment = 0
        self._steps = 0
        self._finished = False
        self._counts: dict[Group, int] = {}
        self._names: dict[Group, deque[str]] = {}
        self._open: list[Wait] = []  # of the main thread, innermost last
        self._aside: list[Wait] = []  # of other threads
        self._generation = 0

    def enter(
        self, name: str, ranks: tuple[int, ...], lane: str = "", *, computes: bool = False
    ) -> Wait:
        """Notes that a call begins that needs all these ranks.

        Args:
            name: What it is, in the words of the user, the same on all ranks.
            ranks: All that take part, ascending, the same on all ranks.
            lane: See `Group`.
            computes: See `Wait`. The main thread waits in such a call whichever thread enters
                it; another call counts as one of the thread that enters it.

        Returns:
            What `leave` needs.
        """
        with self._lock:
            self._moment += 1
            group = Group(ranks, f"{lane}#{self._generation}" if self._generation else lane)
            number = self._counts[group] = self._counts.get(group, 0) + 1
            self._names.setdefault(group, deque(maxlen=_NAMES_KEPT)).append(name)
            wait = Wait(group, number, name, computes)
            in_main = threading.current_thread() is threading.main_thread()
            if in_main and not computes:
                # Python runs here: what still counts as a run has ended, by an error.
                self._open = [each for each in self._open if not each.computes]
            (self._open if in_main or computes else self._aside).append(wait)
            return wait

    def leave(self, wait: Wait) -> None:
        """Notes that the call has ended."""
        with self._lock:
            self._moment += 1
            for calls in (self._open, self._aside):
                if wait in calls:
                    calls.remove(wait)

    @contextlib.contextmanager
    def entered(self, name: str, ranks: tuple[int, ...], lane: str = "") -> Iterator[None]:
        """Between `enter` and `leave`."""
        wait = self.enter(name, ranks, lane)
        try:
            yield
        finally:
            self.leave(wait)

    def forget_runs(self) -> None:
        """Notes that no run of a function lasts any more: they have ended by an error."""
        with self._lock:
            self._moment += 1
            self._open = [each for each in self._open if not each.computes]

    def begin_anew(self, generation: int) -> None:
        """Begins to count anew: after an error, ranks have entered other calls.

        Args:
            generation: Grows each time, the same on all ranks. What was counted before is of
                other groups.
        """
        with self._lock:
            self._moment += 1
            self._generation = generation
            self._counts.clear()
            self._names.clear()
            self._open.clear()

    def progress(self) -> None:
        """Notes that a training step has ended."""
        with self._lock:
            self._steps += 1

    def finish(self) -> None:
        """Notes that the program has ended and will enter nothing any more."""
        with self._lock:
            self._moment += 1
            self._finished = True

    def report(self) -> Report:
        """What there is to say now; for a thread that does nothing else."""
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
    """Processor seconds and major page faults of all threads but this one."""
    own = resource.getrusage(resource.RUSAGE_THREAD)
    all_ = resource.getrusage(resource.RUSAGE_SELF)
    worked = all_.ru_utime + all_.ru_stime - own.ru_utime - own.ru_stime
    return worked, all_.ru_majflt - own.ru_majflt


waits = Waits()
"""The record of this process."""

enter, leave, entered = waits.enter, waits.leave, waits.entered
