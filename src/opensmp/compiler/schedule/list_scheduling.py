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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.schedule.actions import Action, Schedule, TaskGraph
from opensmp.compiler.schedule.table import TaskTable
from opensmp.errors import ScheduleError

Priority = Callable[[Action], tuple[int, ...]]
"""Rank of a ready action; a device starts the action with the smallest tuple."""

Gate = Callable[[Action], int]
"""A device runs its actions by ascending gate, and idles until the next gate may open.

A gate must not decrease along a dependency.
"""

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
    """Schedules any task graph by priority; see `draft`."""
    return draft(
        graph,
        name=name,
        priority=priority,
        active_microbatches=active_microbatches,
        gate=gate,
    ).finished()


def draft(
    graph: TaskGraph,
    *,
    name: str,
    priority: Priority,
    active_microbatches: int,
    gate: Gate = _no_gate,
) -> Draft:
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
    table = graph.table
    gates = None if gate is _no_gate else [gate(action) for action in table.actions]
    if gates is not None:
        _refuse_descents(name, table, gates)
    engine = _Engine(
        table,
        _ranks(table, priority, gates),
        gates,
        active_microbatches,
        graph.num_devices,
        graph.transfer_seconds,
    )
    engine.run()
    return Draft(name, graph, engine.bound, engine.orders, engine.sequence, engine.follows)


class Draft(NamedTuple):
    """A list schedule by numbers of actions; `finished` makes the `Schedule` of it.

    Attributes:
        name: Name of the schedule.
        graph: Its tasks.
        bound: Maximum number of microbatches in flight.
        orders: Numbers of the actions of each device, in its order.
        sequence: Numbers of all actions, in the order of their starts.
        follows: By microbatches that enter when another has finished: that other one.
    """

    name: str
    graph: TaskGraph
    bound: int
    orders: list[list[int]]
    sequence: list[int]
    follows: dict[int, int]

    def releases(self) -> list[tuple[int, int]]:
        """Pairs (before, after) that keep the bound, see `Schedule`."""
        return _releases(self.graph.table, self.sequence, self.follows, self.graph.num_devices)

    def finished(self, releases: Sequence[tuple[int, int]] | None = None) -> Schedule:
        """Returns the schedule, with the `releases` if they are known already."""
        actions = self.graph.table.actions
        pairs = self.releases() if releases is None else releases
        return Schedule(
            name=self.name,
            orders=tuple(tuple([actions[i] for i in order]) for order in self.orders),
            active_microbatches=self.bound,
            releases=tuple((actions[before], actions[after]) for before, after in pairs),
            graph=self.graph,
        )


def _refuse_descents(name: str, table: TaskTable, gates: Sequence[int]) -> None:
    """Raises an error if an action has a lower gate than one that it needs."""
    descents = [
        f"{table.actions[i]} (gate {gates[i]}) needs {table.actions[j]} (gate {gates[j]})"
        for i, needed in enumerate(table.needs)
        for j in needed
        if gates[j] > gates[i]
    ]
    if descents:
        raise ScheduleError(
            f"Schedule {name!r}: a gate must not be below that of a dependency, or devices "
            f"would wait for each other for ever: {'; '.join(descents)}."
        )


def _ranks(table: TaskTable, priority: Priority, gates: Sequence[int] | None) -> list[int]:
    """Returns the place of each action if all were sorted by gate, priority and action."""
    keys = [priority(action) for action in table.actions]
    numbers = range(len(keys))
    if gates is None:
        best_first = sorted(numbers, key=keys.__getitem__)  # stable, and numbered by action
    else:
        best_first = sorted(numbers, key=lambda i: (gates[i], keys[i]))
    ranks = [0] * len(keys)
    for rank, i in enumerate(best_first):
        ranks[i] = rank
    return ranks


class _Engine:
    """The state of one simulation; `run` fills `orders`, `sequence`, `bound` and `follows`.

    Actions are numbers. A ready action of a microbatch in flight is in the `ready` heap of its
    device, by rank; one of a microbatch that has not started is in the `fresh` heap and in
    `parked`. `touched` are the devices for which the best action may have changed.
    """

    def __init__(
        self,
        table: TaskTable,
        ranks: Sequence[int],
        gates: Sequence[int] | None,
        bound: int,
        num_devices: int,
        transfer_seconds: float = 0.0,
    ) -> None:
        self.bound = bound
        self._transfer_seconds = transfer_seconds
        # Actions of which something arrives later, and the moments at which they have it all.
        self._arrival: dict[int, float] = {}
        self._on_their_way: list[tuple[float, int]] = []
        self.orders: list[list[int]] = [[] for _ in range(num_devices)]
        self.sequence: list[int] = []  # all actions in the order of their starts
        # Maps a microbatch admitted after the first `bound` to the finished one that it replaces.
        self.follows: dict[int, int] = {}
        self._table = table
        self._rank = ranks
        self._with_rank = [0] * len(ranks)
        for i, rank in enumerate(ranks):
            self._with_rank[rank] = i
        self._gates = gates
        self._next_gates: list[list[int]] = [[] for _ in self.orders]
        if gates is not None:
            for i, number in enumerate(gates):
                self._next_gates[table.device[i]].append(number)
            for each in self._next_gates:
                each.sort()
        num_microbatches = 1 + max(table.microbatch, default=-1)
        self._ready: list[list[int]] = [[] for _ in self.orders]
        self._fresh: list[list[int]] = [[] for _ in self.orders]
        self._parked: list[list[int]] = [[] for _ in range(num_microbatches)]
        self._admitted = [False] * num_microbatches
        self._unfinished = [0] * num_microbatches
        for microbatch in table.microbatch:
            self._unfinished[microbatch] += 1
        self._missing = [len(needed) for needed in table.needs]
        self._free_slots = bound
        self._finished_microbatches: deque[int] = deque()
        self._idle = [True] * num_devices
        self._touched = set(range(num_devices))
        self._ends: list[tuple[float, int, int]] = []

    def run(self) -> None:
        """Simulates the devices until all actions have run."""
        for i, missing in enumerate(self._missing):
            if not missing:
                self._make_ready(i)
        now = 0.0
        ends = self._ends
        while True:
            self._start_all(now)
            if not ends and not self._on_their_way:
                if len(self.sequence) == len(self._rank):
                    return
                # All devices are idle, so only the bound prevents a ready action from starting.
                self.bound += 1
                self._free_slots += 1
                self._touch_fresh()
                continue
            first = min(heap[0][0] for heap in (ends, self._on_their_way) if heap)
            moment = first * _SAME_MOMENT
            while ends and ends[0][0] <= moment:
                now, _, i = heapq.heappop(ends)
                self._finish(i, now)
            while self._on_their_way and self._on_their_way[0][0] <= moment:
                now, i = heapq.heappop(self._on_their_way)
                self._make_ready(i)

    def _start_all(self, now: float) -> None:
        # Takes the best action over all idle devices, so that a free slot goes to the best
        # microbatch instead of the first device.
        choices: list[tuple[int, int]] = []
        self._offer(choices)
        while choices:
            rank, device = heapq.heappop(choices)
            if not self._idle[device]:
                continue
            best = self._choose(device)
            if best == rank:
                self._start(self._with_rank[rank], now)
                self._offer(choices)
            elif best is not None:  # what was offered has no slot any more
                heapq.heappush(choices, (best, device))

    def _offer(self, choices: list[tuple[int, int]]) -> None:
        """Adds the best action of each idle device for which it may have changed."""
        for device in self._touched:
            if self._idle[device]:
                best = self._choose(device)
                if best is not None:
                    heapq.heappush(choices, (best, device))
        self._touched.clear()

    def _choose(self, device: int) -> int | None:
        """Returns the rank of the best action that an idle device may start now; None if none."""
        ready, fresh = self._ready[device], self._fresh[device]
        best = ready[0] if ready else None
        if fresh:
            microbatch, number = self._table.microbatch, self._with_rank
            while fresh and self._admitted[microbatch[number[fresh[0]]]]:
                heapq.heappop(fresh)
            if fresh and (self._free_slots or self._finished_microbatches):
                best = fresh[0] if best is None else min(best, fresh[0])
        if best is None or self._gates is None:
            return best
        gate = self._next_gates[device][len(self.orders[device])]
        return best if self._gates[self._with_rank[best]] == gate else None

    def _start(self, i: int, now: float) -> None:
        """Starts an action on its device, and admits its microbatch if necessary."""
        device = self._table.device[i]
        if not self._admitted[self._table.microbatch[i]]:
            self._admit(self._table.microbatch[i])
        heapq.heappop(self._ready[device])
        self.orders[device].append(i)
        self._idle[device] = False
        heapq.heappush(self._ends, (now + self._table.seconds[i], len(self.sequence), i))
        self.sequence.append(i)

    def _admit(self, microbatch: int) -> None:
        if self._free_slots:
            self._free_slots -= 1
        else:
            self.follows[microbatch] = self._finished_microbatches.popleft()
        self._admitted[microbatch] = True
        for i in self._parked[microbatch]:
            self._make_ready(i)

    def _make_ready(self, i: int) -> None:
        device, microbatch = self._table.device[i], self._table.microbatch[i]
        if self._admitted[microbatch]:
            heapq.heappush(self._ready[device], self._rank[i])
        else:
            heapq.heappush(self._fresh[device], self._rank[i])
            self._parked[microbatch].append(i)
        self._touched.add(device)

    def _touch_fresh(self) -> None:
        """A microbatch may start: notes the devices that have one to start."""
        self._touched.update(device for device, fresh in enumerate(self._fresh) if fresh)

    def _finish(self, i: int, now: float) -> None:
        device, microbatch = self._table.device[i], self._table.microbatch[i]
        self._idle[device] = True
        self._touched.add(device)
        self._unfinished[microbatch] -= 1
        if not self._unfinished[microbatch]:
            self._finished_microbatches.append(microbatch)
            self._touch_fresh()
        missing = self._missing
        for dependent in self._table.dependents[i]:
            if self._transfer_seconds and self._table.device[dependent] != device:
                arrives = now + self._transfer_seconds
                self._arrival[dependent] = max(self._arrival.get(dependent, 0.0), arrives)
            missing[dependent] -= 1
            if not missing[dependent]:
                arrival = self._arrival.pop(dependent, now)
                if arrival > now:
                    heapq.heappush(self._on_their_way, (arrival, dependent))
                else:
                    self._make_ready(dependent)


def _releases(
    table: TaskTable, sequence: Sequence[int], follows: dict[int, int], num_devices: int
) -> list[tuple[int, int]]:
    """Returns pairs that make each microbatch wait for the one that it replaces.

    Without them the bound would hold only if the actions take as long as simulated: a device
    without backward passes, for example, could run arbitrarily far ahead.
    """
    if not follows:
        return []
    # All actions of a microbatch lie between its sources and its sinks, and a device runs its
    # actions in order, so the first source and the last sink per device suffice.
    first_source: dict[int, dict[int, int]] = {m: {} for m in follows}
    last_sink: dict[int, dict[int, int]] = {m: {} for m in follows.values()}
    microbatch = table.microbatch
    for i in sequence:
        device, own = table.device[i], microbatch[i]
        if own in first_source and all(microbatch[j] != own for j in table.needs[i]):
            first_source[own].setdefault(device, i)
        if own in last_sink and all(microbatch[j] != own for j in table.dependents[i]):
            last_sink[own][device] = i
    wanted = [
        (before, after)
        for entering, finished in sorted(follows.items())
        for (source, after), (sink, before) in product(
            sorted(first_source[entering].items()), sorted(last_sink[finished].items())
        )
        if source != sink
    ]
    return _not_implied(wanted, table, sequence, num_devices)


def _not_implied(
    pairs: Sequence[tuple[int, int]], table: TaskTable, sequence: Iterable[int], num_devices: int
) -> list[tuple[int, int]]:
    """Returns the pairs (before, after) that neither dependencies nor device orders imply.

    Often `after` already waits, directly or through earlier actions of its device, for a later
    action of the device of `before`. A device's clock has the number of actions of each device
    that have ended when its latest action starts (Mattern, "Virtual Time and Global States of
    Distributed Systems", 1989). An action's clock is kept only until its last reader has it.
    """
    if not pairs:
        return []
    device = table.device
    afters: dict[int, list[int]] = {}
    for index, (_, after) in enumerate(pairs):
        afters.setdefault(after, []).append(index)
    place = [0] * len(device)  # position on its device, from 1
    clocks = np.zeros((num_devices, num_devices), dtype=np.int32)
    counts = [0] * num_devices
    sent: dict[int, tuple[NDArray[np.int32], int]] = {}  # clock and readers to come
    kept = []
    for i in sequence:
        home = device[i]
        clock = clocks[home]
        clock[home] = counts[home]
        for j in table.needs[i]:
            other = device[j]
            if other != home:
                theirs, readers = sent.pop(j)
                if readers > 1:
                    sent[j] = theirs, readers - 1
                np.maximum(clock, theirs, out=clock)
        counts[home] = place[i] = counts[home] + 1
        for index in afters.get(i, ()):
            before = pairs[index][0]
            if clock[device[before]] < place[before]:
                kept.append(index)
        readers = sum([device[k] != home for k in table.dependents[i]])
        if readers:
            theirs = clock.copy()
            theirs[home] = place[i]
            sent[i] = theirs, readers
    return [pairs[index] for index in sorted(kept)]
