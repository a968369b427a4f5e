"""Guardian process: kills the remaining processes of a run if the launcher itself was killed.

It waits for the pipe from the launcher to close. The kernel kills the ranks together with the
launcher, but not the processes that ranks started, such as data-loading workers. The guardian finds
those by the token of the run in their environment, or by their session, which a rank leads.

`opensmp run` executes this file as a script; it must import only the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping

_NAME = "OPENSMP_RUN_TOKEN"
_PREFIX = "OPENSMP_RUN_"
_DISMISSED = "end"
_PAUSE_SECONDS = 0.05
_MOST_SECONDS = 10.0
_EMPTY_ROUNDS = 3


class Guardian:
    """The launcher's handle to the guardian process of one run."""

    def __init__(self, token: str | None, environ: Mapping[str, str]) -> None:
        # The guardian must outlive what ends an enclosing run or this process group: it gets its
        # own session and no token of an enclosing run.
        own = {name: value for name, value in environ.items() if not name.startswith(_PREFIX)}
        self._process = subprocess.Popen(
            [sys.executable, "-IS", os.path.basename(__file__)],
            cwd=os.path.dirname(os.path.abspath(__file__)),
            env=own,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if token:
            self._tell(f"token {token}")

    def watch(self, process: int) -> None:
        """Registers a rank, by the process id, which is also its session id."""
        self._tell(f"session {process}")

    def dismiss(self) -> None:
        """Ends the guardian process after the normal end of a run."""
        self._tell(_DISMISSED)
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(_MOST_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, line: str) -> None:
        # A guardian that was killed cannot be replaced.
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.write(f"{line}\n".encode())


def belonging(token: str | None, sessions: Collection[int]) -> list[int]:
    """Ids of the live processes of a run, found by its token or by the sessions of its ranks."""
    numbers = (int(name) for name in os.listdir("/proc") if name.isdecimal())
    return [number for number in numbers if _belongs(number, token, sessions)]


def _belongs(process: int, token: str | None, sessions: Collection[int]) -> bool:
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            state, _, _, session, *_ = file.read().rsplit(b")", 1)[1].split()
        if state in (b"Z", b"X") or process == os.getpid():
            return False
        if int(session) in sessions:
            return True
        with open(f"/proc/{process}/environ", "rb") as file:
            return token is not None and f"{_NAME}={token}".encode() in file.read().split(b"\0")
    except (OSError, ValueError, IndexError):
        return False  # it has ended, or belongs to another user


def _end(process: int, token: str | None, sessions: Collection[int]) -> None:
    """Kills a process; a pidfd makes sure that a reused process id is not hit."""
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(process)
        try:
            if _belongs(process, token, sessions):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def main() -> None:
    """Waits for the pipe to close; unless dismissed, kills the run's remaining processes."""
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    token: str | None = None
    sessions: set[int] = set()
    for line in sys.stdin:
        word, _, value = line.strip().partition(" ")
        if word == _DISMISSED:
            return
        if word == "token":
            token = value
        elif word == "session":
            sessions.add(int(value))
    end = time.monotonic() + _MOST_SECONDS
    empty = 0
    while empty < _EMPTY_ROUNDS and time.monotonic() < end:
        left = belonging(token, sessions)
        for process in left:
            _end(process, token, sessions)
        empty = 0 if left else empty + 1
        time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    main()
