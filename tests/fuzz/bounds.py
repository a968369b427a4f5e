"""What every fuzz test asks of a parser, and how many cases it tries.

A case is what a stranger could hand over: a file, a variable, a message. The parser may take it,
or refuse it with an error of opensmp's own. Anything else is a fault of the parser: another
exception, an error whose text cannot be printed, more than a second of processor time, or more
than 200 MiB of memory.

    @cases()
    @given(text=plan_texts())
    def test_plan_files_are_read_or_refused(text, tmp_path):
        path.write_text(text)
        taken(lambda: Plan.load(path))

The environment variable FUZZ_CASES is the number of cases of each test. Without it there are few,
the same ones at each run; with it they are other ones at each run, and `--hypothesis-seed=N`
repeats a run.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from hypothesis import HealthCheck, settings

from opensmp.errors import SmpError

MOST_SECONDS = 1.0
"""Processor time of one case, which does not depend on what else the machine does."""

MOST_BYTES = 200 << 20
"""Memory that the process holds during one case, beyond what it held before."""

_MOST_MESSAGE = 20_000  # characters: what nobody could read is no message
_STANDSTILL_SECONDS = 60.0  # of the clock, for a case that waits
_ENDED_AT = 5  # times the processor time that a case may take, for one that never ends
_FEW_CASES = 100
_RESET_PEAK = "5"  # see proc(5), clear_refs


def cases(*, one_in: int = 1) -> settings:
    """The settings of a fuzz test; goes above `@given`.

    Args:
        one_in: How many times fewer cases than others the test tries, because each is slow.

    Example:
        ```python
        @cases(one_in=5)
        @given(st.binary())
        def test_files_are_read_or_refused(content): ...
        ```
    """
    chosen = os.environ.get("FUZZ_CASES", "").strip()
    number = int(chosen) if chosen else _FEW_CASES
    return settings(
        max_examples=max(1, number // one_in),
        deadline=None,  # processor time is what counts
        derandomize=not chosen,
        print_blob=bool(chosen),
        suppress_health_check=list(HealthCheck),
    )


class Fault(AssertionError):
    """A parser did what no parser may do with a case."""


class _Standstill(BaseException):
    """Raised inside of a case that does not end; nothing that it runs catches this."""


class Result(NamedTuple):
    """What became of a case.

    Attributes:
        value: What the parser returned; None if it refused.
        error: Its refusal; None if it took the case.
    """

    value: Any
    error: BaseException | None


@dataclass
class Tally:
    """What the cases of one test came to."""

    taken: int = 0
    refused: int = 0
    seconds: float = 0.0
    most_seconds: float = 0.0
    most_bytes: int = 0


tallies: dict[str, Tally] = {}
"""By the name of the test; `conftest.py` prints them."""


def taken(
    call: Callable[[], Any],
    *,
    refusals: tuple[type[BaseException], ...] = (SmpError,),
    most_seconds: float = MOST_SECONDS,
    most_bytes: int = MOST_BYTES,
) -> Result:
    """Runs one case within the bounds.

    A case that takes too long is run once more, since the first may have paid for imports, a
    collection of garbage, or pages that the machine had to find: what counts is the shorter time.

    Args:
        call: Gives the case to the parser. It must be possible to run it twice.
        refusals: The errors with which the parser may refuse the case.
        most_seconds: Processor time that it may take.
        most_bytes: Memory that it may hold.

    Returns:
        The value, or the error with which the case was refused.

    Raises:
        Fault: The parser raised another error, took too long, or took too much memory.

    Example:
        ```python
        result = taken(lambda: Config.resolve(given))
        if result.error is None:
            assert Config.resolve(result.value.to_dict()) == result.value
        ```
    """
    longest = _ENDED_AT * most_seconds
    result, seconds, size = _measured(call, refusals, longest)
    if seconds > most_seconds:
        gc.collect()
        result, again, size = _measured(call, refusals, longest)
        seconds = min(seconds, again)
    name = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    tally = tallies.setdefault(name, Tally())
    tally.taken += result.error is None
    tally.refused += result.error is not None
    tally.seconds += seconds
    tally.most_seconds = max(tally.most_seconds, seconds)
    tally.most_bytes = max(tally.most_bytes, size)
    if seconds > most_seconds:
        raise Fault(f"the case took {seconds:.1f} s of processor time, more than {most_seconds} s")
    if size > most_bytes:
        raise Fault(f"the case held {size >> 20} MiB of memory, more than {most_bytes >> 20} MiB")
    return result


def _measured(
    call: Callable[[], Any], refusals: tuple[type[BaseException], ...], longest: float
) -> tuple[Result, float, int]:
    before = _resident_bytes()
    earlier_peak = _reset_peak()
    started = time.process_time()
    try:
        with _ended_at_a_standstill(longest):
            result = _result(call, refusals)
    except _Standstill:
        raise Fault(
            f"the case did not end within {_STANDSTILL_SECONDS:g} s, or {longest:g} s of processor "
            "time"
        ) from None
    seconds = time.process_time() - started
    peak = _peak_bytes()
    return result, seconds, peak - before if peak > earlier_peak else 0


def _result(call: Callable[[], Any], refusals: tuple[type[BaseException], ...]) -> Result:
    try:
        return Result(call(), None)
    except refusals as error:
        text = str(error)
        if not text.strip():
            raise Fault(f"refused with {type(error).__name__}, but without a word") from error
        if len(text) > _MOST_MESSAGE:
            raise Fault(f"refused in {len(text)} characters: {text[:200]!r}...") from error
        return Result(None, error)
    except Exception as error:
        raise Fault(f"a raw error, {type(error).__name__}: {str(error)[:500]}") from error


@contextmanager
def _ended_at_a_standstill(longest: float) -> Iterator[None]:
    """Ends what takes far too long; other threads than the main one cannot be ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise _Standstill

    timers = (
        (signal.ITIMER_REAL, signal.SIGALRM, _STANDSTILL_SECONDS),
        (signal.ITIMER_PROF, signal.SIGPROF, longest),
    )
    handlers = [signal.signal(number, end) for _, number, _ in timers]
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, handlers, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------ memory


def _reset_peak() -> int:
    """Lets the peak start anew where Linux allows it; the peak that is not to be counted."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    return _peak_bytes()


def _peak_bytes() -> int:
    """Most memory that the process held, in bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _resident_bytes() -> int:
    """Memory that the process holds, in bytes."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return _peak_bytes()
    return pages * resource.getpagesize()
