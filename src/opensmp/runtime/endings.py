"""How the program of this process may end, and that the others hear of it.

By its end, by an exception, by `sys.exit` with an error, or by a signal. The hooks stand from
the moment the processes have met until the process ends.
"""

from __future__ import annotations

import atexit
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from opensmp.runtime.failures import Watch
from opensmp.runtime.waits import waits

_INTERRUPT_SECONDS = 2.0
_INTERRUPTED = 130

# What a rank sees when another one has failed.
_CONSEQUENCES = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
)

SignalHandler = Any


def install(watch: Watch) -> None:
    """Sets the hooks; those that were set before still run."""
    _exit_code.clear()
    _hook_exceptions(watch)
    _hook_exit()
    atexit.register(_end, watch)
    if threading.current_thread() is threading.main_thread():
        _hook_interrupt(watch)


def is_consequence(error: BaseException | None) -> bool:
    """Whether an exception may be due to the failure of another process.

    Example:
        ```python
        is_consequence(tf.errors.UnavailableError(None, None, "Socket closed"))  # True
        ```
    """
    while error is not None:
        if isinstance(error, _CONSEQUENCES):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---------------------------------------------------------------------- exceptions and exit


def _hook_exceptions(watch: Watch) -> None:
    previous = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        previous(kind, error, trace)
        code = _INTERRUPTED if issubclass(kind, KeyboardInterrupt) else 1
        text = f"{kind.__name__}: {error}"[:1000] if str(error) else kind.__name__
        watch.fail(text, consequence=is_consequence(error), code=code)

    sys.excepthook = hook


# The exit code given to `sys.exit`, and the moment it was given at: Python tells nobody.
_exit_code: list[tuple[int, int]] = []


def _hook_exit() -> None:
    previous = sys.exit
    if hasattr(previous, "_opensmp"):
        return

    def leave(status: Any = None, /) -> Any:
        code = 0 if status is None else status if isinstance(status, int) else 1
        _exit_code[:] = [(code, waits.report().moment)]
        previous(status)

    leave._opensmp = True  # type: ignore[attr-defined]
    sys.exit = leave


def _end(watch: Watch) -> None:
    code, moment = _exit_code[0] if _exit_code else (0, 0)
    try:
        # A program that has called the others since has caught that exit.
        if code and moment == waits.report().moment:
            watch.fail(f"its program ended with exit code {code}", code=code)
        watch.finish()
    except KeyboardInterrupt:
        watch.fail("it was interrupted", code=_INTERRUPTED)


# --------------------------------------------------------------------------------- signals


def keep_sigterm() -> Callable[[], None]:
    """Remembers what SIGTERM does; call the result after TensorFlow has taken it over.

    TensorFlow's coordination service installs a handler that swallows the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    handler: SignalHandler = signal.getsignal(signal.SIGTERM)

    def restore() -> None:
        # A handler that was not set from Python cannot be set again: end, as by default.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)

    return restore


def _hook_interrupt(watch: Watch) -> None:
    """Makes Ctrl-C end a process that is inside a blocked operation.

    Python runs its handlers between two instructions, and a blocked operation is one.
    """
    previous: SignalHandler = signal.getsignal(signal.SIGINT)
    if not callable(previous):
        return
    handled = threading.Event()

    def handler(number: int, frame: types.FrameType | None) -> None:
        handled.set()
        previous(number, frame)

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    other = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    if other != -1:  # an event loop has it, and will not be inside a blocked operation
        signal.set_wakeup_fd(other)
        return
    signal.signal(signal.SIGINT, handler)

    def wait() -> None:
        with writer:  # must not be collected
            while True:
                number = reader.recv(1)
                if number and number[0] == signal.SIGINT:
                    if not handled.wait(_INTERRUPT_SECONDS):
                        watch.fail("it was interrupted", code=_INTERRUPTED)
                    handled.clear()

    threading.Thread(target=wait, name="opensmp-interrupt", daemon=True).start()
