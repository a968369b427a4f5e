"""What `opensmp tune` and the script that it measures tell each other; needs no TensorFlow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from opensmp.base.message_text import shown
from opensmp.base.strict_json import JsonFault, parse_json
from opensmp.config import TRIAL_VARIABLE
from opensmp.config.keys import KEYS
from opensmp.errors import LaunchError

TUNED = ("microbatches", "pipeline", "pieces_per_partition", "transport")
"""The keys that are tried."""

_SHORT = {"pieces_per_partition": "pieces"}

WARM_STEPS = 2
"""Steps before those that count: the first one is traced, and the second allocates memory."""


class Candidate(NamedTuple):
    """Settings to measure.

    Attributes:
        changes: Keys of the configuration, with values that replace those of the script.
        predicted_seconds: Time of a step by the cost model; None if that does not know the model.
    """

    changes: dict[str, Any]
    predicted_seconds: float | None = None


class Trial(NamedTuple):
    """What a script is to do when it trains.

    Attributes:
        result: Path of the file in which rank 0 writes a `Measured`.
        steps: Training steps to measure.
        changes: Keys of the configuration, with values that replace all others.
        candidates: How many further candidates to propose.
    """

    result: str
    steps: int
    changes: Mapping[str, Any]
    candidates: int = 0

    def to_text(self) -> str:
        """The trial as a value of `OPENSMP_TRIAL`."""
        return json.dumps(self._asdict())


class Measured(NamedTuple):
    """What a script has measured.

    Attributes:
        seconds: Median time of a training step, in the slowest rank.
        config: All keys of the configuration.
        given: Keys that the script, the command line or the environment named.
        size: Number of processes.
        rows: Rows of a step's batch in one replica; None if unknown.
        candidates: What to measure next, the best by prediction first.
        note: Why the cost model could not rank them; empty if it could.
    """

    seconds: float
    config: dict[str, Any]
    given: list[str]
    size: int = 1
    rows: int | None = None
    candidates: list[Candidate] = []  # noqa: RUF012 - never changed
    note: str = ""

    def write(self, path: str) -> None:
        """Writes the file, whole or not at all."""
        values = {**self._asdict(), "candidates": [each._asdict() for each in self.candidates]}
        _write(Path(path), json.dumps(values, default=lambda value: None))  # such as a function

    @classmethod
    def read(cls, path: str) -> Measured | None:
        """Reads the file; None if the script has written none."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        candidates = [Candidate(**each) for each in values.pop("candidates")]
        return cls(**values, candidates=candidates)


class Outcome(NamedTuple):
    """What came of a candidate: what was measured, or why nothing was.

    Attributes:
        candidate: The settings.
        measured: What the script has measured.
        error: Why there is nothing.
        tail: The last lines of the script's output, if it failed.
    """

    candidate: Candidate
    measured: Measured | None = None
    error: str = ""
    tail: str = ""

    @property
    def seconds(self) -> float:
        """Time of a step; infinite if it was not measured."""
        return float("inf") if self.measured is None else self.measured.seconds

    @property
    def told(self) -> str:
        """The outcome in a few words."""
        if self.measured is None:
            return self.error
        return f"{1e3 * self.measured.seconds:.3g} ms a step"

    @property
    def changes(self) -> str:
        """The settings that differ from those of the script."""
        items = self.candidate.changes.items()
        return ", ".join(f"{_SHORT.get(key, key)}={value}" for key, value in items)


def save_settings(found: Mapping[str, Any], path: Path) -> None:
    """Writes settings to a file for `smp.init`, whole or not at all."""
    _write(path, json.dumps(found, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    part = Path(f"{path}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def settings(best: Measured) -> dict[str, Any]:
    """The keys that the program named, or that were tried, for `smp.init`."""
    tuned = [key for key in TUNED if key != "transport" or best.size > 1]
    keys = [key for key in KEYS if key in best.given or key in tuned]
    return {key: best.config[key] for key in keys if best.config[key] is not None}


def current(environ: Mapping[str, str]) -> Trial | None:
    """The trial that this process is part of; None in ordinary runs."""
    text = environ.get(TRIAL_VARIABLE, "")
    if not text:
        return None
    try:
        return Trial(**parse_json(text))
    except (JsonFault, TypeError) as error:
        raise LaunchError(
            f"{TRIAL_VARIABLE} is what `opensmp tune` tells the script; it cannot be read: "
            f"{error}. "
            f"Received: {shown(text)}. Remove the variable from the environment."
        ) from None
