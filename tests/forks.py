"""Ranks of tests without the seconds that each takes to import TensorFlow and Keras.

Each process of the tests has a few servers (`fork_server`), each of which has imported them once
and forks ranks. Rank 0 of all runs comes from the first one, rank 1 from the second one, and so on:
so the ranks of a run have different hash seeds and addresses, as processes that were started have,
and an order that depends on those still differs between them.

A rank is forked only if its environment is that of the servers, but for variables that nothing
reads before the script runs. Others are started as processes.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SERVERS = 4
"""Servers of a process: as many ranks of a run are forked, the others are started."""

_SCRIPT = Path(__file__).with_name("fork_server.py")
# TensorFlow reads the numbers of its threads as it starts its runtime.
_READ_LATE = ("OPENSMP_", "PYTEST_", "TF_NUM_INTEROP_THREADS", "TF_NUM_INTRAOP_THREADS")
_START_SECONDS = 400.0
_PR_SET_CHILD_SUBREAPER = 36


class Forked:
    """A process that a server has forked: what `subprocess.Popen` has of one that was started.

    Args:
        pid: Number of the process, which is a child of this one.
        args: Its command.
    """

    def __init__(self, pid: int, args: Sequence[str]) -> None:
        self.pid, self.args = pid, list(args)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or minus the number of the signal; None while the process runs."""
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Waits for the end of the process.

        Raises:
            subprocess.TimeoutExpired: If it has not ended after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return code


def prepare(environ: Mapping[str, str], environs: Sequence[Mapping[str, str]]) -> None:
    """Starts the servers that ranks need, all at once, and waits until they are there.

    Args:
        environ: What ranks of tests have in common; the first servers make it their own.
        environs: Environment of each of the ranks.
    """
    settled = _settled(environ)
    if sys.platform != "linux" or (_servers and _servers[0].settled != settled):
        return
    alike = [each for each in environs[:SERVERS] if _settled(each) == settled]
    while len(_servers) < len(alike):
        _servers.append(_Server(settled))
    for server in _servers:
        server.await_start()


def start_rank(
    rank: int, command: Sequence[str], environ: Mapping[str, str], folder: str, output: IO[bytes]
) -> Forked | None:
    """Forks a rank that runs a script in a session of its own.

    Args:
        rank: Number of the rank, which chooses the server.
        command: The script and its arguments.
        environ: Its whole environment.
        folder: Its current directory.
        output: Where its output and its errors go.

    Returns:
        The process; None if no server has been prepared for it.
    """
    if rank >= len(_servers) or _servers[rank].settled != _settled(environ):
        return None
    return _servers[rank].fork(command, environ, folder, output)


class _Server:
    """One server, which ends with this process."""

    def __init__(self, settled: tuple[tuple[str, str], ...]) -> None:
        self.settled = settled
        self._asks, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._has_started = False
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(_SCRIPT), str(theirs.fileno())],
                env=dict(settled),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the tests
            )
        atexit.register(self._end)
        self._asks.settimeout(_START_SECONDS)

    def await_start(self) -> None:
        """Waits until the server can fork."""
        if not self._has_started and self._asks.recv(16) != b"ready":
            raise RuntimeError(f"{_SCRIPT.name} has not started: {self._told()}")
        self._has_started = True

    def fork(
        self, command: Sequence[str], environ: Mapping[str, str], folder: str, output: IO[bytes]
    ) -> Forked:
        request: dict[str, Any] = {
            "command": list(command),
            "environ": dict(environ),
            "folder": folder,
            "parent": os.getpid(),
        }
        with _adopting():
            socket.send_fds(self._asks, [json.dumps(request).encode()], [output.fileno()])
            number = int(self._asks.recv(20) or 0)
        if not number:
            raise RuntimeError(f"{_SCRIPT.name} has not forked {command[0]}: {self._told()}")
        return Forked(number, command)

    def _told(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def _end(self) -> None:
        self._asks.close()
        self._errors.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_servers: list[_Server] = []


def _settled(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The variables that Python, the C library or an import may have read."""
    return tuple(sorted(item for item in environ.items() if not item[0].startswith(_READ_LATE)))


@contextmanager
def _adopting() -> Iterator[None]:
    """The kernel gives this process the ranks whose parents end meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)
