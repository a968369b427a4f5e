"""Actions and their dependencies (`Action`, `TaskGraph`) and their order (`Schedule`)."""

from __future__ import annotations

import graphlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, get_args

from opensmp.base import notebook
from opensmp.base.message_text import sentence
from opensmp.compiler.schedule.table import TaskTable
from opensmp.errors import ScheduleError

Kind = Literal["F", "B", "W", "R"]
"""Forward, backward, weight-gradient part of a backward, recomputation of a forward."""

KINDS: tuple[str, ...] = get_args(Kind)

_SECONDS_OF_KIND = {"F": 1.0, "B": 2.0, "W": 1.0, "R": 1.0}

_TEXT = re.compile(r"(\d{1,9})([FBWR])(\d{1,9})(?:\.(\d{1,9}))?", re.ASCII)


class Action(NamedTuple):
    """A unit of work: one kind of pass of one segment for one microbatch.

    Attributes:
        kind: `"F"`, `"B"`, `"W"` or `"R"` (see `Kind`).
        segment: Number of the segment, counted over all models of a step.
        microbatch: Number of the microbatch.
        call: Number of earlier requests for the same work; 1 for the second backward pass of a
            persistent gradient tape.

    Example:
        >>> Action("F", segment=2, microbatch=0).text
        '2F0'
        >>> str(Action("B", 2, 0, call=1))
        '2B0.1'
        >>> Action.parse("2B0.1") == Action("B", 2, 0, call=1)
        True
    """

    kind: str
    segment: int
    microbatch: int
    call: int = 0

    @property
    def text(self) -> str:
        """The short form: segment, kind, microbatch, and the call unless it is 0."""
        call = f".{self.call}" if self.call else ""
        return f"{self.segment}{self.kind}{self.microbatch}{call}"

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> Action:
        """Parses the short form, such as `"2F0"` or `"2B0.1"`.

        Raises:
            ScheduleError: If the text is not the short form of an action.

        Example:
            >>> Action.parse("2F0")
            Action(kind='F', segment=2, microbatch=0, call=0)
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ScheduleError(
                f"Action: {text!r} is not the text of an action; write segment, kind "
                f"({', '.join(KINDS)}), microbatch and, above 0, the call: '2F0', '2B0.1'."
            )
        segment, kind, microbatch, call = match.groups(default="0")
        return cls(kind, int(segment), int(microbatch), int(call))


def default_seconds(actions: Iterable[Action]) -> dict[Action, float]:
    """Returns relative durations as a substitute for measured ones: F=1, B=2, W=1, R=1.

    A backward pass computes two products (gradients of inputs and of weights) where a forward pass
    computes one. If the weight gradients are a separate action W, B=1.

    Example:
        >>> default_seconds([Action.parse("0F0"), Action.parse("0B0")])[Action("B", 0, 0)]
        2.0
    """
    listed = list(actions)
    seconds = {action: _SECONDS_OF_KIND[action.kind] for action in listed}
    for action in listed:
        whole = action._replace(kind="B")
        if action.kind == "W" and whole in seconds:
            seconds[whole] = _SECONDS_OF_KIND["B"] - _SECONDS_OF_KIND["W"]
    return seconds


@dataclass(frozen=True)
class TaskGraph:
    """The actions of one step, with their devices and dependencies.

    Dependencies may form any acyclic graph: chains, skip connections, user code that makes one
    microbatch depend on another, segments without a backward pass.

    Attributes:
        device: Device index of every action, 0 <= index < `num_devices`. Its keys are the actions
            of the graph.
        needs: Direct dependencies. An action without an entry has none.
        seconds: Relative duration of each action, >= 0. `default_seconds` fills in missing ones.
        num_devices: Number of devices; 0 means the number that `device` implies.
        transfer_seconds: Time, in the unit of `seconds`, that schedules allow for between an action
            and a dependent on another device, >= 0.

    Raises:
        ScheduleError: With all faults found (unknown actions or kinds, devices out of range,
            invalid durations), or with the cycle if the dependencies have one.

    Example:
        >>> forward, backward = Action("F", 0, 0), Action("B", 0, 0)
        >>> graph = TaskGraph({forward: 0, backward: 0}, {backward: frozenset({forward})})
        >>> graph.num_devices, graph.seconds[backward]
        (1, 2.0)
    """

    device: Mapping[Action, int]
    needs: Mapping[Action, frozenset[Action]]
    seconds: Mapping[Action, float] = field(default_factory=dict)
    num_devices: int = 0
    transfer_seconds: float = 0.0

    def __post_init__(self) -> None:
        faults = [
            fault
            for action in self.device
            if action.kind not in _SECONDS_OF_KIND or min(action[1:]) < 0
            for fault in _action_faults(action)
        ]
        num_devices = self.num_devices or 1 + max(self.device.values(), default=-1)
        faults += [
            f"{action} is on device {device}, but there are only devices 0 to {num_devices - 1}"
            for action, device in self.device.items()
            if not 0 <= device < num_devices
        ]
        for action, needed in self.needs.items():
            if action not in self.device:
                faults.append(f"{action} has dependencies, but no device")
            if not self.device.keys() >= needed:
                faults += [
                    f"{action} needs {other}, which has no device"
                    for other in sorted(needed)
                    if other not in self.device
                ]
        for action, seconds in self.seconds.items():
            if action not in self.device:
                faults.append(f"{action} has a duration, but no device")
            if not (math.isfinite(seconds) and seconds >= 0):
                faults.append(f"{action} takes {seconds} seconds; give a finite number >= 0")
        if not (math.isfinite(self.transfer_seconds) and self.transfer_seconds >= 0):
            faults.append(
                f"a transfer takes {self.transfer_seconds} seconds; give a finite number >= 0"
            )
        if faults:
            raise ScheduleError(f"TaskGraph: {sentence(faults)}")
        # Copied, so that this value does not change with the caller's dicts.
        nothing: frozenset[Action] = frozenset()
        own = {
            "device": dict(self.device),
            "needs": {action: frozenset(self.needs.get(action, nothing)) for action in self.device},
            "seconds": default_seconds(self.device) | dict(self.seconds),
            "num_devices": num_devices,
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)
        _ = self.topological_order

    @cached_property
    def topological_order(self) -> tuple[Action, ...]:
        """All actions, each after its dependencies; identical in all processes.

        Raises:
            ScheduleError: If the dependencies form a cycle.
        """
        # Sorted, since the iteration order of sets differs between processes, and all processes of
        # a step must compute the same order.
        sorter = graphlib.TopologicalSorter(
            {action: sorted(self.needs[action]) for action in sorted(self.device)}
        )
        try:
            return tuple(sorter.static_order())
        except graphlib.CycleError as error:
            cycle: list[Action] = error.args[1][:0:-1]
            first = cycle.index(min(cycle))
            cycle = cycle[first:] + cycle[: first + 1]
            raise ScheduleError(
                f"TaskGraph: the dependencies form a cycle: {' needs '.join(map(str, cycle))}; "
                "no order of the actions can meet them, so drop one of these dependencies."
            ) from None

    @cached_property
    def dependents(self) -> Mapping[Action, tuple[Action, ...]]:
        """The reverse of `needs`: the actions that depend directly on an action."""
        dependents: dict[Action, list[Action]] = {action: [] for action in self.device}
        for action in self.topological_order:
            for needed in self.needs[action]:
                dependents[needed].append(action)
        return {action: tuple(others) for action, others in dependents.items()}

    @cached_property
    def table(self) -> TaskTable:
        """The same graph by numbers, for loops over all actions."""
        return TaskTable.of(self)

    @cached_property
    def microbatches(self) -> tuple[int, ...]:
        """The numbers of all microbatches, ascending."""
        return tuple(sorted({action.microbatch for action in self.device}))

    @classmethod
    def chain(
        cls,
        num_partitions: int,
        num_microbatches: int,
        backward: bool = True,
        split_backward: bool = False,
        devices: Sequence[int] | None = None,
    ) -> TaskGraph:
        """Returns the linear pipeline: segment s on device s feeds segment s + 1.

        Args:
            num_partitions: Number of segments, and of devices; >= 1.
            num_microbatches: Number of microbatches; >= 1.
            backward: Whether to add backward passes. The backward pass of a segment needs its
                forward pass and the backward pass of the next segment.
            split_backward: Whether weight gradients are separate actions W, each after the B of its
                segment. The first segment has a B without a separate W.
            devices: Device of each segment, if it is not that of its number: `(0, 1, 1, 0)` is a V
                of two devices with two pieces each.

        Raises:
            ScheduleError: If a number is below 1, or there is not a device for each segment.

        Example:
            >>> graph = TaskGraph.chain(num_partitions=2, num_microbatches=1)
            >>> sorted(map(str, graph.needs[Action.parse("0B0")]))
            ['0F0', '1B0']
        """
        if num_partitions < 1 or num_microbatches < 1:
            raise ScheduleError(
                f"TaskGraph.chain: num_partitions={num_partitions} and "
                f"num_microbatches={num_microbatches} must both be at least 1."
            )
        homes = range(num_partitions) if devices is None else devices
        if len(homes) != num_partitions:
            raise ScheduleError(
                f"TaskGraph.chain: devices={tuple(homes)} must give one device for each of the "
                f"{num_partitions} segments; received {len(homes)}."
            )
        device: dict[Action, int] = {}
        needs: dict[Action, frozenset[Action]] = {}
        for microbatch in range(num_microbatches):
            for segment in range(num_partitions):
                forward = Action("F", segment, microbatch)
                device[forward] = homes[segment]
                if segment > 0:
                    needs[forward] = frozenset({Action("F", segment - 1, microbatch)})
                if backward:
                    back = Action("B", segment, microbatch)
                    device[back] = homes[segment]
                    needs[back] = frozenset({forward})
                    if segment + 1 < num_partitions:
                        needs[back] |= {Action("B", segment + 1, microbatch)}
                    if split_backward and segment > 0:
                        weights = Action("W", segment, microbatch)
                        device[weights] = homes[segment]
                        needs[weights] = frozenset({back})
        return cls(device, needs, default_seconds(device), 1 + max(homes))


def _action_faults(action: Action) -> list[str]:
    faults = []
    if action.kind not in KINDS:
        faults.append(f"{action!r} has the kind {action.kind!r}; choose one of {', '.join(KINDS)}")
    if min(action.segment, action.microbatch, action.call) < 0:
        faults.append(f"{action!r} has a negative number; segment, microbatch, call are >= 0")
    return faults


@dataclass(frozen=True)
class Schedule:
    """The order in which every device runs its actions.

    `print(schedule)` shows it as a grid, see `opensmp.compiler.schedule.grid`.

    Attributes:
        name: Name of the method that created it, such as `"interleaved"`.
        orders: One order of actions per device, by device index.
        active_microbatches: Maximum number of microbatches in flight, None if unbounded. It exceeds
            the requested bound if dependencies between microbatches require that.
        releases: Pairs (before, after) of actions on different devices: `after` may start once
            `before` has finished. They enforce `active_microbatches` regardless of actual
            durations, and must be enforced like dependencies. Empty if the orders alone suffice, as
            in every chain that ends with the backward pass of its first segment.
        graph: The task graph it was created for, which gives the grid its times.

    Example:
        >>> forward, backward = Action("F", 0, 0), Action("B", 0, 0)
        >>> print(Schedule("by hand", ((forward, backward),)))
        device 0 | F0 B0
        by hand: one column per action
    """

    name: str
    orders: tuple[tuple[Action, ...], ...]
    active_microbatches: int | None = None
    releases: tuple[tuple[Action, Action], ...] = ()
    graph: TaskGraph | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        # Imported here because the grid is drawn from a simulation of a schedule.
        from opensmp.compiler.schedule.grid import grid

        if self.graph is not None:
            try:
                return grid(self, self.graph)
            except ScheduleError:
                # An invalid schedule must be printable for debugging.
                pass
        return grid(self)

    def _repr_html_(self) -> str:
        """What a notebook shows of the schedule."""
        return notebook.preformatted(str(self))
