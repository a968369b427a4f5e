"""Simulates a schedule in time: its duration, its bubble, and the activations it keeps alive."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.table import TaskTable
from opensmp.compiler.schedule.validate import run_times, validate
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


def simulate(
    schedule: Schedule,
    graph: TaskGraph,
    transfer_seconds: float | Mapping[Action, float] = 0.0,
) -> Simulation:
    """Runs the orders with blocking semantics, each action as early as possible.

    A forward result is held from the start of its action until the end of its last use: by all
    direct dependents, and by all other actions of its segment and microbatch. A recomputed result
    counts as if it were kept, which is an upper bound.

    Args:
        schedule: A valid schedule for `graph`; its `releases` are waited for too.
        graph: The tasks and their durations, which may differ from those the schedule was made
            with.
        transfer_seconds: Delay between an action and a dependent on another device, >= 0; or by
            dependent, which are 0 without an entry.

    Raises:
        ScheduleError: If the schedule is invalid, or `transfer_seconds` is negative.

    Example:
        >>> from opensmp.compiler.schedule.methods.simple import simple
        >>> graph = TaskGraph.chain(num_partitions=2, num_microbatches=4)
        >>> simulation = simulate(simple(graph), graph)
        >>> simulation.makespan_seconds, simulation.bubble, simulation.live_activations
        (15.0, 0.2, (4, 4))
    """
    waits: float | list[float]
    if isinstance(transfer_seconds, Mapping):
        waits = [transfer_seconds.get(action, 0.0) for action in graph.table.actions]
        least = min(waits, default=0.0)
    else:
        waits = least = transfer_seconds
    if not least >= 0:
        raise ScheduleError(
            f"simulate: transfer_seconds={least} is not possible; give a number >= 0."
        )
    times = run_times(schedule, graph.table, graph.num_devices, waits)
    if times is None:
        validate(schedule, graph)
        raise AssertionError(f"schedule {schedule.name!r} cannot run, but has no fault")
    actions = graph.table.actions
    starts, ends = (np.array(each, dtype=np.float64) for each in times)
    start, end = (dict(zip(actions, each, strict=True)) for each in times)

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
        live_activations=_live_activations(graph.table, graph.num_devices, starts, ends),
        peak_in_flight=_most_in_flight(graph.table, starts, ends),
    )


def step_seconds(schedule: Schedule, graph: TaskGraph, transfer_seconds: float = 0.0) -> float:
    """Returns `simulate(...).makespan_seconds` alone, which takes less time."""
    times = run_times(schedule, graph.table, graph.num_devices, transfer_seconds)
    if times is None:
        return simulate(schedule, graph, transfer_seconds).makespan_seconds  # names the faults
    return max(times[1], default=0.0)


def _live_activations(
    table: TaskTable, num_devices: int, start: NDArray[np.float64], end: NDArray[np.float64]
) -> tuple[int, ...]:
    """Returns the maximum number of forward results held by each device; see `simulate`."""
    results: dict[tuple[int, int], int] = {}
    result = np.array(
        [
            results.setdefault((action.segment, action.microbatch), len(results))
            for action in table.actions
        ],
        dtype=np.int64,
    )
    forward = np.array([action.kind == "F" for action in table.actions], dtype=np.bool_)
    device = np.array(table.device, dtype=np.int64)
    last_use = np.zeros(len(results))
    np.maximum.at(last_use, result, end)
    reader = np.repeat(np.arange(len(device)), [len(needed) for needed in table.needs])
    read = np.fromiter(itertools.chain.from_iterable(table.needs), np.int64, len(reader))
    reads_forward = forward[read]
    np.maximum.at(last_use, result[read[reads_forward]], end[reader[reads_forward]])
    # A result that several calls make on a device is held from the first one on.
    key = device[forward] * len(results) + result[forward]
    held, position = np.unique(key, return_inverse=True)
    begin = np.full(len(held), np.inf)
    np.minimum.at(begin, position, start[forward])
    until = last_use[held % max(1, len(results))]
    # `unique` sorts, so that the results of a device follow each other.
    cuts = np.searchsorted(held, len(results) * np.arange(num_devices + 1))
    return tuple(peak(begin[a:b], until[a:b]) for a, b in itertools.pairwise(cuts))


def _most_in_flight(table: TaskTable, start: NDArray[np.float64], end: NDArray[np.float64]) -> int:
    microbatch = np.array(table.microbatch, dtype=np.int64)
    count = int(microbatch.max(initial=-1)) + 1
    first, last = np.full(count, np.inf), np.zeros(count)
    np.minimum.at(first, microbatch, start)
    np.maximum.at(last, microbatch, end)
    return peak(first, last)


def peak(begin: NDArray[np.float64], end: NDArray[np.float64]) -> int:
    """Returns the maximum number of overlapping half-open intervals [begin, end)."""
    lasting = begin < end
    times = np.concatenate([end[lasting], begin[lasting]])
    changes = np.repeat([-1, 1], len(times) // 2)
    # Stable, so that ends come before begins at the same time.
    order = np.argsort(times, kind="stable")
    return int(np.cumsum(changes[order]).max(initial=0))
