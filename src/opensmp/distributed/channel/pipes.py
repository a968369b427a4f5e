"""Short records between all processes of one machine, by pipes.

Each process reads one pipe, which the others open for writing by its name in /proc. To wait for a
record takes no processor time, and one system call when it has arrived; a collective of TensorFlow
takes a hundred times as much. It opens no port, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from opensmp.errors import CommunicationError

DIGEST_BYTES = 16

_RECORD = struct.Struct(f"<IQ{DIGEST_BYTES}s")  # shorter than what a pipe takes as a whole
_POLL_MILLISECONDS = 1000  # after which signals and interrupts are looked for


class Offer(NamedTuple):
    """Where the pipe of a process is.

    Attributes:
        process: Its process id.
        descriptor: Descriptor of the pipe there.
        inode: Number of the pipe, by which another process sees that it has opened the right one.
    """

    process: int
    descriptor: int
    inode: int


class Pipes:
    """The pipe of this process and those of the others.

    Args:
        rank: Number of this process.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._own, self._end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._others: list[int] = []
        self._arrived: list[deque[tuple[int, bytes]]] = []
        self._rest = b""
        self._number = 0

    @property
    def offer(self) -> Offer:
        """What the others must know."""
        return Offer(os.getpid(), self._own, os.fstat(self._own).st_ino)

    def open(self, offers: Sequence[Offer]) -> bool:
        """Opens the pipes of all processes, by rank; False if one of them cannot be opened."""
        self._arrived = [deque() for _ in offers]
        for rank, offer in enumerate(offers):
            if rank == self._rank:
                continue
            try:
                path = f"/proc/{offer.process}/fd/{offer.descriptor}"
                opened = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                return False
            self._others.append(opened)
            if os.fstat(opened).st_ino != offer.inode:
                return False
        return True

    def exchange(self, digest: bytes, is_interrupted: Callable[[], bool]) -> list[bytes]:
        """Sends a digest of `DIGEST_BYTES` to all, and returns those of all, by rank."""
        self._number += 1
        record = _RECORD.pack(self._rank, self._number, digest)
        for descriptor in self._others:
            with contextlib.suppress(BrokenPipeError):  # it has ended, which the watch notices
                os.write(descriptor, record)
        self._arrived[self._rank].append((self._number, digest))
        poll = select.poll()
        poll.register(self._own, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not all(self._arrived):
            if is_interrupted():
                raise CommunicationError("Another rank has failed.")
            poll.poll(_POLL_MILLISECONDS)
            self._read()
        taken = [arrived.popleft() for arrived in self._arrived]
        if {number for number, _ in taken} != {self._number}:
            raise CommunicationError(
                f"The ranks have met {sorted({number for number, _ in taken})} times. Expected: "
                "the same number in all. This is a fault of opensmp."
            )
        return [each for _, each in taken]

    def wake(self) -> None:
        """Lets `exchange` look at once whether it is interrupted; from another thread."""
        with contextlib.suppress(OSError):
            os.write(self._waker, b"\0")

    def close(self) -> None:
        """Closes all pipes."""
        for descriptor in (self._own, self._end, self._wake, self._waker, *self._others):
            os.close(descriptor)
        self._others.clear()

    def _read(self) -> None:
        try:
            data = self._rest + os.read(self._own, 1 << 16)
        except BlockingIOError:
            return
        whole = len(data) - len(data) % _RECORD.size
        for rank, number, digest in _RECORD.iter_unpack(data[:whole]):
            self._arrived[rank].append((number, digest))
        self._rest = data[whole:]
