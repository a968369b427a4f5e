"""Notes of the ranks for the launcher: that they have called `smp.init`, and for which layout.

The launcher sees processes end, but not how far they came: a rank that never came to `smp.init`
is lost in another way than one that failed in training.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from opensmp.config import LAUNCHER_PREFIX

_VARIABLE = f"{LAUNCHER_PREFIX}MARKS"


class Layout(NamedTuple):
    """What says which numbers of processes are possible.

    Attributes:
        partitions: Number of partitions.
        processes_per_replica: The key of the configuration.
    """

    partitions: int
    processes_per_replica: int | None


def mark(environ: Mapping[str, str], rank: int, layout: Layout) -> None:
    """Notes that a rank has called `smp.init`; does nothing without a launcher that asks.

    Args:
        environ: The environment.
        rank: The rank.
        layout: The layout of its configuration.
    """
    directory = environ.get(_VARIABLE)
    if directory:
        with contextlib.suppress(OSError):  # it is for the launcher only
            Path(directory, str(rank)).write_text(json.dumps(layout))


def read_marks(directory: str) -> dict[int, Layout]:
    """The ranks that have called `smp.init`."""
    found = {}
    for path in Path(directory).iterdir():
        with contextlib.suppress(ValueError, TypeError, OSError):
            found[int(path.name)] = Layout(*json.loads(path.read_text()))
    return found


def clear_marks(directory: str) -> None:
    """Forgets those of the run before."""
    for path in Path(directory).iterdir():
        os.unlink(path)
