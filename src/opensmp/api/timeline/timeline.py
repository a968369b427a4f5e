"""Measured timelines of steps, and statistics derived from them (overlap, bubble)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from opensmp.api.timeline.gantt import gantt
from opensmp.base import notebook
from opensmp.base.message_text import counted
from opensmp.compiler.schedule.actions import Action
from opensmp.errors import StepError

_CATEGORIES = {"F": "forward", "B": "backward", "W": "weight gradient", "R": "recomputation"}


class Event(NamedTuple):
    """One execution of one action.

    Attributes:
        step: Index of the step in its timeline, from 0.
        action: The action.
        partition: The partition that ran it; each partition runs one action at a time.
        device: The partition's device, such as `"/device:CPU:1"`.
        start_seconds: When its inputs were available and the partition was free, in seconds since
            the first event of the timeline.
        end_seconds: When its results were available, likewise.
    """

    step: int
    action: Action
    partition: int
    device: str
    start_seconds: float
    end_seconds: float

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.end_seconds - self.start_seconds


@dataclass(frozen=True)
class StepTimeline:
    """The timeline of one run of a step. `print` draws it.

    Attributes:
        index: Index of the run in the recording, from 0.
        name: Name of the step's function.
        devices: Device of each partition; empty for partitions of other processes, which are
            not measured here.
        events: One per action of the step's schedule, sorted by start.
    """

    index: int
    name: str
    devices: tuple[str, ...]
    events: tuple[Event, ...]

    @property
    def start_seconds(self) -> float:
        """When the first action started."""
        return min((event.start_seconds for event in self.events), default=0.0)

    @property
    def end_seconds(self) -> float:
        """When the last action ended."""
        return max((event.end_seconds for event in self.events), default=0.0)

    @property
    def makespan_seconds(self) -> float:
        """Time from the start of the first action to the end of the last."""
        return self.end_seconds - self.start_seconds

    @property
    def busy_seconds(self) -> Mapping[str, float]:
        """Busy time of each device, by device."""
        return {
            device: math.fsum(e.seconds for e in self.events if e.device == device)
            for device in self.devices
            if device
        }

    @property
    def overlap_seconds(self) -> float:
        """Time in which at least two devices were busy."""
        return _overlap_seconds(self.events)

    @property
    def busy_fraction(self) -> Mapping[str, float]:
        """Fraction of the makespan in which each device was busy, by device."""
        return Timeline([self]).busy_fraction

    @property
    def overlap(self) -> float:
        """Fraction of the makespan in which at least two devices were busy, 0 <= overlap <= 1."""
        return Timeline([self]).overlap

    @property
    def bubble(self) -> float:
        """Idle fraction of the devices' total time in the makespan, 0 <= bubble <= 1."""
        return Timeline([self]).bubble

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the step: one row per partition, time along the axis.

        Args:
            path: File to write, as SVG, PNG or PDF by its suffix; an existing file is replaced.

        Returns:
            A `matplotlib.figure.Figure`, which notebooks display.

        Raises:
            StepError: If none of its actions ran in this process.

        Example:
            ```python
            timeline.steps[-1].plot("timeline.svg")
            ```
        """
        from opensmp.api.timeline.picture import draw_timeline

        return draw_timeline(self, path)

    def __str__(self) -> str:
        return gantt(self)

    def _repr_html_(self) -> str:
        """What a notebook shows of the step."""
        return notebook.preformatted(str(self))


class Timeline:
    """What `smp.record_timeline` measured: a `StepTimeline` per run of a step.

    Fractions refer to the sum of the makespans of all steps; time between steps (optimizer,
    input pipeline) is excluded. `print` draws the last step.

    Args:
        steps: The steps, in the order in which they ended.

    Example:
        ```python
        with smp.record_timeline() as timeline:
            train_step(images, labels)
            train_step(images, labels)
        print(timeline.steps[-1].bubble, timeline.busy_fraction)
        ```
    """

    def __init__(self, steps: Iterable[StepTimeline] = ()) -> None:
        self._steps = list(steps)

    def append(self, step: StepTimeline) -> None:
        """Appends a step."""
        self._steps.append(step)

    @property
    def steps(self) -> tuple[StepTimeline, ...]:
        """The measured steps."""
        return tuple(self._steps)

    @property
    def events(self) -> tuple[Event, ...]:
        """Events of all steps, in the order of the steps."""
        return tuple(event for step in self._steps for event in step.events)

    @property
    def busy_fraction(self) -> Mapping[str, float]:
        """Fraction of the steps' makespans in which each device was busy, by device."""
        devices = dict.fromkeys(device for step in self._steps for device in step.busy_seconds)
        busy = [step.busy_seconds for step in self._steps]
        return {
            device: _share(math.fsum(b.get(device, 0.0) for b in busy), self._makespan_seconds)
            for device in devices
        }

    @property
    def overlap(self) -> float:
        """Fraction of the steps' makespans in which at least two devices were busy."""
        overlap = math.fsum(step.overlap_seconds for step in self._steps)
        return _share(overlap, self._makespan_seconds)

    @property
    def bubble(self) -> float:
        """Idle fraction of the devices' total time during the steps."""
        busy = math.fsum(seconds for s in self._steps for seconds in s.busy_seconds.values())
        available = math.fsum(sum(map(bool, s.devices)) * s.makespan_seconds for s in self._steps)
        return _share(max(0.0, available - busy), available)

    @property
    def _makespan_seconds(self) -> float:
        return math.fsum(step.makespan_seconds for step in self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the last step: one row per partition, time along the axis.

        Args:
            path: File to write, as SVG, PNG or PDF by its suffix; an existing file is replaced.

        Returns:
            A `matplotlib.figure.Figure`, which notebooks display.

        Raises:
            StepError: If nothing was measured, or the last step not in this process.

        Example:
            ```python
            timeline.plot("timeline.svg")
            ```
        """
        from opensmp.api.timeline.picture import draw_timeline

        if not self._steps:
            raise StepError(
                "Timeline.plot: nothing was measured. Expected: at least one step run under "
                "smp.record_timeline(). Received: none. Run a step inside the `with` block."
            )
        return draw_timeline(self._steps[-1], path)

    def __repr__(self) -> str:
        return (
            f"Timeline({counted(len(self._steps), 'step')}, {counted(len(self.events), 'event')})"
        )

    def __str__(self) -> str:
        if not self._steps:
            return "Timeline: nothing was measured"
        drawn = gantt(self._steps[-1])
        if len(self._steps) == 1:
            return drawn
        return f"{drawn}\nthe last of {len(self._steps)} steps"

    def _repr_html_(self) -> str:
        """What a notebook shows of the timeline."""
        return notebook.preformatted(str(self))

    def to_chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the timeline in Chrome's trace event format.

        Open the file at https://ui.perfetto.dev (nothing is uploaded) or chrome://tracing.

        Args:
            path: JSON file to write; an existing file is overwritten.

        Example:
            ```python
            timeline.to_chrome_trace("timeline.json")
            ```
        """
        trace = {"traceEvents": _trace_events(self._steps), "displayTimeUnit": "ms"}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(trace, file, indent=1)


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole else 0.0


def _overlap_seconds(events: Iterable[Event]) -> float:
    changes = []
    for event in events:
        changes += [(event.start_seconds, 1, event.device), (event.end_seconds, -1, event.device)]
    running: dict[str, int] = {}
    total, since = 0.0, 0.0
    for moment, change, device in sorted(changes):
        if sum(count > 0 for count in running.values()) >= 2:
            total += moment - since
        running[device] = running.get(device, 0) + change
        since = moment
    return total


# See "Trace Event Format" of the Chromium project: complete events ("X") with times in
# microseconds, row names as metadata events ("M").


def _trace_events(steps: Sequence[StepTimeline]) -> list[dict[str, Any]]:
    rows: dict[tuple[int, str], None] = {}
    for step in steps:
        rows.update(dict.fromkeys((p, device) for p, device in enumerate(step.devices) if device))
    events: list[dict[str, Any]] = [_row(0, "steps")]
    events += [_row(p + 1, f"partition {p} ({device})") for p, device in rows]
    for step in steps:
        events.append(
            _slice(0, f"{step.name} {step.index}", "step", step.start_seconds, step.end_seconds)
        )
        for event in step.events:
            action = event.action
            slice_ = _slice(
                event.partition + 1,
                action.text,
                _CATEGORIES[action.kind],
                event.start_seconds,
                event.end_seconds,
            )
            slice_["args"] = {"step": step.index, **action._asdict()}
            events.append(slice_)
    return events


def _row(row: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": name}}


def _slice(row: int, name: str, category: str, start: float, end: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": 0,
        "tid": row,
        "ts": 1e6 * start,
        "dur": 1e6 * (end - start),
    }
