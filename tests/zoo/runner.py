"""Runs comparisons, each model in a process of its own, and judges the results."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")

BOUNDS = {"float32": 1e-6, "float64": 1e-12}
"""Largest accepted difference, relative to the largest value of a tensor.

Where float32 shows more, the model itself magnifies rounding: its gradients grow from layer to
layer, or an input of a ReLU changes its sign. An error of the library would not shrink with the
rounding, so that such a model has to meet the bound of float64.
"""


@dataclass(frozen=True)
class Outcome:
    """What came of one comparison.

    Attributes:
        model: Name of the model.
        partitions: Number of partitions.
        dtype: "float32" or "float64".
        difference: Largest relative difference, None if there was no comparison.
        where: Group and name of the tensor with the largest difference.
        failure: Why there was no comparison; empty if there was.
        details: What the worker measured.
    """

    model: str
    partitions: int
    dtype: str
    difference: float | None
    where: str = ""
    failure: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the difference is within the bound of the dtype."""
        return self.difference is not None and self.difference <= BOUNDS[self.dtype]

    def __str__(self) -> str:
        what = self.failure or _text(self.difference)
        where = f" ({self.where})" if self.difference else ""
        return f"{self.model}, {self.partitions} partitions, {self.dtype}: {what}{where}"

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Outcome:
        """Reads `to_json` back."""
        return cls(**json.loads(line))


def check(model: str, partitions: Sequence[int], timeout: float) -> Iterator[Outcome]:
    """Compares in float32, and in float64 what rounding alone may have driven apart.

    Args:
        model: Name of the model.
        partitions: Numbers of partitions.
        timeout: Seconds for each process.

    Yields:
        One outcome per number of partitions; two where float32 is out of its bound.
    """
    again = []
    for outcome in run(model, partitions, "float32", timeout):
        yield outcome
        if not outcome.passed and not outcome.failure:
            again.append(outcome.partitions)
    if again:
        yield from run(model, again, "float64", timeout)


def passed(outcomes: Sequence[Outcome], partitions: int) -> bool:
    """Whether one of the outcomes for a number of partitions is within its bound."""
    return any(o.passed for o in outcomes if o.partitions == partitions)


def run(model: str, partitions: Sequence[int], dtype: str, timeout: float) -> list[Outcome]:
    """One process: the comparisons of a model in one dtype."""
    numbers = [str(number) for number in partitions]
    command = [sys.executable, str(WORKER), model, "--dtype", dtype, "--partitions", *numbers]
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        printed, failure = done.stdout, _failure(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as expired:
        printed = expired.stdout.decode() if isinstance(expired.stdout, bytes) else ""
        failure = f"not done after {time.monotonic() - start:.0f} s"
    rows = {row["partitions"]: row for row in map(json.loads, printed.splitlines())}
    return [
        _outcome(rows[number])
        if number in rows
        else Outcome(model, number, dtype, None, failure=failure or "no result")
        for number in partitions
    ]


def _outcome(row: dict[str, Any]) -> Outcome:
    group, (relative, name) = max(row["differences"].items(), key=lambda item: item[1][0])
    return Outcome(
        row["model"], row["partitions"], row["dtype"], relative, f"{group} {name}", "", row
    )


def _failure(code: int, errors: str) -> str:
    if code == 0:
        return ""
    if code < 0:
        return f"the process died of {signal.Signals(-code).name}"
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else f"the process ended with {code}"


def _text(difference: float | None) -> str:
    return "equal bits" if difference == 0 else f"{difference:.1e}"
