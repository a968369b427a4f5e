"""Limits of time that hold on machines with much else to do."""

from __future__ import annotations

import os
from pathlib import Path


def patient(seconds: float) -> float:
    """How long what takes at most `seconds` on a free machine may take on this one, now.

    In proportion to how many there are for each core that want to run: with 70 on two cores, all
    take 35 times as long.
    """
    words = Path("/proc/loadavg").read_text().split() if os.path.exists("/proc/loadavg") else []
    running = int(words[3].partition("/")[0]) if words else 0
    return seconds * max(1.0, max(os.getloadavg()[0], running) / (os.cpu_count() or 1))
