"""Enumerates the cuts of a small graph, and the costs of the units between any two of them.

A cut without backward edges is an ideal: a set of units that contains all predecessors of its
members. A plan is a chain of nested ideals.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import or_

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.partitioner.connectivity import Neighbourhood
from opensmp.compiler.plan.partitioner.dynamic_programming import (
    Steps,
    best_chains,
    most_bytes,
    most_ticks,
)
from opensmp.compiler.plan.partitioner.problem import Problem, Score
from opensmp.compiler.plan.partitioner.topological_orders import Order, follow
from opensmp.errors import PlanError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_CHUNK = 50_000


class LatticeError(PlanError):
    """The graph has too many ideals to enumerate."""


def all_ideals(problem: Problem, most: int) -> list[int]:
    """Returns all ideals as bit masks of units, by size, starting with the empty one."""
    size = len(problem)
    needs = [sum(1 << other for other in units) for units in problem.predecessors]
    found, layer = [0], [0]
    for _ in range(size):
        layer = sorted(
            {
                ideal | 1 << unit
                for ideal in layer
                for unit in range(size)
                if not ideal >> unit & 1 and needs[unit] & ~ideal == 0
            }
        )
        found.extend(layer)
        if len(found) > most:
            raise LatticeError(
                f"Plan: this graph of {size} units has more than {most} ways to cut it in two, "
                "too many to find the best plan for sure; use partition_units."
            )
    return found


def ideals_near(
    problem: Problem, plans: Sequence[Integers], orders: Sequence[Order], most: int
) -> list[int]:
    """Returns about `most` ideals that are close to the cuts of some plans.

    Along every order that follows a plan, these are the ideals at each cut and those with one, two,
    ... units more or fewer.
    """
    size = len(problem)
    found = {0, (1 << size) - 1}
    walks = []
    for plan in plans:
        for order in orders:
            along = follow(plan, order)
            masks = list(accumulate((1 << unit for unit in along.tolist()), or_, initial=0))
            cuts = np.searchsorted(plan[along], np.arange(1, problem.num_partitions)).tolist()
            walks.append((masks, cuts))
    for radius in range(size):
        for masks, cuts in walks:
            for cut in cuts:
                found.add(masks[max(cut - radius, 0)])
                found.add(masks[min(cut + radius, size)])
            if len(found) >= most:
                return sorted(found, key=lambda ideal: (ideal.bit_count(), ideal))
    return sorted(found, key=lambda ideal: (ideal.bit_count(), ideal))


def cut_lattice(
    problem: Problem, ideals: list[int], best: Score, *, contiguous: bool
) -> list[Integers]:
    """Returns assignments whose cuts are among the given ideals, good for the objective."""
    steps = steps_between(
        problem,
        ideals,
        connected=contiguous,
        most_ticks=most_ticks(problem, best),
        most_bytes=most_bytes(problem, best),
    )
    return [
        assignment_of([ideals[cut] for cut in cuts], len(problem))
        for cuts in best_chains(problem, steps, best)
    ]


def assignment_of(chain: Sequence[int], size: int) -> Integers:
    """Returns the assignment whose cuts are a chain of ideals, including the first and the last."""
    placed = np.zeros(size, dtype=np.int64)
    for ideal in chain[1:-1]:
        placed += [1 - (ideal >> unit & 1) for unit in range(size)]
    return placed


def steps_between(
    problem: Problem,
    ideals: list[int],
    *,
    connected: bool,
    most_ticks: float = np.inf,
    most_bytes: float = np.inf,
) -> Steps:
    """Returns all steps between two of the given ideals within the cost limits.

    The cost of a step is a sum over all links of products of a property of its start and a property
    of its stop, so matrix products compute it for all steps at once. The ideals are distinct, the
    empty one first and the whole graph last, each after its subsets. With `connected`, steps whose
    units are disconnected are dropped.
    """
    size = len(problem)
    member = np.array([[ideal >> u & 1 for u in range(size)] for ideal in ideals], np.float64)
    home = member[:, problem.homes]
    receive = _Received(home, *_readers_inside(problem, member))
    send = _Sent(problem, home, member)
    keep = member @ (1 - member).T == 0
    np.fill_diagonal(keep, False)
    ticks = (
        _between(member @ problem.ticks)
        + receive(problem.forward_ticks)
        + send(problem.backward_ticks)
    )
    keep &= ticks <= most_ticks
    held = (
        _between(member @ problem.bytes)
        + receive(problem.received_bytes)
        + send(problem.sent_bytes)
    )
    keep &= held <= most_bytes
    stop, start = np.nonzero(keep.T)
    moved = receive(problem.forward_ticks + problem.backward_ticks)
    at = (start, stop)
    steps = Steps(len(ideals), start, stop, ticks[at], moved[at], held[at])
    if connected:
        steps = steps.where(_connected(problem, member == 1, steps))
    return steps


def _connected(problem: Problem, member: NDArray[np.bool_], steps: Steps) -> NDArray[np.bool_]:
    """Returns whether the units of each step are connected, within each component of the graph."""
    near = Neighbourhood(problem)
    part = np.array(near.part)
    pairs = sorted({(a, b) for a in range(len(problem)) for b in near.of(a) if b < a})
    results = []
    for begin in range(0, len(steps.start), _CHUNK):
        chunk = slice(begin, begin + _CHUNK)
        inside = (member[steps.stop[chunk]] & ~member[steps.start[chunk]]).T.copy()
        reached = np.zeros_like(inside)
        for name in np.unique(part):
            members = np.flatnonzero(part == name)
            lowest = members[inside[members].argmax(axis=0)]
            reached[lowest, np.arange(inside.shape[1])] = True
        reached &= inside
        count = -1
        while count != (now := int(np.count_nonzero(reached))):
            count = now
            for unit, other in (*pairs, *reversed(pairs)):
                both = (reached[unit] | reached[other]) & inside[unit] & inside[other]
                reached[unit] |= both
                reached[other] |= both
        results.append((reached == inside).all(axis=0))
    return np.concatenate([np.zeros(0, dtype=np.bool_), *results])


def _between(weight: Floats) -> Floats:
    return np.asarray(weight[None, :] - weight[:, None])


def _readers_inside(problem: Problem, member: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Returns the distinct reader sets of each link within ideals, and the set of each ideal.

    The sets are 0/1 of shape (ideals, sets), with the link of each.
    """
    columns, link_of = [], []
    for link in range(len(problem.homes)):
        inside = member[:, problem.readers_of(link)]
        kinds, which = np.unique(inside, axis=0, return_inverse=True)
        columns.append(np.eye(len(kinds))[which.reshape(-1)])
        link_of.extend([link] * len(kinds))
    if not columns:
        return np.zeros((len(member), 0)), np.zeros(0, dtype=np.int64)
    return np.concatenate(columns, axis=1), np.array(link_of, dtype=np.int64)


class _Received:
    """Sums the weights of links that a step receives: home outside, some reader inside the step."""

    def __init__(self, home: Floats, read: Floats, link_of_read: NDArray[np.int64]) -> None:
        self._home, self._read, self._link = home, read, link_of_read

    def __call__(self, weight: NDArray[np.int64]) -> Floats:
        # A reader is inside if the reader sets of start and stop differ. The home is outside if it
        # is in the start, or not in the stop.
        outside = _outside(self._home, weight)
        home, each = self._home[:, self._link], weight[self._link]
        read = self._read
        same = (read * (1 + home) * each) @ read.T - (read * each) @ (read * home).T
        return np.asarray(outside - same)


def _outside(home: Floats, weight: NDArray[np.int64]) -> Floats:
    return np.asarray(weight.sum() - _between(home @ weight))


class _Sent:
    """Sums the weights of links that a step sends: home inside, some reader outside the step."""

    def __init__(self, problem: Problem, home: Floats, member: Floats) -> None:
        self._home = home
        count = np.zeros((len(member), len(problem.homes)))
        np.add.at(count.T, problem.links, member.T[problem.readers])
        total = np.bincount(problem.links, minlength=len(problem.homes))
        self._none, self._all = count == 0, count == total

    def __call__(self, weight: NDArray[np.int64]) -> Floats:
        # Home and all readers are inside if none of them is in the start and all are in the stop.
        start, stop = self._none & (self._home == 0), self._all & (self._home == 1)
        return np.asarray(_between(self._home @ weight) - (start * weight) @ stop.T.astype(float))
