"""Optimal plans for small graphs, as a reference for the partitioner."""

from __future__ import annotations

import heapq
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.partitioner.connectivity import excess_pieces
from opensmp.compiler.plan.partitioner.dynamic_programming import Steps
from opensmp.compiler.plan.partitioner.ideals import (
    LatticeError,
    all_ideals,
    assignment_of,
    steps_between,
)
from opensmp.compiler.plan.partitioner.partitioner import MEMORY_TOLERANCE, partition_units
from opensmp.compiler.plan.partitioner.problem import Problem, price
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.errors import PlanError

Assignment = NDArray[np.int64]
Floats = NDArray[np.float64]

_MOST_NODES = 200_000


def optimal_units(
    graph: CoarseGraph,
    num_partitions: int,
    settings: PlanSettings,
    *,
    most_ideals: int = 3000,
) -> Assignment:
    """Returns an optimal assignment of units to partitions under the partitioner's rules.

    Dynamic programming over the ideals of the graph, under a bound on the slowest stage that starts
    at the result of `partition_units` and is lowered. It underestimates stages if several
    partitions read one tensor; a best-first search (A*) with exact costs uses it as a lower bound.

    Args:
        graph: The graph to cut.
        num_partitions: See `partition_units`.
        settings: See `partition_units`.
        most_ideals: Maximum number of ideals; time and memory grow with its square.

    Raises:
        LatticeError: If the graph is too large to guarantee the optimum.
        PlanError: If no plan fits the memory.

    Example:
        >>> best = optimal_units(graph, 2, PlanSettings(microbatches=8, optimize="speed"))
    """
    start: Assignment | None = None
    failure: PlanError | None = None
    try:
        start = partition_units(graph, num_partitions, settings)
    except PlanError as error:
        failure = error
    if not len(graph) or (failure and settings.machine.memory_bytes is None):
        return _result(start, failure)
    problem = price(graph, num_partitions, settings)
    lattice = all_ideals(problem, most_ideals)
    for connected in (True, False) if settings.contiguous else (False,):
        known = start
        if known is not None and connected and excess_pieces(problem, known):
            known = None
        best = _best(problem, lattice, settings.optimize, connected, known)
        if best is not None:
            return best
    return _result(None, failure)


def _result(best: Assignment | None, failure: PlanError | None) -> Assignment:
    if best is None:
        assert failure is not None
        raise failure
    return best


def _best(
    problem: Problem, lattice: list[int], optimize: str, connected: bool, known: Assignment | None
) -> Assignment | None:
    """Returns the best plan, connected if `connected`; None if none fits the memory."""
    memory = np.inf if problem.memory_bytes is None else float(problem.memory_bytes)
    most_ticks = np.inf
    if optimize == "memory" and known is not None:
        memory = min(memory, float(problem.loads(known)[1].max()))
    if optimize == "speed" and known is not None:
        most_ticks = _bound(problem, problem.score(known).cost)
    slack = 1 + MEMORY_TOLERANCE if optimize == "memory" else 1
    steps = steps_between(
        problem,
        lattice,
        connected=connected,
        most_ticks=most_ticks,
        most_bytes=memory * slack,
    )
    if optimize == "memory":
        least = steps.least(steps.bytes, problem.num_partitions, maximum=True)[-1][-1]
        if least > memory:
            return None
        cap = int(least * (1 + MEMORY_TOLERANCE))
        if problem.memory_bytes is not None:
            cap = min(cap, problem.memory_bytes)
        problem = replace(problem, memory_bytes=cap)
        steps = steps.where(steps.bytes <= cap)
        if known is not None and problem.score(known).excess_bytes:
            known = None
        if known is not None:
            steps = steps.where(steps.ticks <= _bound(problem, problem.score(known).cost))
    return _Fastest(problem, lattice, steps, known).search()


def _bound(problem: Problem, step: int) -> float:
    """Returns the maximum ticks of the slowest stage in a plan of at most `step` ticks per step."""
    if problem.microbatches == 1:
        return np.inf
    return float((step - int(problem.ticks.sum())) // (problem.microbatches - 1))


class _Fastest:
    """Search for the plan with the fastest step among chains of the given steps."""

    def __init__(
        self, problem: Problem, lattice: list[int], steps: Steps, known: Assignment | None
    ) -> None:
        self._problem, self._lattice, self._steps = problem, lattice, steps
        self._best = known
        self._step = np.inf if known is None else float(problem.score(known).cost)
        self._arithmetic = float(problem.ticks.sum())
        self._repeats = problem.microbatches - 1
        self._least = float(steps.least(steps.ticks, problem.num_partitions, maximum=True)[-1][-1])
        self._member = np.array(
            [[ideal >> unit & 1 for unit in range(len(problem))] for ideal in lattice], np.float64
        )
        ends = np.searchsorted(problem.links, np.arange(len(problem.homes) + 1))
        # Links whose home may receive several gradients: unit, ticks, bit mask of readers.
        self._wide = [
            (int(home), int(ticks), sum(1 << unit for unit in problem.readers[a:b].tolist()))
            for home, ticks, a, b in zip(
                problem.homes, problem.backward_ticks, ends[:-1], ends[1:], strict=True
            )
            if ticks and b - a > 1
        ]

    def search(self) -> Assignment | None:
        """Returns the fastest plan; None if there is none."""
        limit = np.inf
        if np.isfinite(self._step):
            limit = _bound(self._problem, int(self._step))
        while limit >= self._least:
            found = self._least_moved(limit)
            if found is None:
                break
            ticks, _ = self._problem.loads(found)
            step = float(self._problem.score(found).cost)
            if step < self._step:
                self._best, self._step = found, step
            if not self._repeats:
                break
            slowest = float(ticks.max())
            fixed = step - self._repeats * slowest
            limit = min(slowest - 1, (self._step - fixed - 1) // self._repeats)
        return self._best

    def _least_moved(self, limit: float) -> Assignment | None:
        """Returns the plan with the fewest transfers within the limit; None if none pays off."""
        steps = self._steps.where(self._steps.ticks <= limit)
        last, count = steps.num_cuts - 1, self._problem.num_partitions
        least = steps.least(steps.moved, count)
        begins = np.searchsorted(steps.stop, np.arange(steps.num_cuts + 1))
        heap: list[tuple[float, int, float, float, tuple[int, ...]]] = []
        heap.append((float(least[count][last]), 0, 0.0, self._least, (last,)))
        nodes = 0
        while heap:
            bound, _, moved, slowest, chain = heapq.heappop(heap)
            if self._cannot_pay(bound, slowest):
                continue
            left = count - len(chain) + 1
            if not left:
                placed = assignment_of([self._lattice[at] for at in chain], len(self._problem))
                if self._problem.loads(placed)[0].max() <= limit:
                    return placed
                continue
            to = slice(begins[chain[0]], begins[chain[0] + 1])
            starts = steps.start[to]
            ticks = steps.ticks[to] + self._extra(chain, starts)
            total = moved + steps.moved[to]
            bounds = total + least[left - 1][starts]
            for at in np.flatnonzero(np.isfinite(bounds) & (ticks <= limit)).tolist():
                nodes += 1
                worst = max(slowest, float(ticks[at]))
                if not self._cannot_pay(float(bounds[at]), worst):
                    chain_at = (int(starts[at]), *chain)
                    heapq.heappush(
                        heap, (float(bounds[at]), nodes, float(total[at]), worst, chain_at)
                    )
            if nodes > _MOST_NODES:
                raise LatticeError(
                    f"Plan: after {nodes} partial plans of this graph of {len(self._problem)} "
                    "units it is not sure which one is best; use partition_units."
                )
        return None

    def _cannot_pay(self, moved: float, slowest: float) -> bool:
        return self._arithmetic + moved + self._repeats * slowest >= self._step

    def _extra(self, chain: tuple[int, ...], starts: NDArray[np.int64]) -> Floats:
        """Ticks of gradients beyond the first of each link, for steps to `chain[0]`."""
        masks = [self._lattice[ideal] for ideal in chain]
        stages = [b & ~a for a, b in pairwise(masks)]
        extra = np.zeros(len(self._problem))
        for home, ticks, readers in self._wide:
            count = sum(1 for stage in stages if stage & readers)
            extra[home] += ticks * max(0, count - 1)
        weight = self._member @ extra
        return np.asarray(weight[chain[0]] - weight[starts])
