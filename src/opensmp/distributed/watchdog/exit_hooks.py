"""Hooks that tell the other processes how this program ends.

It may end regularly, by an exception, by `sys.exit` with an error, or by a signal. The hooks are
installed from the rendezvous until the process ends.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from opensmp.distributed.watchdog import preemption, recovery
from opensmp.distributed.watchdog.call_log import waits
from opensmp.distributed.watchdog.monitor import Watch
from opensmp.distributed.watchdog.rank_error import is_from_elsewhere

_INTERRUPT_SECONDS = 2.0
_INTERRUPTED = 130

# Errors that a failure of another rank may cause.
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
    """Installs the hooks; hooks that were set before still run."""
    _exit_code.clear()
    _noted.clear()
    _hook_exceptions(watch)
    _hook_exit()
    atexit.register(_end, watch, os.getpid())
    if threading.current_thread() is threading.main_thread():
        _hook_interrupt(watch)


def is_consequence(error: BaseException | None) -> bool:
    """Whether an exception may be due to the failure of another process."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # `raise error from error` makes a cycle
        if isinstance(error, _CONSEQUENCES) or is_from_elsewhere(error):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


# ---------------------------------------------------------------------- exceptions and exit


def _hook_exceptions(watch: Watch) -> None:
    previous, process = sys.excepthook, os.getpid()

    def hook(
        kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        previous(kind, error, trace)
        if os.getpid() == process:  # not in a forked child
            _fail_by(watch, error)

    sys.excepthook = hook


def _fail_by(watch: Watch, error: BaseException) -> None:
    kind = type(error)
    code = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    text = f"{kind.__name__}: {error}"[:1000] if str(error) else kind.__name__
    watch.fail(text, consequence=is_consequence(error), code=code)


# The exit code passed to `sys.exit`, and the call log's moment then; Python does not keep it.
_exit_code: list[tuple[int, int]] = []
# The actual exit code of the program, recorded if `opensmp run` started it.
_noted: list[int] = []


def note_exit(status: Any) -> None:
    """Records how the program has ended; called by the code that runs it."""
    _noted[:] = [_code(status)]


def _code(status: Any) -> int:
    return 0 if status is None else status if isinstance(status, int) else 1


def _hook_exit() -> None:
    previous = sys.exit
    if hasattr(previous, "_opensmp"):
        return

    def leave(status: Any = None, /) -> Any:
        if threading.current_thread() is threading.main_thread():  # else ends that thread only
            _exit_code[:] = [(_code(status), waits.report().moment)]
        previous(status)

    leave._opensmp = True  # type: ignore[attr-defined]
    sys.exit = leave


def _end(watch: Watch, process: int) -> None:
    # An exception that ended the program, if another hook has replaced the one above. Python also
    # sets `last_value` for errors that were only printed, as at a prompt.
    is_known = _noted or hasattr(sys, "ps1")
    error = None if is_known else getattr(sys, "last_value", None)
    code = _last_exit()
    if os.getpid() != process:
        # In a forked child, TensorFlow's teardown would wait for the parent's threads.
        _leave_at_once(1 if error is not None else code)
    try:
        if error is not None:
            _fail_by(watch, error)
        if code and not preemption.is_over():  # else all processes end on request
            watch.fail(f"its program ended with exit code {code}", code=code)
        watch.finish()
        if recovery.has_interrupted():
            _leave_at_once(code)
    except KeyboardInterrupt:
        watch.fail("it was interrupted", code=_INTERRUPTED)


def _leave_at_once(code: int) -> None:
    """Ends the process without TensorFlow's teardown.

    The teardown sometimes hangs after operations were interrupted (seen with datasets of
    generators).
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _last_exit() -> int:
    """The exit code of the program, as far as known."""
    if _noted:
        return _noted[0]
    code, moment = _exit_code[0] if _exit_code else (0, 0)
    # Calls logged since then mean that the program has caught that exit.
    return code if moment == waits.report().moment else 0


# --------------------------------------------------------------------------------- signals


def keep_sigterm() -> Callable[[], None]:
    """Saves the handler of SIGTERM; the result restores it after TensorFlow has replaced it.

    TensorFlow's coordination service installs a handler that ignores the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    handler: SignalHandler = signal.getsignal(signal.SIGTERM)

    def restore() -> None:
        # A handler that was not set from Python cannot be restored: use the default, which ends.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)

    return restore


def _hook_interrupt(watch: Watch) -> None:
    """Makes Ctrl-C end a process that is inside a blocked operation.

    Python runs signal handlers between bytecode instructions, so not while an operation blocks.
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
    if other != -1:  # an event loop uses it, and does not block
        signal.set_wakeup_fd(other)
        return
    signal.signal(signal.SIGINT, handler)
    # A forked child shares the socket, but has its own signals.
    os.register_at_fork(after_in_child=_forget_wakeup)

    def wait() -> None:
        with writer:  # keeps it alive
            while True:
                number = reader.recv(1)
                if number and number[0] == signal.SIGINT:
                    if signal.getsignal(signal.SIGINT) is not handler:
                        continue  # the program has replaced the handler
                    if not handled.wait(_INTERRUPT_SECONDS):
                        watch.fail("it was interrupted", code=_INTERRUPTED)
                    handled.clear()

    threading.Thread(target=wait, name="opensmp-interrupt", daemon=True).start()


def _forget_wakeup() -> None:
    with contextlib.suppress(ValueError):  # forked on another thread
        signal.set_wakeup_fd(-1)
