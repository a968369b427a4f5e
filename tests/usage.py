"""What a process uses: memory, threads, open files.

The memory that is in use is what the C library's allocator has given out and not got back. It is
exact, where the resident memory also has what the allocator keeps for later.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """What this process uses.

    Attributes:
        resident_bytes: Memory of the process that is in the machine's.
        allocated_bytes: Memory that is in use.
        threads: Their number.
        descriptors: Number of open files, sockets and the like.
    """

    resident_bytes: int
    allocated_bytes: int
    threads: int
    descriptors: int


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


_libc = ctypes.CDLL("libc.so.6")
_libc.mallinfo2.restype = _Mallinfo


def usage() -> Usage:
    """What this process uses now."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    heap = _libc.mallinfo2()
    return Usage(
        resident_bytes=int(status["VmRSS"].split()[0]) * 1024,
        allocated_bytes=heap.uordblks + heap.hblkhd,
        threads=int(status["Threads"]),
        descriptors=len(os.listdir("/proc/self/fd")),
    )
