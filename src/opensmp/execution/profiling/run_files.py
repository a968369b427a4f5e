"""The files of a run report: what each rank has measured, one JSON object a line.

A rank only appends to its own file, so that a run that is killed leaves all lines but perhaps a
part of the last one. Kinds of lines:

- `run`: the first line; configuration, world and environment.
- `steps`: some steps in a row: their number, seconds, examples, and the values of the last.
- `epoch`: the values at the end of an epoch.
- `timeline`: when each action of one step ran, in seconds since the epoch.
- `memory`: peaks of the partitions of this rank.
- `end`: training has ended here, or with an error; more lines may follow.
"""

from __future__ import annotations

import datetime
import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = "opensmp run"
VERSION = 1

RANK_FILE = re.compile(r"(\d{8}-\d{6}-[0-9a-f]{4})\.rank(\d{1,6})\.jsonl", re.ASCII)
"""Name of a rank's file: the run and the rank."""


def new_run() -> str:
    """Returns the name of a run that starts now; names sort by time."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def rank_file(folder: Path, run: str, rank: int) -> Path:
    """Path of the file of a rank."""
    return folder / f"{run}.rank{rank}.jsonl"


def plan_file(folder: Path, run: str, number: int) -> Path:
    """Path of the plan of the model with this number, from 0."""
    return folder / f"{run}.plan{number}.json"


class RunFile:
    """The file of one rank, to which lines are appended."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, kind: str, values: Mapping[str, Any]) -> None:
        """Appends one line in one write, so that a reader sees whole lines."""
        text = json.dumps({"kind": kind, **values}, separators=(",", ":"), ensure_ascii=False)
        data = (text + "\n").encode("utf-8", "backslashreplace")
        with self._path.open("ab", buffering=0) as file:
            while data:
                data = data[file.write(data) :]
