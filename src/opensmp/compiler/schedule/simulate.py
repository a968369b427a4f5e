"""Simulates a schedule in time: its duration, its bubble, and the activations it keeps alive."""

from __future__ import annotations

import graphlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.validate import blocking_needs, validate
from opensmp.errors import ScheduleError


@dataclass(frozen=True)
class Simulation:
    """The result of simulating a schedule. All times are in the seconds of its task graph.

    Attributes:
        start: Start of each action.
        end: End of each action.
        makespan_seconds: End of the last action; the first starts at 0.
        busy_seconds: Busy time of each device, by device index.
        bubble: Idle share of all devices' time, 0 <= bubble <= 1.
        live_activations: Maximum number of forward results, counted as (segment, microbatch), that
            each device holds at once, by device index.
        peak_in_flight: Maximum number of microbatches that are in flight at once.
    """

    start: Mapping[Action, float]
    end: Mapping[Action, float]
    makespan_seconds: float
    busy_seconds: tuple[float, ...]
    bubble: float
    live_activations: tuple[int, ...]
    peak_in_flight: int


def simulate(schedule: Schedule, graph: TaskGraph, transfer_seconds: float = 0.0) -> Simulation:
    """Runs the orders with blocking semantics, each action as early as possible.

    A forward result is held from the start of its action until the end of its last use: by all
    direct dependents, and by all other actions of its segment and microbatch. A recomputed result
    counts as if it were kept, which is an upper bound.

    Args:
        schedule: A valid schedule for `graph`; its `releases` are waited for too.
        graph: The tasks and their durations, which may differ from those the schedule was made
            with.
        transfer_seconds: Delay between an action and a dependent on another device, >= 0.

    Raises:
        ScheduleError: If the schedule is invalid, or `transfer_seconds` is negative.

    Example:
        >>> from opensmp.compiler.schedule.simple import simple
        >>> graph = TaskGraph.chain(num_partitions=2, num_microbatches=4)
        >>> simulation = simulate(simple(graph), graph)
        >>> simulation.makespan_seconds, simulation.bubble, simulation.live_activations
        (15.0, 0.2, (4, 4))
    """
    if not transfer_seconds >= 0:
        raise ScheduleError(
            f"simulate: transfer_seconds={transfer_seconds} is not possible; give a number >= 0."
        )
    validate(schedule, graph)
    blockers = blocking_needs(schedule, graph)
    before_on_device = {
        later: earlier for order in schedule.orders for earlier, later in pairwise(order)
    }
    start: dict[Action, float] = {}
    end: dict[Action, float] = {}
    for action in _executable_order(blockers, before_on_device):
        earliest = 0.0
        if action in before_on_device:
            earliest = end[before_on_device[action]]
        for needed in blockers[action]:
            moved = graph.device[needed] != graph.device[action]
            earliest = max(earliest, end[needed] + transfer_seconds * moved)
        start[action] = earliest
        end[action] = earliest + graph.seconds[action]

    busy = tuple(math.fsum(graph.seconds[action] for action in order) for order in schedule.orders)
    makespan = max(end.values(), default=0.0)
    available = graph.num_devices * makespan
    # The makespan is a sum rounded in another order, so the difference may be slightly negative.
    idle = max(0.0, available - math.fsum(busy))
    return Simulation(
        start=start,
        end=end,
        makespan_seconds=makespan,
        busy_seconds=busy,
        bubble=idle / available if available else 0.0,
        live_activations=_live_activations(graph, start, end),
        peak_in_flight=_peak(_flights(start, end)),
    )


def _executable_order(
    blockers: Mapping[Action, frozenset[Action]], before_on_device: Mapping[Action, Action]
) -> Iterable[Action]:
    sorter = graphlib.TopologicalSorter(blockers)
    for later, earlier in before_on_device.items():
        sorter.add(later, earlier)
    return sorter.static_order()


def _live_activations(
    graph: TaskGraph, start: Mapping[Action, float], end: Mapping[Action, float]
) -> tuple[int, ...]:
    """Returns the maximum number of forward results held by each device; see `simulate`."""
    last_use: dict[tuple[int, int], float] = {}
    for action, ended in end.items():
        key = action.segment, action.microbatch
        last_use[key] = max(ended, last_use.get(key, 0.0))
    held_from: list[dict[tuple[int, int], float]] = [{} for _ in range(graph.num_devices)]
    for action, started in start.items():
        if action.kind != "F":
            continue
        key = action.segment, action.microbatch
        held = held_from[graph.device[action]]
        held[key] = min(started, held.get(key, started))
        used = (end[dependent] for dependent in graph.dependents[action])
        last_use[key] = max(last_use[key], *used, 0.0)
    return tuple(_peak((begin, last_use[key]) for key, begin in held.items()) for held in held_from)


def _flights(
    start: Mapping[Action, float], end: Mapping[Action, float]
) -> Iterable[tuple[float, float]]:
    flights: dict[int, tuple[float, float]] = {}
    for action, started in start.items():
        first, last = flights.get(action.microbatch, (started, 0.0))
        flights[action.microbatch] = min(first, started), max(last, end[action])
    return flights.values()


def _peak(intervals: Iterable[tuple[float, float]]) -> int:
    """Returns the maximum number of overlapping half-open intervals [begin, end)."""
    # Ends sort before begins at the same time.
    changes = sorted(
        change for begin, end in intervals if begin < end for change in ((begin, 1), (end, -1))
    )
    peak = held = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
