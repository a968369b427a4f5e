"""Memory shared by all processes of a run on one machine, in regions that are found by key.

Processes trace functions at different times and a different number of times, so that they cannot
meet to lay out memory. Instead, the first process that needs a region adds it, under a lock of the
file, to a table that all of them read. A region lasts as long as the processes, and keeps its
meaning, as the keys of collectives do.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import platform
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Array = np.ndarray[Any, Any]
Gather = Callable[[Any], list[Any]]

MOST_BYTES = 2 << 30
"""Maximum size of all regions; at most an eighth of the machine's memory."""

NUM_REGIONS = 4096

_PAGE = mmap.ALLOCATIONGRANULARITY
_NONCE_BYTES = 16
_STATE = 64  # offset of the number of regions, the end of the last one, and the bound
_TABLE = 4096
_COLUMNS = 4  # key (2), offset, bytes
_ROWS_PER_REGION = 2
_CAN_SHARE = (
    hasattr(os, "memfd_create") and fcntl is not None and platform.machine() in ("x86_64", "AMD64")
)


class Region(NamedTuple):
    """A region: its number, its first byte, and its size in bytes."""

    number: int
    offset: int
    num_bytes: int


class Arena:
    """The memory, as one process sees it.

    Args:
        descriptor: Its open file, which stays open.
        width: Number of processes that share it.

    Attributes:
        counters: Two rows of counters for each region, with a column for each process, which is
            the only one to write it; shape `[2 * NUM_REGIONS, width]`, int64.
    """

    def __init__(self, descriptor: int, width: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._known: dict[bytes, Region | None] = {}
        self._head = mmap.mmap(descriptor, _head_bytes(width))
        self._state = np.frombuffer(self._head, np.int64, 3, _STATE)
        table = np.frombuffer(self._head, np.int64, NUM_REGIONS * _COLUMNS, _TABLE)
        self._table = table.reshape(NUM_REGIONS, _COLUMNS)
        count = _ROWS_PER_REGION * NUM_REGIONS * width
        self.counters = np.frombuffer(self._head, np.int64, count, _TABLE + table.nbytes)

    @classmethod
    def make(cls, width: int) -> Arena:
        """Creates the memory."""
        descriptor = os.memfd_create("opensmp")
        os.ftruncate(descriptor, _head_bytes(width))
        made = cls(descriptor, width)
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        made._state[:] = 0, _head_bytes(width), min(MOST_BYTES, machine // 8)
        made._head[:_NONCE_BYTES] = secrets.token_bytes(_NONCE_BYTES)
        return made

    @property
    def offer(self) -> tuple[int, int, bytes]:
        """What another process needs to open the memory."""
        return os.getpid(), self._descriptor, self._head[:_NONCE_BYTES]

    @classmethod
    def opened(cls, offer: tuple[int, int, bytes], width: int) -> Arena | None:
        """Opens the memory of another process; None if it cannot be accessed."""
        process_id, descriptor, nonce = offer
        try:
            own = os.open(f"/proc/{process_id}/fd/{descriptor}", os.O_RDWR)
        except OSError:
            return None
        if os.fstat(own).st_size >= _head_bytes(width):
            made = cls(own, width)
            if made._head[:_NONCE_BYTES] == nonce:
                return made
        os.close(own)
        return None

    def region(self, key: str, num_bytes: int) -> Region | None:
        """The region of a key, with so many bytes; None if there is no room, for all processes."""
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        with self._lock:
            if digest not in self._known:
                with self._locked():
                    self._known[digest] = self._found(digest, num_bytes)
            return self._known[digest]

    def _found(self, digest: bytes, num_bytes: int) -> Region | None:
        name = np.frombuffer(digest, np.int64)
        count, end, most = map(int, self._state)
        (places,) = np.nonzero((self._table[:count, :2] == name).all(axis=1))
        if len(places):
            number = int(places[0])
            offset, size = map(int, self._table[number, 2:])
            assert size == num_bytes, "a key with two meanings"
            return Region(number, offset, size) if offset else None
        if count == NUM_REGIONS:
            return None
        following = -(-(end + num_bytes) // _PAGE) * _PAGE
        fits = following <= most
        self._table[count] = *name, end if fits else 0, num_bytes
        if fits:
            os.ftruncate(self._descriptor, following)
            self._state[1] = following
        self._state[0] = count + 1
        return Region(count, end, num_bytes) if fits else None

    def view(self, region: Region) -> Array:
        """The bytes of a region, uint8."""
        mapped = mmap.mmap(self._descriptor, region.num_bytes, offset=region.offset)
        return np.frombuffer(mapped, np.uint8)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # The lock of a process that ends is released.
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


def _head_bytes(width: int) -> int:
    counters = _ROWS_PER_REGION * NUM_REGIONS * width
    size = _TABLE + 8 * (NUM_REGIONS * _COLUMNS + counters)
    return -(-size // _PAGE) * _PAGE


def share(rank: int, here: Sequence[int], gather: Gather) -> tuple[Arena | None, tuple[int, ...]]:
    """Creates or opens the memory of this machine's ranks `here`, and gives those that see it.

    All ranks of the run call it, also those on other machines, with a `gather` of all. It belongs
    to no named file, so that nothing is left behind however the processes end.
    """
    arena = offer = None
    if _CAN_SHARE and len(here) > 1 and rank == here[0]:
        arena = Arena.make(len(here))
        offer = arena.offer
    offers = gather(offer)
    offered = offers[here[0]]
    if arena is None and offered is not None and _CAN_SHARE and len(here) > 1:
        arena = Arena.opened(offered, len(here))
    sees = gather(arena is not None)
    return arena, tuple(member for member in here if sees[member])
