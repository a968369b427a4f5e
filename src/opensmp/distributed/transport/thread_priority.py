"""Lets a thread that mostly sleeps run promptly when it wakes (Linux)."""

from __future__ import annotations

import ctypes
import os
import platform

_SLICE_NANOSECONDS = 100_000
_PR_SET_TIMERSLACK = 29
_SLACK_NANOSECONDS = 1_000
_SYSCALLS = {"x86_64": 314, "aarch64": 274}  # sched_setattr, which the C library lacks


class _Attributes(ctypes.Structure):
    """`struct sched_attr` of Linux, in its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def wake_promptly() -> bool:
    """Asks Linux for short time slices for the calling thread; returns whether it accepts.

    On a core that computes, a thread that wakes would otherwise wait until the slice of the
    computing thread ends, up to 4 ms, longer than its work takes. A thread with a shorter slice
    takes precedence (Linux 6.12 or newer; older versions ignore it).
    """
    number = _SYSCALLS.get(platform.machine())
    if number is None or platform.system() != "Linux":
        return False
    attributes = _Attributes(
        size=ctypes.sizeof(_Attributes),
        nice=os.getpriority(os.PRIO_PROCESS, 0),
        runtime=_SLICE_NANOSECONDS,
    )
    call = ctypes.CDLL(None, use_errno=True).syscall
    return bool(call(number, 0, ctypes.byref(attributes), 0) == 0)


def sleep_precisely() -> None:
    """Asks Linux to end short sleeps of the calling thread on time.

    By default Linux may extend them by 50 us, to wake several threads at once.
    """
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _SLACK_NANOSECONDS, 0, 0, 0)
