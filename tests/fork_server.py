"""A process that has imported TensorFlow and Keras and does nothing but fork: `forks` talks to it.

What it forks becomes a rank of a test, as `python script.py` would be: a process with arguments,
environment, folder, output and session of its own, and a child of the process that asked, which
can wait for it. It has nothing of opensmp and nothing of TensorFlow's runtime, which begins after
the fork.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.machinery
import io
import json
import os
import random
import socket
import sys
import threading
import time
import warnings
from types import CodeType, ModuleType
from typing import Any

MOST_BYTES = 1 << 17  # of a message
LONGEST_SECONDS = 120.0  # until the kernel has given a rank its parent


def check_unstarted() -> None:
    """Fails if forked processes would share what each process has to start itself."""
    from tensorflow.python.eager import context

    made = context._context  # made by the first question about devices
    if made is not None and made._context_handle is not None:
        raise RuntimeError("TensorFlow's runtime has started: its threads are lost in a fork.")
    ours = [name for name in sys.modules if name.partition(".")[0] in ("opensmp", "smp", "horovod")]
    if ours:
        raise RuntimeError(f"{ours} are imported: a rank has to import them itself.")
    if threading.active_count() > 1:
        raise RuntimeError("A thread of Python's runs: it is lost in a fork.")


def next_rank(asks: socket.socket) -> dict[str, Any] | None:
    """Forks a rank for each message: in the rank, what was asked for; at the end, None."""
    while True:
        message, files, _, _ = socket.recv_fds(asks, MOST_BYTES, 1)
        if not message:
            return None
        (output,) = files
        request = json.loads(message)
        reader, writer = os.pipe()
        if _fork() == 0:
            _between(asks, output, reader, writer)
            # only the rank returns
            asks.close()
            os.close(reader)
            os.close(writer)
            return request | {"output": output}
        os.close(output)
        os.close(writer)
        number = os.read(reader, 20)
        os.close(reader)
        os.wait()  # for the process in between: now the rank is a child of who asked
        asks.send(number or b"0")


def _between(asks: socket.socket, output: int, reader: int, writer: int) -> None:
    """Forks the rank and ends, so that the kernel gives the rank another parent."""
    number = _fork()
    if number:
        os.write(writer, str(number).encode())
        os._exit(0)


def _fork() -> int:
    with warnings.catch_warnings():
        # OpenBLAS has threads, which it ends before a fork and starts again when it needs them.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def become(request: dict[str, Any]) -> CodeType:
    """Makes this process the one that was asked for; returns the code of its script."""
    end = time.monotonic() + LONGEST_SECONDS
    while os.getppid() != request["parent"]:
        if time.monotonic() > end:
            os._exit(70)
        time.sleep(0.001)
    os.setsid()
    for stream in (1, 2):
        os.dup2(request["output"], stream)
    os.close(request["output"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environ"])
    script, *arguments = request["command"]
    sys.argv[:] = [script, *arguments]
    sys.orig_argv[:] = [sys.executable, script, *arguments]
    sys.path[0] = os.path.dirname(os.path.realpath(script))
    _draw_anew()
    importlib.invalidate_caches()
    with io.open_code(script) as file:
        code = compile(file.read(), script, "exec", dont_inherit=True)
    main = ModuleType("__main__")
    main.__file__ = script
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", script)
    vars(main)["__builtins__"] = builtins
    sys.modules["__main__"] = main
    return code


def _draw_anew() -> None:
    """Random numbers that nobody has seeded are other ones in each process."""
    import numpy as np

    random.seed()
    np.random.seed()


def serve() -> dict[str, Any] | None:
    """Imports what takes long, says so, and forks."""
    asks = socket.socket(fileno=int(sys.argv[1]))
    import keras  # noqa: F401
    import tensorflow as tf  # noqa: F401

    check_unstarted()
    asks.send(b"ready")
    with contextlib.suppress(KeyboardInterrupt):
        return next_rank(asks)
    return None


if __name__ == "__main__":
    _request = serve()
    if _request is not None:
        _code = become(_request)
        exec(_code, vars(sys.modules["__main__"]))
