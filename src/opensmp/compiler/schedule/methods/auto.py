"""The automatic schedule: the fastest of all others and of list schedules by the longest way."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.interleaving import (
    by_turns,
    seconds_with_transfers,
    transfer_share,
)
from opensmp.compiler.schedule.list_scheduling import Priority, list_schedule
from opensmp.compiler.schedule.methods.interleaved import backward_first
from opensmp.compiler.schedule.simulate import simulate
from opensmp.config.pipelines import PIPELINES, most_in_flight

_STEPS = 10**9  # whole numbers that the longest way is divided into, for priorities


def auto(graph: TaskGraph, active_microbatches: int) -> Schedule:
    """Builds all schedules and some of its own, and returns the fastest that fits the memory.

    What counts is a simulation with the durations of the graph, in which a transfer takes a tenth
    of an average action. A schedule fits if no device holds more forward results of a segment, on
    average over its segments, than `active_microbatches`; of equally fast ones the one that holds
    least is returned. So no other schedule that fits is faster in the simulation.

    Its own are list schedules (Graham, 1969). One starts the action with the longest way to the end
    of the step, as in Topcuoglu et al., "Performance-Effective and Low-Complexity Task Scheduling
    for Heterogeneous Computing", 2002; the others are as `interleaved`, but run weight gradients
    only if nothing else can run.

    Args:
        graph: Any task graph.
        active_microbatches: Maximum number of microbatches that a device holds the activations of,
            >= 1. If it is not below the number of microbatches, it is that of `most_in_flight`.
    """
    limit = active_microbatches
    if limit >= len(graph.microbatches):
        limit = min(max(1, len(graph.microbatches)), most_in_flight(graph.num_devices))
    fitting = [
        (seconds_with_transfers(graph, schedule), held, number, schedule)
        for number, schedule in enumerate(_candidates(graph, limit, active_microbatches))
        for held in [_held(graph, schedule)]
        if held <= limit
    ]
    if not fitting:  # dependencies between microbatches need more in flight
        return _own(graph, backward_first, limit)
    best = min(fitting, key=lambda candidate: candidate[:3])[3]
    return Schedule("auto", best.orders, best.active_microbatches, best.releases, graph)


def _candidates(graph: TaskGraph, limit: int, active_microbatches: int) -> Iterator[Schedule]:
    for name, row in PIPELINES.items():
        if name == "auto":
            continue
        build = getattr(importlib.import_module(f"{__package__}.{name}"), name)
        # One with an order of its own holds less than it has in flight.
        yield build(graph, limit if row.held is None else active_microbatches)
    for priority in (
        longest_way_first(graph),
        _weights_last(backward_first),
        _weights_last(by_turns(graph)),
    ):
        for bound in (limit, 2 * limit):
            yield _own(graph, priority, bound)


def _own(graph: TaskGraph, priority: Priority, bound: int) -> Schedule:
    return list_schedule(graph, name="auto", priority=priority, active_microbatches=bound)


def _held(graph: TaskGraph, schedule: Schedule) -> float:
    """The microbatches whose activations the fullest device holds, on average over its segments."""
    segments: list[set[int]] = [set() for _ in range(graph.num_devices)]
    for action, device in graph.device.items():
        if action.kind == "F":
            segments[device].add(action.segment)
    live = simulate(schedule, graph).live_activations
    return max((n / len(own) for n, own in zip(live, segments, strict=True) if own), default=0.0)


def longest_way_first(graph: TaskGraph) -> Priority:
    """Ranks actions by the time from their start to the end of the step if no device is busy."""
    transfer = transfer_share(graph)
    way: dict[Action, float] = {}
    for action in reversed(graph.topological_order):
        device = graph.device[action]
        after = (
            way[other] + transfer * (graph.device[other] != device)
            for other in graph.dependents[action]
        )
        way[action] = graph.seconds[action] + max(after, default=0.0)
    unit = max(way.values(), default=1.0) / _STEPS or 1.0

    def priority(action: Action) -> tuple[int, ...]:
        return (-round(way[action] / unit), action.microbatch)

    return priority


def _weights_last(priority: Priority) -> Priority:
    def late(action: Action) -> tuple[int, ...]:
        return (int(action.kind == "W"), *priority(action))

    return late
