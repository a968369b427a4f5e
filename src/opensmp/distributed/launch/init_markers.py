"""Marker files by which ranks tell the launcher that they called `smp.init`, with their layout.

The launcher sees processes end, but not how far they came: a rank that never called `smp.init`
needs other handling than one that failed in training.
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
    """The settings that determine which numbers of processes are possible."""

    partitions: int
    processes_per_replica: int | None


def mark(environ: Mapping[str, str], rank: int, layout: Layout) -> None:
    """Writes the marker of a rank; does nothing unless the launcher asks for markers."""
    directory = environ.get(_VARIABLE)
    if directory:
        with contextlib.suppress(OSError):  # the marker is optional
            Path(directory, str(rank)).write_text(json.dumps(layout))


def read_marks(directory: str) -> dict[int, Layout]:
    """The ranks that have called `smp.init`, with their layouts."""
    found = {}
    for path in Path(directory).iterdir():
        with contextlib.suppress(ValueError, TypeError, OSError):
            found[int(path.name)] = Layout(*json.loads(path.read_text()))
    return found


def clear_marks(directory: str) -> None:
    """Deletes the markers of the previous run."""
    for path in Path(directory).iterdir():
        os.unlink(path)
