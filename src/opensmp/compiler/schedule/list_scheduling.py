"""List scheduling, the algorithm behind every schedule of this package.

The devices are simulated in time. An idle device starts the best of its ready actions, by a
priority that defines the schedule (Graham, "Bounds on multiprocessing timing anomalies", 1969). The
orders of all devices are taken from the single sequence in which the simulation started the
actions. Every dependency points forward in that sequence, so the orders cannot deadlock.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import product

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.errors import ScheduleError

Priority = Callable[[Action], tuple[int, ...]]
"""Rank of a ready action; a device starts the action with the smallest tuple."""

Gate = Callable[[Action], int]
"""A device runs its actions by ascending gate, and idles until the next gate may open.

A gate must not decrease along a dependency.
"""

_Entry = tuple[int, tuple[int, ...], Action]

# Ends that differ by less count as simultaneous: sums of durations in different orders differ in
# the last digits, and a device must not miss an action because of that.
_SAME_MOMENT = 1 + 1e-9


def _no_gate(action: Action) -> int:
    return 0


def list_schedule(
    graph: TaskGraph,
    *,
    name: str,
    priority: Priority,
    active_microbatches: int,
    gate: Gate = _no_gate,
) -> Schedule:
    """Schedules any task graph by priority, with a bound on microbatches in flight.

    A microbatch is in flight from the start of its first action until the end of its last one. That
    also bounds the activations on each device: at most `active_microbatches` for each of the
    device's segments.

    Args:
        graph: The tasks.
        name: Name of the schedule.
        priority: Ready actions with smaller tuples start first. Ties are broken by the actions.
        active_microbatches: Maximum number of microbatches in flight, >= 1. It is raised by one
            whenever no action could run otherwise, which happens only with dependencies between
            microbatches; the schedule records the final bound.
        gate: Keeps a device from running ahead, see `Gate`.
    """
    if active_microbatches < 1:
        raise ScheduleError(
            f"Schedule {name!r}: active_microbatches={active_microbatches} is not possible; "
            "give at least 1, the number of microbatches that may be in flight at once."
        )
    descents = [
        f"{action} (gate {gate(action)}) needs {needed} (gate {gate(needed)})"
        for action in graph.topological_order
        for needed in sorted(graph.needs[action])
        if gate(needed) > gate(action)
    ]
    if descents:
        raise ScheduleError(
            f"Schedule {name!r}: a gate must not be below that of a dependency, or devices "
            f"would wait for each other for ever: {'; '.join(descents)}."
        )
    engine = _Engine(graph, priority, gate, active_microbatches)
    engine.run()
    return Schedule(
        name=name,
        orders=tuple(tuple(order) for order in engine.orders),
        active_microbatches=engine.bound,
        releases=_releases(graph, engine.sequence, engine.follows),
        graph=graph,
    )


class _Engine:
    """The state of one simulation; `run` fills `orders`, `sequence`, `bound` and `follows`.

    A ready action of a microbatch in flight is in the `ready` heap of its device; one of a
    microbatch that has not started is in the `fresh` heap and in `parked`.
    """

    def __init__(self, graph: TaskGraph, priority: Priority, gate: Gate, bound: int) -> None:
        self.graph = graph
        self.bound = bound
        self.orders: list[list[Action]] = [[] for _ in range(graph.num_devices)]
        self.sequence: list[Action] = []  # all actions in the order of their starts
        # Maps a microbatch admitted after the first `bound` to the finished one that it replaces.
        self.follows: dict[int, int] = {}
        self._entries: dict[Action, _Entry] = {
            action: (gate(action), priority(action), action) for action in graph.device
        }
        self._gates: list[list[int]] = [[] for _ in self.orders]
        for action, (number, _, _) in self._entries.items():
            self._gates[graph.device[action]].append(number)
        for gates in self._gates:
            gates.sort()
        self._ready: list[list[_Entry]] = [[] for _ in self.orders]
        self._fresh: list[list[_Entry]] = [[] for _ in self.orders]
        self._parked: dict[int, list[Action]] = {m: [] for m in graph.microbatches}
        self._in_flight_or_done: set[int] = set()
        self._unfinished = dict.fromkeys(graph.microbatches, 0)
        self._missing = {action: len(needed) for action, needed in graph.needs.items()}
        self._free_slots = bound
        self._finished_microbatches: deque[int] = deque()
        self._idle = set(range(graph.num_devices))
        self._ends: list[tuple[float, int, Action]] = []
        self._num_started = 0

    def run(self) -> None:
        """Simulates the devices until all actions have run."""
        for action, missing in self._missing.items():
            self._unfinished[action.microbatch] += 1
            if not missing:
                self._make_ready(action)
        now = 0.0
        while True:
            self._start_all(now)
            if not self._ends:
                if self._num_started == len(self._entries):
                    return
                # All devices are idle, so only the bound prevents a ready action from starting.
                self.bound += 1
                self._free_slots += 1
                continue
            moment = self._ends[0][0] * _SAME_MOMENT
            while self._ends and self._ends[0][0] <= moment:
                now, _, action = heapq.heappop(self._ends)
                self._finish(action)

    def _start_all(self, now: float) -> None:
        # Picks the best action over all idle devices, so that a free slot goes to the best
        # microbatch instead of the first device.
        while choices := [entry for d in self._idle if (entry := self._choose(d)) is not None]:
            self._start(min(choices)[-1], now)

    def _choose(self, device: int) -> _Entry | None:
        """Returns the best action that an idle device may start now; None if there is none."""
        ready, fresh = self._ready[device], self._fresh[device]
        while fresh and fresh[0][-1].microbatch in self._in_flight_or_done:
            heapq.heappop(fresh)
        heads = ready[:1]
        if self._free_slots or self._finished_microbatches:
            heads += fresh[:1]
        if not heads:
            return None
        best = min(heads)
        gate = self._gates[device][len(self.orders[device])]
        return best if best[0] == gate else None

    def _start(self, action: Action, now: float) -> None:
        """Starts an action on its device, and admits its microbatch if necessary."""
        device = self.graph.device[action]
        if action.microbatch not in self._in_flight_or_done:
            self._admit(action.microbatch)
        heapq.heappop(self._ready[device])
        self.orders[device].append(action)
        self.sequence.append(action)
        self._idle.remove(device)
        heapq.heappush(self._ends, (now + self.graph.seconds[action], self._num_started, action))
        self._num_started += 1

    def _admit(self, microbatch: int) -> None:
        if self._free_slots:
            self._free_slots -= 1
        else:
            self.follows[microbatch] = self._finished_microbatches.popleft()
        self._in_flight_or_done.add(microbatch)
        for action in self._parked.pop(microbatch):
            self._make_ready(action)

    def _make_ready(self, action: Action) -> None:
        device, entry = self.graph.device[action], self._entries[action]
        if action.microbatch in self._in_flight_or_done:
            heapq.heappush(self._ready[device], entry)
        else:
            heapq.heappush(self._fresh[device], entry)
            self._parked[action.microbatch].append(action)

    def _finish(self, action: Action) -> None:
        self._idle.add(self.graph.device[action])
        self._unfinished[action.microbatch] -= 1
        if not self._unfinished[action.microbatch]:
            self._finished_microbatches.append(action.microbatch)
        for dependent in self.graph.dependents[action]:
            self._missing[dependent] -= 1
            if not self._missing[dependent]:
                self._make_ready(dependent)


def _releases(
    graph: TaskGraph, sequence: Sequence[Action], follows: dict[int, int]
) -> tuple[tuple[Action, Action], ...]:
    """Returns pairs that make each microbatch wait for the one that it replaces.

    Without them the bound would hold only if the actions take as long as simulated: a device
    without backward passes, for example, could run arbitrarily far ahead.
    """
    # All actions of a microbatch lie between its sources and its sinks, and a device runs its
    # actions in order, so the first source and the last sink per device suffice.
    first_source: dict[int, dict[int, Action]] = {m: {} for m in graph.microbatches}
    last_sink: dict[int, dict[int, Action]] = {m: {} for m in graph.microbatches}
    for action in sequence:
        device, microbatch = graph.device[action], action.microbatch
        if all(needed.microbatch != microbatch for needed in graph.needs[action]):
            first_source[microbatch].setdefault(device, action)
        if all(other.microbatch != microbatch for other in graph.dependents[action]):
            last_sink[microbatch][device] = action
    wanted = [
        (before, after)
        for entering, finished in sorted(follows.items())
        for (source, after), (sink, before) in product(
            sorted(first_source[entering].items()), sorted(last_sink[finished].items())
        )
        if source != sink
    ]
    return _not_implied(wanted, graph, sequence)


def _not_implied(
    pairs: Iterable[tuple[Action, Action]], graph: TaskGraph, sequence: Iterable[Action]
) -> tuple[tuple[Action, Action], ...]:
    """Returns the pairs (before, after) that neither dependencies nor device orders imply.

    Often `after` already waits, directly or through earlier actions of its device, for a later
    action of the device of `before`.
    """
    number: dict[Action, int] = {}  # position on its device, from 1
    ended: dict[Action, list[int]] = {}  # actions ended per device at its start
    last: dict[int, Action] = {}
    for action in sequence:
        device = graph.device[action]
        counts = [0] * graph.num_devices
        for earlier in (*graph.needs[action], *([last[device]] if device in last else [])):
            counts = list(map(max, counts, ended[earlier]))
            home = graph.device[earlier]
            counts[home] = max(counts[home], number[earlier])
        ended[action] = counts
        number[action] = 1 + (number[last[device]] if device in last else 0)
        last[device] = action
    return tuple(
        (before, after)
        for before, after in pairs
        if ended[after][graph.device[before]] < number[before]
    )
