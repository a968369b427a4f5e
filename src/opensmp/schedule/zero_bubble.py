"""The zero-bubble schedule: weight gradients fill what would be a bubble."""

from __future__ import annotations

from opensmp.schedule.actions import Action, Schedule, TaskGraph
from opensmp.schedule.interleaved import backward_first
from opensmp.schedule.listing import list_schedule
from opensmp.schedule.turns import by_turns, quickest


def zero_bubble(graph: TaskGraph, active_microbatches: int) -> Schedule:
    """As `interleaved`, for backward passes in two halves, of which the second can wait.

    The gradients of a segment's inputs (B) are what the segments before wait for. Those of its
    weights (W) are needed by nobody before the step ends, so a device computes them when there
    is nothing else to do (Qi et al., "Zero Bubble Pipeline Parallelism", 2024, schedule H1).
    Waiting, a W keeps its activations: a microbatch counts as in flight until its last W has
    run, so that `active_microbatches` bounds them too. Where that leaves little room, each W
    goes before the next forward pass, if this is quicker; and forward and backward passes take
    turns as in `by_turns`, if this is. Two devices, four microbatches; the
    first segment has no inputs to differentiate, so that its B is whole:

        device 0 | F0 F1 F2 B0--- F3 B1--- B2--- B3--- ..
        device 1 | .. F0 B0 F1 B1 F2 B2 F3 B3 W0 W1 W2 W3
        zero_bubble: makespan 13 s, bubble 7.7 %, one column 1 s

    Args:
        graph: Any task graph. Without actions W the schedule is that of `interleaved`.
        active_microbatches: Most microbatches in flight, >= 1; see `interleaved`.

    Raises:
        ScheduleError: If `active_microbatches` is below 1.
    """
    turns = by_turns(graph), by_turns(graph, weights_soon=True)
    orders = (_weights_late, _weights_soon, *turns)
    schedules = [
        list_schedule(
            graph,
            name="zero_bubble",
            priority=priority,
            active_microbatches=active_microbatches,
        )
        for priority in orders
    ]
    return quickest(graph, schedules)


def _weights_late(action: Action) -> tuple[int, ...]:
    """Weight gradients when there is nothing else to do."""
    return (int(action.kind == "W"), *backward_first(action))


def _weights_soon(action: Action) -> tuple[int, ...]:
    """Weight gradients before forward passes: they leave room where few may be in flight."""
    return (int(action.kind == "F"), *backward_first(action)[1:], int(action.kind == "W"))
