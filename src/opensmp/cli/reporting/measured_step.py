"""One measured step of a run: the actions of all ranks in one timeline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from opensmp.cli.reporting.run_folder import Run
from opensmp.compiler.schedule.actions import Action


class Row(NamedTuple):
    """A partition of a replica, which runs one action at a time."""

    replica: int
    partition: int


class Event(NamedTuple):
    """An action: its row, and its seconds since the first one started."""

    row: Row
    action: Action
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.end - self.start


@dataclass(frozen=True)
class MeasuredStep:
    """A step, counted from 0, as it was measured in all ranks.

    Attributes:
        step: Its number, from 0.
        calls: Names of the functions that ran in it, one for each measurement of a rank.
        rows: The partitions of all replicas, in order.
        events: All actions, by start.
    """

    step: int
    calls: tuple[str, ...]
    rows: tuple[Row, ...]
    events: tuple[Event, ...]

    @property
    def makespan_seconds(self) -> float:
        """From the start of the first action to the end of the last."""
        return max((event.end for event in self.events), default=0.0)

    def busy_seconds(self, row: Row) -> float:
        """Busy time of a partition."""
        return math.fsum(event.seconds for event in self.events if event.row == row)

    def work_seconds(self, row: Row) -> float:
        """Busy time of a partition if each of its passes took the median of its kind.

        A pass that the system interrupted once does not count as work.
        """
        passes: dict[tuple[str, int], list[float]] = {}
        for event in self.events:
            if event.row == row:
                kind = (event.action.kind, event.action.segment)
                passes.setdefault(kind, []).append(event.seconds)
        return math.fsum(len(each) * statistics.median(each) for each in passes.values())

    @property
    def bubble(self) -> float:
        """Idle share of all partitions' time in the step."""
        available = len(self.rows) * self.makespan_seconds
        busy = math.fsum(event.seconds for event in self.events)
        return max(0.0, 1 - busy / available) if available else 0.0

    def handover_seconds(
        self, needs: Mapping[Action, frozenset[Action]]
    ) -> Mapping[Row, float] | None:
        """Time in which a partition was idle though what its next action needs was computed.

        This is what transfers and the start of actions take. None if the step has other actions.
        """
        gaps = self.handovers(needs)
        if gaps is None:
            return None
        found = dict.fromkeys(self.rows, 0.0)
        for row, seconds in gaps:
            found[row] += seconds
        return found

    def handovers(
        self, needs: Mapping[Action, frozenset[Action]]
    ) -> Sequence[tuple[Row, float]] | None:
        """For each action that needs results of other partitions: how long it idled with them."""
        if len(self.calls) != 1:
            return None
        ended = {(event.row.replica, event.action): event for event in self.events}
        found: list[tuple[Row, float]] = []
        free = dict.fromkeys(self.rows, 0.0)
        for event in self.events:
            row = event.row
            if event.action.kind in "FB" and event.action not in needs:
                return None
            before = [
                other
                for need in needs.get(event.action, ())
                if (other := ended.get((row.replica, need))) is not None
            ]
            if any(other.row != row for other in before):
                ready = max(free[row], max(other.end for other in before))
                found.append((row, max(0.0, event.start - ready)))
            free[row] = max(free[row], event.end)
        return found


def measured_steps(run: Run) -> list[MeasuredStep]:
    """Returns the steps that were measured, without those that are warm-ups or incomplete."""
    by_step: dict[int, list[tuple[int, str, list[tuple[Row, Action, float, float]]]]] = {}
    for rank, each in run.ranks.items():
        for timeline in each.timelines:
            found = [
                (Row(each.replica, partition), action, start, end)
                for partition, action, (start, end) in zip(
                    timeline.partitions, timeline.actions, timeline.seconds, strict=True
                )
            ]
            by_step.setdefault(timeline.step, []).append((rank, timeline.name, found))
    if len(by_step) > 1:
        del by_step[min(by_step)]  # TensorFlow prepares what it runs
    steps = [_merged(step, found) for step, found in sorted(by_step.items())]
    most = max((len(step.rows) for step in steps), default=0)
    return [step for step in steps if step.events and len(step.rows) == most]


def typical(steps: Sequence[MeasuredStep]) -> MeasuredStep | None:
    """Returns the step of median duration."""
    ordered = sorted(steps, key=lambda step: step.makespan_seconds)
    return ordered[(len(ordered) - 1) // 2] if ordered else None


def _merged(
    step: int, found: Sequence[tuple[int, str, Sequence[tuple[Row, Action, float, float]]]]
) -> MeasuredStep:
    begin = min((start for _, _, events in found for _, _, start, _ in events), default=0.0)
    events = sorted(
        (
            Event(row, action, start - begin, end - begin)
            for _, _, some in found
            for row, action, start, end in some
        ),
        key=lambda event: (event.start, event.end, event.row),
    )
    first = min((rank for rank, _, _ in found), default=0)
    return MeasuredStep(
        step,
        tuple(name for rank, name, _ in found if rank == first),
        tuple(sorted({event.row for event in events})),
        tuple(events),
    )
