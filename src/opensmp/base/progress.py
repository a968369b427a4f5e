"""What the package says while it works: lines of its log, and one status line on a terminal.

Lines go through the logger `opensmp`. Programs that configure logging get them there, by their own
levels. In other programs they are printed to stderr; `set_verbosity` and `OPENSMP_LOG` say which.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

VARIABLE = "OPENSMP_LOG"
"""The variable of the environment that says what `set_verbosity` says; not a configuration key."""

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}
DEFAULT = "info"

_logger = logging.getLogger("opensmp")


class _Stderr(logging.Handler):
    """Prints to whatever is stderr at that time, where the program has no handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if (
            _state.is_muted
            or _is_configured()
            or (record.levelno < logging.WARNING and _state.rank)
        ):
            return
        text = f"opensmp {record.levelname.lower()}: {self.format(record)}"
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            if _state.line is None:
                print(text, file=sys.stderr)
            else:
                console = _state.line.console
                console.print(text, markup=False, highlight=False, soft_wrap=True)


class _State:
    """What is set, and the status line that is shown."""

    def __init__(self) -> None:
        self.level: int | None = None  # as set explicitly
        self.rank = 0
        self.phases: list[str] = []
        self.line: Any = None
        self.task: Any = None
        self.is_muted = False


_state = _State()
_handler = _Stderr()


def set_verbosity(level: str) -> None:
    """Sets how much opensmp says: on stderr, or through the handlers of a program that has any.

    By default, and with `"info"`, it says what `smp.init` and the planner made, and on a terminal
    shows in one line what it is doing while a step is built. `"warning"` leaves warnings only, and
    no status line, `"error"` errors only, `"off"` nothing, and `"debug"` adds details. In several
    processes only rank 0 says more than warnings. The variable `OPENSMP_LOG` does the same.

    Programs that configure logging themselves, such as by `logging.basicConfig`, get the lines of
    the logger `"opensmp"` from their own handlers only.

    Args:
        level: `"debug"`, `"info"`, `"warning"`, `"error"` or `"off"`.

    Raises:
        ValueError: The level is another one.

    Example:
        ```python
        smp.set_verbosity("warning")
        ```
    """
    _state.level = _level_of(level, "smp.set_verbosity")
    _attach()
    _logger.setLevel(_state.level)


def _level_of(level: Any, where: str) -> int:
    known = LEVELS.get(level.strip().lower()) if isinstance(level, str) else None
    if known is None:
        raise ValueError(
            f"{where}: the level must be one of {', '.join(map(repr, LEVELS))}. "
            f"Received: {level!r}."
        )
    return known


def start(rank: int) -> None:
    """Follows `OPENSMP_LOG`, unless a level is set, and prints for this rank from now on."""
    _state.rank = rank
    text = os.environ.get(VARIABLE, "")
    if _state.level is None and text.strip():
        set_verbosity(_checked(text))
    _attach()


def _checked(text: str) -> str:
    """The variable's level; another text is told once, and means the default."""
    try:
        _level_of(text, VARIABLE)
    except ValueError as error:
        _attach()
        _logger.warning("%s It is ignored.", error)
        return DEFAULT
    return text


def _attach() -> None:
    if _handler not in _logger.handlers:
        _logger.addHandler(_handler)


def _is_configured() -> bool:
    """Whether the program has handlers of its own that get the lines of the logger."""
    own = any(handler is not _handler for handler in _logger.handlers)
    return own or (_logger.propagate and bool(logging.getLogger().handlers))


def say(text: str, *values: Any) -> None:
    """Logs a line of level INFO; without any set level or handlers, it is printed all the same."""
    if _state.rank or _state.is_muted:
        return
    if _state.level is not None or _logger.level or _is_configured():
        _logger.info(text, *values)
    else:
        _attach()
        record = _logger.makeRecord(
            _logger.name, logging.INFO, __file__, 0, text, values, exc_info=None
        )
        _handler.handle(record)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Context whose lines are not printed, because what they tell of is only tried."""
    before, _state.is_muted = _state.is_muted, True
    try:
        yield
    finally:
        _state.is_muted = before


# ------------------------------------------------------------------------------- status line


@contextlib.contextmanager
def phase(text: str) -> Iterator[None]:
    """Context of a phase of the work, which the status line of a terminal shows."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.phases.append(text)
    is_first = len(_state.phases) == 1
    try:
        if is_first:
            _open()
        _show()
        yield
    finally:
        _state.phases.pop()
        if is_first:
            _close()
        else:
            _show()


def show(text: str) -> None:
    """Replaces the text of the innermost phase."""
    if _state.line is not None and _state.phases:
        _state.phases[-1] = text
        _show()


class Clock:
    """Measures the seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __str__(self) -> str:
        seconds = time.monotonic() - self._began
        return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"


def _open() -> None:
    if not _has_terminal():
        return
    # Imported here: a program without a terminal does not need it.
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("opensmp: {task.description}"), TimeElapsedColumn())
    # What is printed meanwhile appears above the line; what goes to a file must go there.
    line = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=4,
        redirect_stdout=_is_terminal(sys.stdout),
    )
    try:
        line.start()
    except Exception:  # another live display of rich, such as one of the user's
        return
    _state.line, _state.task = line, line.add_task("", total=None)


def _show() -> None:
    if _state.line is not None:
        from rich.markup import escape

        _state.line.update(_state.task, description=escape(_state.phases[-1]))


def _close() -> None:
    line, _state.line = _state.line, None
    if line is None:
        return
    with contextlib.suppress(OSError, ValueError):
        # What was printed meanwhile without a line break waits in the line's own streams.
        sys.stdout.flush()
        sys.stderr.flush()
    line.stop()


def _has_terminal() -> bool:
    level = _state.level if _state.level is not None else LEVELS[DEFAULT]
    if level > logging.INFO or _state.rank or os.environ.get("TERM") in (None, "", "dumb"):
        return False
    if _is_configured():  # its lines would tear ours
        return False
    return _is_terminal(sys.stderr)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # None, or closed
        return False
