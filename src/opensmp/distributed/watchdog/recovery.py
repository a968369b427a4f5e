"""Propagates errors so that all processes raise, or none, and can continue if they catch them.

Ranks need each other inside a step. If one left it by an error, the others would wait for it,
forever if its program catches the error and continues. So each call that needs other ranks is
guarded here: an error is reported to rank 0, which tells all ranks, see
`opensmp.distributed.watchdog.verdicts.recovery_rounds`. Their pending operations are interrupted,
and they raise the same error from the same call of their programs.

TensorFlow's collectives cannot be used after an interrupt, and tensors in transit must not be
delivered to a later step. So before the next guarded call all ranks meet and reset their
communication.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

from opensmp.distributed.channel.channel import Message
from opensmp.distributed.watchdog.call_log import CallLog, waits
from opensmp.distributed.watchdog.rank_error import RankError, from_rank
from opensmp.errors import CommunicationError

GENERATION_BITS = 32
"""After an error, runs of a step are numbered from `generation << GENERATION_BITS`."""

_CAUSE_SECONDS = 10.0  # time limit for rank 0 to tell the cause
_MEETING = "going on together after an error"


class Interruptible(Protocol):
    """An object in which a rank may wait for others."""

    def interrupt(self) -> None:
        """Makes pending and later waits fail until `restart`. Called on another thread."""

    def restart(self, generation: int) -> None:
        """Resets it; all ranks do so while nothing runs."""


interruptible: weakref.WeakSet[Any] = weakref.WeakSet()
"""All such objects of this process, which add themselves."""


class Recovery:
    """Error recovery of one process.

    Args:
        rank: This process.
        size: Number of ranks.
        tell: Sends a message to rank 0.
        record: The call log of this process.
        is_consequence: Whether an error may be due to the failure of another process.
        interrupt: Interrupts TensorFlow's collectives, with a text.
        renew: Makes them usable again; all ranks call it while none uses them.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        tell: Callable[[Message], None],
        record: CallLog,
        *,
        is_consequence: Callable[[BaseException], bool],
        interrupt: Callable[[str], None],
        renew: Callable[[], None],
    ) -> None:
        self._rank, self._size = rank, size
        self._tell = tell
        self._record = record
        self._is_consequence = is_consequence
        self._interrupt, self._renew = interrupt, renew
        self._changed = threading.Condition()
        self._generation = 0
        self._cause: RankError | None = None
        self._stage = ""
        self._has_raised = False  # in this generation
        # Number of guarded calls that the main thread has begun, per level of nesting.
        self._counts: list[float] = [0]
        self._function: _Function | None = None
        self._communicating: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def has_interrupted(self) -> bool:
        """Whether an error has ever interrupted operations of this process."""
        return self._generation > 0 or self._cause is not None

    # ------------------------------------------------------------------- for the watch's thread

    def hear(self, message: Message) -> None:
        """Handles a message of rank 0; called on the watch's thread."""
        with self._changed:
            if message["generation"] != self._generation:
                return
            halts = message["kind"] == "halt"
            if halts:
                self._cause = RankError(**message["error"])
            else:
                self._stage = message["kind"]
            self._changed.notify_all()
        if halts:
            for one in list(interruptible):
                one.interrupt()
            self._interrupt(f"rank {self._cause and self._cause.rank} has failed")

    # --------------------------------------------------------------------- for guarded calls

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Context of a call that all ranks make; raises the error of whichever rank was first."""
        if not _in_main_thread() or self._function is not None:
            self.touch()
            yield
            return
        self._settle_if_raised()
        self._counts[-1] += 1
        self._counts.append(0)
        try:
            self._raise_if_halted()
            yield
        except Exception as error:
            self._fail(error)
        finally:
            self._counts.pop()

    def call(self, function: Any, work: Callable[[], Any]) -> Any:
        """Makes a call of a `tf.function`, in which ranks may need each other."""
        if not _in_main_thread() or self._function is not None:
            return work()
        self._settle_if_raised()
        here = self._function = _Function(function)
        try:
            return work()
        except Exception as error:
            if function in self._communicating:
                self.touch()
            if not here.is_touched:
                raise
            self._fail(error)
        finally:
            self._function = None

    def touch(self) -> None:
        """Records that the `tf.function` being called needs other ranks."""
        here = self._function
        if here is not None and not here.is_touched:
            here.is_touched = True
            self._counts[-1] += 1
            self._communicating.add(here.function)

    def begin_run(self) -> None:
        """Must be called when operations that need other ranks begin to run."""
        self.touch()
        if self._cause is not None or self._has_raised:
            raise CommunicationError(_interrupted(self._cause))

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Context of a single operation that needs other ranks, called eagerly."""
        is_main = _in_main_thread()
        if is_main:
            self._settle_if_raised()
        self.touch()
        try:
            self._raise_if_halted()
            yield
        except Exception as error:
            if not is_main or self._function is not None:
                raise  # reported by the call of the function being traced
            if self._cause is None and not self._is_consequence(error):
                raise  # all ranks raise it
            if len(self._counts) == 1 and not self._has_raised:
                self._counts[-1] += 0.5  # neither guarded nor inside a guarded call
            self._fail(error)

    # ---------------------------------------------------------------------------- an error

    def _fail(self, error: Exception) -> NoReturn:
        """Reports an error to the other ranks, and raises the one that all raise."""
        if self._has_raised:
            raise error  # already reported by an inner call
        self._record.forget_runs()
        halted = self._cause is not None
        message = self._message(
            "fault",
            error=RankError.of(self._rank, error)._asdict(),
            consequence=halted or self._is_consequence(error),
        )
        self._tell(message)
        self._wait_for(lambda: self._cause is not None, _CAUSE_SECONDS)
        self._has_raised = True
        cause, own = self._cause, RankError.of(self._rank, error)
        if cause is None or cause._replace(rank=self._rank) == own:
            raise error
        raise from_rank(cause.as_exception(), cause.rank) from error

    def _raise_if_halted(self) -> None:
        if self._cause is not None:
            raise CommunicationError(_interrupted(self._cause))

    # ----------------------------------------------------------------------------- going on

    def _settle_if_raised(self) -> None:
        """After an error: waits until all ranks have reached their next call, and resets."""
        if not self._has_raised:
            return
        wait = self._record.enter(_MEETING, tuple(range(self._size)), "recovery")
        try:
            self._tell(self._message("settle", position=self._counts))
            self._wait_for(lambda: self._stage == "renew")
            self._renew()
            for one in list(interruptible):
                one.restart(self._generation + 1)
            self._tell(self._message("ready"))
            self._wait_for(lambda: self._stage == "go")
        finally:
            self._record.leave(wait)
        with self._changed:
            self._generation += 1
            self._cause, self._stage, self._has_raised = None, "", False
        self._record.begin_anew(self._generation)

    def _wait_for(self, is_true: Callable[[], bool], seconds: float | None = None) -> None:
        end = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while not is_true():
                left = 1.0 if end is None else min(1.0, end - time.monotonic())
                if left <= 0:
                    return
                self._changed.wait(left)  # in intervals, so that signals are handled

    def _message(self, kind: str, **values: Any) -> Message:
        return {"kind": kind, "generation": self._generation, **values}


class _Function:
    """A call of a `tf.function` in progress.

    Attributes:
        function: The function.
        is_touched: Whether it has reached an operation that needs other ranks.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.is_touched = False


def _interrupted(cause: RankError | None) -> str:
    if cause is None:
        return "A call was interrupted by an error; the ranks have not met again since."
    return f"A call was interrupted, because rank {cause.rank} has failed: {cause}"


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


# ------------------------------------------------------------------------- of this process

_recovery: Recovery | None = None


def install(recovery: Recovery) -> None:
    """Sets the recovery of this process."""
    global _recovery
    _recovery = recovery


def current() -> Recovery | None:
    """The recovery of this process; None if it runs alone."""
    return _recovery


def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that guards each call of a function; see `Recovery.guard`."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _recovery is None:
            return method(*args, **kwargs)
        with _recovery.guard():
            return method(*args, **kwargs)

    return call


def guard() -> contextlib.AbstractContextManager[None]:
    """`Recovery.guard` of this process."""
    return contextlib.nullcontext() if _recovery is None else _recovery.guard()


@contextlib.contextmanager
def entered(name: str, ranks: tuple[int, ...], lane: str = "") -> Iterator[None]:
    """Context that guards and logs an eager operation that needs other ranks."""
    if _recovery is None:
        with waits.entered(name, ranks, lane):
            yield
    else:
        with _recovery.collective(), waits.entered(name, ranks, lane):
            yield


def has_interrupted() -> bool:
    """Whether operations of this process were ever interrupted."""
    return _recovery is not None and _recovery.has_interrupted


def touch() -> None:
    """`Recovery.touch` of this process."""
    if _recovery is not None:
        _recovery.touch()


def begin_run() -> None:
    """`Recovery.begin_run` of this process."""
    if _recovery is not None:
        _recovery.begin_run()
