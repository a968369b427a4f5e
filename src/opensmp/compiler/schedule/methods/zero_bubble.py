"""The zero-bubble schedule: deferred weight gradients fill the bubble."""

from __future__ import annotations

from collections.abc import Sequence

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.interleaving import by_turns, quickest
from opensmp.compiler.schedule.list_scheduling import Priority, draft
from opensmp.compiler.schedule.methods.interleaved import backward_first

# From this number of devices on, only some of the possible numbers of deferred microbatches are
# tried.
_DEVICES_PER_STRIDE = 9

MOST_ACTIONS_TO_SEARCH = 4_000
"""Of larger graphs only the numbers that are best in a chain of equal partitions are tried."""


def zero_bubble(graph: TaskGraph, active_microbatches: int) -> Schedule:
    """Schedules split backward passes as `interleaved` does, with deferred second halves.

    Earlier segments wait for the gradients of a segment's inputs (B). The gradients of its weights
    (W) are not needed before the step ends, so a device can compute them when it is otherwise idle
    (Qi et al., "Zero Bubble Pipeline Parallelism", 2024, schedule H1). A deferred W keeps its
    activations, and a microbatch counts as in flight until its last W has run. Therefore only as
    many are deferred as fill the bubble at the end: those of the last few microbatches, in the
    number that gives the shortest step. All others follow their B immediately, while its results
    are in the cache. If a step is too short for a steady state, all may be deferred. Two devices,
    four microbatches; the first segment has no inputs to differentiate, so its B is not split:

        device 0 | F0 F1 F2 B0--- F3 B1--- B2--- B3--- ..
        device 1 | .. F0 B0 W0 F1 B1 F2 B2 F3 B3 W1 W2 W3
        zero_bubble: makespan 13 s, bubble 7.7 %, one column 1 s

    Args:
        graph: Any task graph. Without actions W the schedule is that of `interleaved`.
        active_microbatches: Maximum number of microbatches in flight, >= 1; see `interleaved`.
    """
    turns = by_turns(graph)
    deferred = sorted({action.microbatch for action in graph.device if action.kind == "W"})
    counts, is_thorough = deferred_counts(
        len(deferred), graph.num_devices, len(graph.device), active_microbatches
    )
    endings = [deferred[len(deferred) - count :] for count in counts]
    orders = [backward_first, *(_waiting(turns, last) for last in endings)]
    orders += [_waiting(backward_first, deferred)] * is_thorough
    drafts = (
        draft(
            graph,
            name="zero_bubble",
            priority=priority,
            active_microbatches=active_microbatches,
        )
        for priority in orders
    )
    return quickest(graph, drafts)


def deferred_counts(
    num_microbatches: int, num_devices: int, num_actions: int, bound: int
) -> tuple[list[int], bool]:
    """Returns the numbers of deferred microbatches to try, and whether they are all possible ones.

    These are 0 or more, up to twice the number of devices, and then all. Of a large graph those are
    tried that fill the bubble of equal partitions: each device idles for about one pass per device
    at the end. More do not help, and if they are more than may be in flight they keep new
    microbatches out.
    """
    most = min(num_microbatches, 2 * num_devices + 1)
    counts = [*range(0, most, 1 + num_devices // _DEVICES_PER_STRIDE), num_microbatches]
    if num_actions <= MOST_ACTIONS_TO_SEARCH:
        return counts, True
    possible = [count for count in counts if count <= bound]
    return ([count for count in possible if count > num_devices] or possible[-1:])[:2], False


def _waiting(priority: Priority, microbatches: Sequence[int]) -> Priority:
    """Ranks the weight gradients of these microbatches after all other actions."""
    wait = frozenset(microbatches)

    def late(action: Action) -> tuple[int, ...]:
        waits = action.kind == "W" and action.microbatch in wait
        return (int(waits), *priority(action))

    return late
