"""Preemption: makes all ranks stop after the same step.

The signal may reach one rank only, and ranks may be at different steps. The rank that receives it
tells rank 0, which asks all ranks how many step boundaries they have passed. A rank that has
answered passes no further boundary until it knows where all stop: one after the furthest that any
rank has passed. The threads of `opensmp.distributed.watchdog.monitor` exchange these messages while
the main threads compute, so that a step only increments a counter, and no rank waits for another
one's step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

from opensmp.distributed.channel.channel import Message
from opensmp.distributed.watchdog.monitor import PREEMPTED, Watch

DEFAULT_SECONDS = 300.0
"""How long a rank may take to reach a step boundary after the signal."""


class Boundaries:
    """The step boundaries that this process has passed, and the one at which it stops.

    One thread arrives at boundaries; others hold it and set where it stops.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passed = 0
        self._held = False
        self._stop: int | None = None

    def arrive(self) -> bool:
        """Passes the next boundary; returns whether it is the one to stop at."""
        with self._changed:
            while self._held and self._stop is None:
                self._changed.wait()
            self._passed += 1
            return self._stop is not None and self._passed >= self._stop

    def hold(self) -> int:
        """Number of boundaries passed; `arrive` blocks from now on until `stop_at` is called."""
        with self._changed:
            self._held = True
            return self._passed

    def stop_at(self, number: int) -> None:
        """Sets the boundary at which to stop, counted from 1."""
        with self._changed:
            self._stop = number
            self._changed.notify_all()


class Preemption:
    """This process's part in stopping all processes after a signal.

    Attributes:
        is_over: Whether all processes have saved and are ending.
    """

    def __init__(
        self,
        watch: Watch | None = None,
        rank: int = 0,
        size: int = 1,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self.is_over = False
        self._watch, self._rank, self._size = watch, rank, size
        self._leave = leave
        self._boundaries = Boundaries()
        self._passed: dict[int, int] = {}  # by rank; rank 0 only
        self._begun = False
        self._saves = False
        self._signal = ""
        if watch is not None:
            watch.hears = self._hear

    def ask(self, name: str, seconds: float) -> None:
        """Starts to stop all processes; not on the main thread, which may hold any lock."""
        message = {"kind": "preempt", "signal": name, "seconds": seconds}
        if self._watch is None or self._rank == 0:
            self._hear(0, message)
        else:
            self._watch.send(0, message)

    def arrive(self) -> str | None:
        """Passes a step boundary; returns the signal's name if all processes are to stop here."""
        if not self._boundaries.arrive():
            return None
        self._saves = True
        return self._signal

    def _hear(self, rank: int, message: Message) -> None:
        kind = message["kind"]
        if kind == "preempt" and self._begin(message):
            self._tell({**message, "kind": "preempt_hold"})
            self._take(0, self._boundaries.hold())
        elif kind == "preempt_hold" and self._begin(message):
            self._send({"kind": "preempt_held", "passed": self._boundaries.hold()})
        elif kind == "preempt_held":
            self._take(rank, int(message["passed"]))
        elif kind == "preempt_stop":
            self._boundaries.stop_at(int(message["at"]))

    def _begin(self, message: Message) -> bool:
        """Starts the time limit; returns whether this is the first message about it."""
        if self._begun:
            return False
        self._begun, self._signal = True, str(message["signal"])
        seconds = float(message["seconds"])
        timer = threading.Timer(seconds, self._end_late, [seconds])
        timer.daemon = True
        timer.start()
        return True

    def _take(self, rank: int, passed: int) -> None:
        """Rank 0: records a process's boundary; once all are known, tells all where to stop."""
        self._passed[rank] = passed
        if len(self._passed) == self._size:
            stop = max(self._passed.values()) + 1
            self._tell({"kind": "preempt_stop", "at": stop})
            self._boundaries.stop_at(stop)

    def _tell(self, message: Message) -> None:
        for rank in range(1, self._size):
            self._send(message, rank)

    def _send(self, message: Message, rank: int = 0) -> None:
        if self._watch is not None:
            self._watch.send(rank, message)

    def _end_late(self, seconds: float) -> None:
        if self._saves:
            return
        text = (
            f"{self._signal} came, and within {seconds:g} s no step ended at which a checkpoint "
            "could be saved, so that the ones before are the newest. Expected: "
            "smp.checkpoint_on_preemption(manager) after each step, in all ranks, or "
            "smp.CheckpointOnPreemption(manager) in the callbacks of fit; where a step takes "
            "longer, say so: seconds=600"
        )
        print(f"opensmp: {text}", file=sys.stderr, flush=True)
        if self._watch is not None:
            self._watch.fail(text, code=PREEMPTED)
        self._leave(PREEMPTED)


# ------------------------------------------------------------------------- of this process

_preemption = Preemption()
_handled: dict[int, float] = {}  # signal number to seconds
_pipe: list[int] = []


def attach(watch: Watch, rank: int, size: int) -> None:
    """Sets up preemption for several processes; called after the rendezvous."""
    global _preemption
    _preemption = Preemption(watch, rank, size)


def listen(signals: Sequence[int], seconds: float) -> None:
    """Makes signals stop all processes; handlers installed earlier only get the new time limit."""
    for number in signals:
        if number not in _handled:
            signal.signal(number, _handle)
        _handled[number] = seconds
    if not _pipe:
        _pipe.extend(os.pipe())
        os.set_blocking(_pipe[1], False)
        threading.Thread(target=_wait, name="opensmp-preemption", daemon=True).start()


def arrive() -> str | None:
    """Passes a step boundary; returns the name of the signal if all processes are to stop here."""
    return _preemption.arrive()


def end() -> None:
    """Ends the program with the exit code `PREEMPTED`, after all processes have saved."""
    _preemption.is_over = True
    sys.exit(PREEMPTED)


def is_over() -> bool:
    """Whether all processes have saved and are ending."""
    return _preemption.is_over


_process = os.getpid()


def _handle(number: int, frame: types.FrameType | None) -> Any:
    if os.getpid() != _process:  # a forked child ends as without this handler
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    with contextlib.suppress(BlockingIOError):
        os.write(_pipe[1], bytes([number]))


def _wait() -> None:
    while True:
        number = os.read(_pipe[0], 1)[0]
        _preemption.ask(signal.Signals(number).name, _handled[number])
