"""The zero-bubble schedule: weight gradients fill what would be a bubble."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.interleaved import backward_first
from opensmp.compiler.schedule.interleaving import by_turns, quickest
from opensmp.compiler.schedule.list_scheduling import Priority, list_schedule

# With that many devices and more, only some of the possible lengths of the wait are tried.
_DEVICES_PER_STRIDE = 9


def zero_bubble(graph: TaskGraph, active_microbatches: int) -> Schedule:
    """As `interleaved`, for backward passes in two halves, of which the second can wait.

    The gradients of a segment's inputs (B) are what the segments before wait for. Those of its
    weights (W) are needed by nobody before the step ends, so a device can compute them when there
    is nothing else to do (Qi et al., "Zero Bubble Pipeline Parallelism", 2024, schedule H1).
    Waiting, a W keeps its activations, and a microbatch counts as in flight until its last W has
    run. So no more of them wait than fill the bubble at the end: those of the last few
    microbatches, as many as give the shortest step. All others follow their B at once, while
    what it gives is in the cache. Where a step is too short for a steady state, all may wait. Two
    devices, four microbatches; the first segment has no inputs to differentiate, so that its B is
    whole:

        device 0 | F0 F1 F2 B0--- F3 B1--- B2--- B3--- ..
        device 1 | .. F0 B0 W0 F1 B1 F2 B2 F3 B3 W1 W2 W3
        zero_bubble: makespan 13 s, bubble 7.7 %, one column 1 s

    Args:
        graph: Any task graph. Without actions W the schedule is that of `interleaved`.
        active_microbatches: Most microbatches in flight, >= 1; see `interleaved`.

    Raises:
        ScheduleError: If `active_microbatches` is below 1.
    """
    turns = by_turns(graph)
    deferred = sorted({action.microbatch for action in graph.device if action.kind == "W"})
    orders = [backward_first, *(_waiting(turns, last) for last in _endings(deferred, graph))]
    orders += [_waiting(backward_first, deferred)]
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


def _endings(microbatches: Sequence[int], graph: TaskGraph) -> Iterator[Sequence[int]]:
    """None of them, some of the last, up to twice as many as devices, and all."""
    most = min(len(microbatches), 2 * graph.num_devices + 1)
    for count in range(0, most, 1 + graph.num_devices // _DEVICES_PER_STRIDE):
        yield microbatches[len(microbatches) - count :]
    yield microbatches


def _waiting(priority: Priority, microbatches: Sequence[int]) -> Priority:
    """The weight gradients of these microbatches when there is nothing else to do."""
    wait = frozenset(microbatches)

    def late(action: Action) -> tuple[int, ...]:
        waits = action.kind == "W" and action.microbatch in wait
        return (int(waits), *priority(action))

    return late
