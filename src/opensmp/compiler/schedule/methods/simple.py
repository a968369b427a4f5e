"""The simple schedule (GPipe): all forward passes, then all backward passes."""

from __future__ import annotations

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.list_scheduling import list_schedule


def simple(graph: TaskGraph, active_microbatches: int | None = None) -> Schedule:
    """Runs all forward passes, then all backward passes, on every device.

    This is the schedule of GPipe (Huang et al., "GPipe: Efficient Training of Giant Neural Networks
    using Pipeline Parallelism", 2019). With P devices and M microbatches of equal work the bubble
    is (P - 1) / (M + P - 1); every device holds the activations of all M microbatches. Three
    devices, four microbatches:

        device 0 | F0 F1 F2 F3 .. .. .. .. .. .. B0--- B1--- B2--- B3---
        device 1 | .. F0 F1 F2 F3 .. .. .. B0--- B1--- B2--- B3--- .. ..
        device 2 | .. .. F0 F1 F2 F3 B0--- B1--- B2--- B3--- .. .. .. ..
        simple: makespan 18 s, bubble 33.3 %, one column 1 s

    A forward pass that depends on a backward pass, through user code between two microbatches, runs
    in a second round of forward and backward passes, and so on; the number of rounds is the minimum
    that the dependencies allow.

    Split backward passes stay together: the weight gradients (W) follow the input gradients (B)
    immediately.

    Args:
        graph: Any task graph.
        active_microbatches: Ignored: all microbatches are in flight.
    """
    return list_schedule(
        graph,
        name="simple",
        priority=_oldest_first,
        active_microbatches=max(1, len(graph.microbatches)),
        gate=_rounds(graph).__getitem__,
    )


def _oldest_first(action: Action) -> tuple[int, ...]:
    along_the_pass = action.segment if action.kind == "F" else -action.segment
    return (action.microbatch, action.call, along_the_pass, int(action.kind == "W"))


def _rounds(graph: TaskGraph) -> dict[Action, int]:
    """Returns the lowest possible round of each action: even for forward passes, odd for others."""
    rounds: dict[Action, int] = {}
    for action in graph.topological_order:
        latest = max((rounds[needed] for needed in graph.needs[action]), default=0)
        parity = 0 if action.kind == "F" else 1
        rounds[action] = latest if latest % 2 == parity else latest + 1
    return rounds
