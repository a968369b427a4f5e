"""Peak memory of devices and of this process."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import tensorflow as tf

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Resident memory of this process now; its peak where the system tells no more."""
    return _of_status("VmRSS")


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far."""
    return _of_status("VmHWM")


def peak_allocated_bytes(device: str) -> int | None:
    """Most that TensorFlow's allocator of a device held at once; None if it does not count.

    Args:
        device: A logical device, such as `"/device:GPU:0"`. The allocator of CPUs does not count.
    """
    name = device.rsplit("device:", 1)[-1]
    if name.startswith("CPU"):
        return None
    try:
        return int(tf.config.experimental.get_memory_info(name)["peak"])
    except (ValueError, KeyError, tf.errors.OpError):
        return None


def _of_status(key: str) -> int:
    """A line of this process' status, in bytes."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
