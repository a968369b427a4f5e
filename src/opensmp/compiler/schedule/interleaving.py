"""Priorities for devices with several segments each, as in interleaved 1F1B."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.list_scheduling import Draft, Priority
from opensmp.compiler.schedule.simulate import step_seconds
from opensmp.compiler.schedule.validate import run_orders

_TRANSFER_SHARE = 0.1


def by_turns(graph: TaskGraph) -> Priority:
    """Alternates forward and backward passes, with microbatches in groups of one per device.

    This is the order of interleaved 1F1B: a group goes through the first segments of all devices,
    then through their second ones, and so on; once a device has enough microbatches in flight to
    keep the others busy, every forward pass is followed by a backward pass (Narayanan et al.,
    "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021,
    section 2.2). As a priority it applies to any graph: if the next action of a device is not
    ready, the device runs the next ready one. Weight gradients go first.
    """
    group = graph.num_devices
    segments: dict[int, set[int]] = defaultdict(set)
    for action, device in graph.device.items():
        segments[device].add(action.segment)
    chunk = {
        (device, segment): position
        for device, present in segments.items()
        for position, segment in enumerate(sorted(present))
    }

    def priority(action: Action) -> tuple[int, ...]:
        if action.kind == "W":
            return (-1, action.microbatch, action.segment)
        device = graph.device[action]
        count, position = len(segments[device]), chunk[device, action.segment]
        whole, rest = divmod(action.microbatch, group)
        turn = whole * group * count + rest
        if action.kind == "F":
            return (0, 2 * (turn + position * group), action.call)
        ahead = 2 * (group - device - 1) + (count - 1) * group
        return (0, 2 * (turn + (count - 1 - position) * group + ahead) + 1, action.call)

    return priority


def quickest(graph: TaskGraph, drafts: Iterable[Draft]) -> Schedule:
    """Returns the schedule with the shortest step; the first one of equals.

    By `seconds_with_transfers`, so that of otherwise equal schedules the one that waits less for
    transfers is chosen.
    """
    transfer = transfer_share(graph)
    best: tuple[Draft, list[tuple[int, int]]] | None = None
    least = math.inf
    for draft in drafts:
        # Waiting for releases only makes a step longer: they are not looked for in vain.
        if _rounded(_seconds(draft, (), transfer)) >= least:
            continue
        releases = draft.releases()
        seconds = _rounded(_seconds(draft, releases, transfer))
        if seconds < least:
            best, least = (draft, releases), seconds
    assert best is not None, "give at least one draft"
    return best[0].finished(best[1])


def _seconds(draft: Draft, releases: Sequence[tuple[int, int]], transfer: float) -> float:
    times = run_orders(draft.orders, releases, draft.graph.table, transfer)
    assert times is not None, "list schedules cannot deadlock"
    return max(times[1], default=0.0)


def seconds_with_transfers(graph: TaskGraph, schedule: Schedule) -> float:
    """Returns the time of a step in which a transfer takes a tenth of an average action."""
    return _rounded(step_seconds(schedule, graph, transfer_share(graph)))


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.9g}")  # ignores rounding differences between sums


def longest_ways(graph: TaskGraph) -> float:
    """Returns the sum over microbatches of the time that each takes alone, with transfers."""
    return _longest_ways(graph, graph.seconds, transfer_share(graph))


def hidden_transfer_seconds(graph: TaskGraph, active_microbatches: int) -> float:
    """Returns the longest transfer that so many microbatches in flight can hide, on average.

    A device has work while others are on their way if the microbatches in flight keep the fullest
    device busy for as long as one of them takes alone. Longer transfers make the step longer.
    """
    count = len(graph.microbatches)
    busy = [0.0] * graph.num_devices
    for action, device in graph.device.items():
        busy[device] += graph.seconds[action]
    transfers = _longest_ways(graph, dict.fromkeys(graph.seconds, 0.0), 1.0)
    if not transfers:
        return 0.0
    # The way grows at most by its most transfers, so that this is no more than they can hide.
    spare = min(active_microbatches, count) * max(busy) - _longest_ways(graph, graph.seconds, 0.0)
    return max(0.0, spare / transfers)


def _longest_ways(graph: TaskGraph, seconds: Mapping[Action, float], transfer: float) -> float:
    end: dict[Action, float] = {}
    last: dict[int, float] = defaultdict(float)
    for action in graph.topological_order:
        device, microbatch = graph.device[action], action.microbatch
        starts = (
            end[needed] + transfer * (graph.device[needed] != device)
            for needed in graph.needs[action]
            if needed.microbatch == microbatch
        )
        end[action] = max(starts, default=0.0) + seconds[action]
        last[microbatch] = max(last[microbatch], end[action])
    return sum(last.values())


def transfer_share(graph: TaskGraph) -> float:
    """Returns the time of a transfer that schedules are compared with.

    A share of an action's, unless the graph allows for more.
    """
    share = _TRANSFER_SHARE * sum(graph.seconds.values()) / max(1, len(graph.seconds))
    return max(share, graph.transfer_seconds)
