"""Reads the runs of a folder that `smp.RunReport` has written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from opensmp.base.message_text import shown
from opensmp.base.strict_json import JsonFault, parse_json
from opensmp.compiler.schedule.actions import Action
from opensmp.errors import SavingError, ScheduleError
from opensmp.execution.profiling import run_files

_MOST_LINE = 64 << 20
_MOST_STEPS = 20_000
_MOST = 1_000_000
_MAKE = (
    "Give the folder of an smp.RunReport: model.fit(..., callbacks=[smp.RunReport(folder)]) "
    "writes one."
)


class Steps(NamedTuple):
    """Some steps in a row: number of the last from 1, how many, seconds, examples, last values."""

    last: int
    num_steps: int
    seconds: float
    examples: int | None
    warm: bool
    values: Mapping[str, float]


class Epoch(NamedTuple):
    """The end of an epoch, counted from 0, after so many steps."""

    epoch: int
    last: int
    values: Mapping[str, float]


class RankTimeline(NamedTuple):
    """When the actions of a rank ran in a step, counted from 0; seconds since the epoch."""

    step: int
    name: str
    actions: tuple[Action, ...]
    partitions: tuple[int, ...]
    seconds: tuple[tuple[float, float], ...]


class Memory(NamedTuple):
    """The peak of a partition in a rank; `shares` are all partitions that it is for."""

    partition: int
    rank: int
    device: str
    predicted_bytes: int | None
    peak_bytes: int
    before_bytes: int
    measured_by: str
    shares: tuple[int, ...]


class End(NamedTuple):
    """That training has ended, when (seconds since the epoch), and the error that ended it."""

    time: float
    error: str


@dataclass
class RankRun:
    """What one rank has written of a run."""

    head: Mapping[str, Any]
    steps: list[Steps] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    timelines: list[RankTimeline] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    end: End | None = None
    time: float = 0.0
    broken: int = 0

    @property
    def time_begun(self) -> float:
        """When the run began, seconds since the epoch."""
        return float(self.head["time"])

    @property
    def replica(self) -> int:
        """Replica of the model that the rank belongs to, from 0."""
        return int(self.head["replica"])


@dataclass(frozen=True)
class Run:
    """A run: what its ranks have written, by rank, and the files of its plans."""

    name: str
    ranks: Mapping[int, RankRun]
    plans: tuple[Path, ...]

    @property
    def first(self) -> RankRun:
        """The lowest rank that has written something, usually 0."""
        return self.ranks[min(self.ranks)]

    @property
    def size(self) -> int:
        """Number of processes that took part."""
        return int(self.first.head["size"])


def read_runs(folder: Path) -> list[Run]:
    """Reads all runs of a folder, the oldest first.

    Raises:
        SavingError: It is no folder of an `smp.RunReport`, or cannot be read.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise SavingError(f"opensmp report: {shown(str(folder), 200)} {what}. {_MAKE}")
    found: dict[str, dict[int, RankRun]] = {}
    try:
        for path in sorted(folder.iterdir()):
            named = run_files.RANK_FILE.fullmatch(path.name)
            rank = _read_rank(path) if named and path.is_file() else None
            if named and rank is not None:
                found.setdefault(named[1], {})[int(named[2])] = rank
    except OSError as error:
        raise SavingError(
            f"opensmp report: {shown(str(folder), 200)} cannot be read: {error.strerror}."
        ) from error
    if not found:
        raise SavingError(
            f"opensmp report: {shown(str(folder), 200)} has no run of this version in it. {_MAKE}"
        )
    return [
        Run(name, dict(sorted(ranks.items())), tuple(_plans(folder, name)))
        for name, ranks in sorted(found.items())
    ]


def _plans(folder: Path, name: str) -> Iterator[Path]:
    number = 0
    while (path := run_files.plan_file(folder, name, number)).is_file():
        yield path
        number += 1


def _read_rank(path: Path) -> RankRun | None:
    """Reads the file of a rank; None if it does not begin as one of this version."""
    found: RankRun | None = None
    with path.open("rb") as file:
        while line := file.readline(_MOST_LINE):
            if not line.endswith(b"\n"):  # what was being written when the run was killed
                break
            try:
                record = _Record(parse_json(line, nonfinite=True))
                if found is None:
                    found = RankRun(_head(record), time=record.number("time"))
                else:
                    _add(found, record)
            except (_Fault, JsonFault):
                if found is None:
                    return None
                found.broken += 1
    return found


def _add(found: RankRun, record: _Record) -> None:
    kind = record.text("kind")
    if kind == "steps":
        steps = Steps(
            record.count("last"),
            max(1, record.count("count")),
            record.number("seconds", least=0.0),
            record.count("examples") if record.values.get("examples") is not None else None,
            record.values.get("warm") is True,
            record.numbers("values"),
        )
        found.time = record.number("time")
        found.steps.append(steps)
        found.end = None
        if len(found.steps) > _MOST_STEPS:
            found.steps[:] = _halved(found.steps)
    elif kind == "epoch":
        found.epochs.append(
            Epoch(record.count("epoch"), record.count("last"), record.numbers("values"))
        )
    elif kind == "timeline":
        found.timelines.append(_timeline(record))
    elif kind == "memory":
        found.memory = [_memory(each) for each in record.records("partitions")]
    elif kind == "end":
        found.end = End(record.number("time"), record.text("error"))
        found.time = found.end.time
    else:
        raise _Fault


def _head(record: _Record) -> dict[str, Any]:
    given = record.values
    if given.get("format") != run_files.FORMAT or given.get("version") != run_files.VERSION:
        raise _Fault
    for name in ("config", "environment"):
        if not isinstance(given.get(name), dict):
            raise _Fault
    for name in ("rank", "size", "replica", "replicas"):
        record.count(name)
    partitions = given["config"].get("partitions")
    if (
        isinstance(partitions, bool)
        or not isinstance(partitions, int)
        or not 0 < partitions < _MOST
    ):
        raise _Fault
    return given


def _timeline(record: _Record) -> RankTimeline:
    try:
        actions = tuple(Action.parse(str(text)) for text in record.items("actions"))
    except ScheduleError:
        raise _Fault from None
    partitions = tuple(_count(each) for each in record.items("partitions"))
    seconds = []
    for pair in record.items("seconds"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _Fault
        start, end = map(_finite, pair)
        seconds.append((start, max(start, end)))
    if not len(actions) == len(partitions) == len(seconds):
        raise _Fault
    return RankTimeline(
        record.count("step"), record.text("name"), actions, partitions, tuple(seconds)
    )


def _memory(record: _Record) -> Memory:
    predicted = record.values.get("predicted_bytes")
    return Memory(
        record.count("partition"),
        record.count("rank"),
        record.text("device"),
        None if predicted is None else _count(predicted, 1 << 62),
        _count(record.values.get("peak_bytes"), 1 << 62),
        _count(record.values.get("before_bytes"), 1 << 62),
        record.text("measured_by"),
        tuple(_count(each) for each in record.items("shares")),
    )


def _halved(steps: list[Steps]) -> list[Steps]:
    """Joins neighbours, so that a long run stays small."""
    return [
        a._replace(
            last=b.last,
            num_steps=a.num_steps + b.num_steps,
            seconds=a.seconds + b.seconds,
            examples=None if None in (a.examples, b.examples) else _sum(a.examples, b.examples),
            warm=a.warm and b.warm,
            values={**b.values, **{k: v for k, v in a.values.items() if not math.isfinite(v)}},
        )
        for a, b in zip(steps[::2], steps[1::2], strict=False)
    ] + steps[len(steps) // 2 * 2 :]


def _sum(left: int | None, right: int | None) -> int:
    return (left or 0) + (right or 0)


# --- values of a line --------------------------------------------------------------------------


class _Fault(ValueError):
    """A line is not of the format."""


class _Record:
    """The values of a JSON object, each checked when it is read."""

    def __init__(self, values: Any) -> None:
        if not isinstance(values, dict):
            raise _Fault
        self.values: dict[str, Any] = values

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str):
            raise _Fault
        return value

    def count(self, name: str) -> int:
        return _count(self.values.get(name), 1 << 53)

    def number(self, name: str, least: float = -math.inf) -> float:
        value = _finite(self.values.get(name))
        if value < least:
            raise _Fault
        return value

    def items(self, name: str) -> list[Any]:
        value = self.values.get(name)
        if not isinstance(value, list):
            raise _Fault
        return value

    def records(self, name: str) -> list[_Record]:
        return [_Record(each) for each in self.items(name)]

    def numbers(self, name: str) -> dict[str, float]:
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise _Fault
        return {key: _number(each) for key, each in value.items()}


def _count(value: Any, most: int = _MOST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise _Fault
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Fault
    try:
        return float(value)
    except OverflowError:
        raise _Fault from None


def _finite(value: Any) -> float:
    number = _number(value)
    if not math.isfinite(number):
        raise _Fault
    return number
