"""Dynamic programming over steps from one cut to a later one: finds the best chain of cuts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.partitioner.problem import Problem, Score

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_MOST_LIMITS = 40


@dataclass(frozen=True, eq=False)
class Steps:
    """Possible partitions, each a step from a cut to a later one. One entry per step.

    Cut 0 is before all units, the last cut after all. Costs are integers stored in float64.

    Attributes:
        num_cuts: Number of cuts.
        start: The earlier cut.
        stop: The later cut; ascending.
        ticks: Lower bound on the stage time of the units in between: if several later partitions
            read one tensor, only one of its gradients is counted.
        moved: Cost of receiving tensors, and of sending their gradients back.
        bytes: Memory of the partition.
    """

    num_cuts: int
    start: Integers
    stop: Integers
    ticks: Floats
    moved: Floats
    bytes: Floats

    def where(self, keep: NDArray[np.bool_]) -> Steps:
        """Returns the steps that a mask selects."""
        return Steps(
            self.num_cuts,
            self.start[keep],
            self.stop[keep],
            self.ticks[keep],
            self.moved[keep],
            self.bytes[keep],
        )

    def cuts(self, chain: Integers) -> Integers:
        """Returns the cuts of a chain of steps, including the first and the last."""
        return np.append(self.start[chain], self.num_cuts - 1)

    def least(self, weight: Floats, count: int, *, maximum: bool = False) -> list[Floats]:
        """Returns the least sum (or maximum) of weights over chains of up to `count` steps.

        For each number of steps, from 0, an array with one entry per cut at which a chain from cut
        0 ends.
        """
        stops, begins = np.unique(self.stop, return_index=True)
        combine = np.maximum if maximum else np.add
        value = np.full(self.num_cuts, np.inf)
        value[0] = 0
        values = [value]
        for _ in range(count):
            value = np.full(self.num_cuts, np.inf)
            if len(stops):
                value[stops] = np.minimum.reduceat(combine(values[-1][self.start], weight), begins)
            values.append(value)
        return values

    def best_chain(self, weight: Floats, count: int) -> Integers | None:
        """Returns the steps of the least sum from the first to the last cut; None if none."""
        values = self.least(weight, count)
        if not np.isfinite(values[-1][-1]):
            return None
        cut, chain = self.num_cuts - 1, []
        for value in reversed(values[:-1]):
            first, last = np.searchsorted(self.stop, [cut, cut + 1])
            costs = value[self.start[first:last]] + weight[first:last]
            chain.append(int(first + costs.argmin()))
            cut = int(self.start[chain[-1]])
        return np.array(chain[::-1], dtype=np.int64)


def best_chains(problem: Problem, steps: Steps, best: Score) -> Iterator[Integers]:
    """Yields chains of cuts, from first to last, that are good for the objective of a problem."""
    if problem.minimise_bytes:
        return _fewest_bytes(problem, steps)
    return _least_time(problem, steps, best)


def most_ticks(problem: Problem, best: Score, *, slack: bool = True) -> float:
    """Returns the most stage ticks of plans as fast as the best known, or a little slower."""
    if problem.minimise_bytes or problem.microbatches == 1 or best.excess_bytes:
        return np.inf
    step = best.cost + best.cost // 16 if slack else best.cost
    return float((step - int(problem.ticks.sum())) // (problem.microbatches - 1))


def most_bytes(problem: Problem, best: Score) -> float:
    """Returns the maximum bytes of a partition, analogous to `most_ticks`."""
    if problem.minimise_bytes:
        return float(best.cost + best.cost // 16)
    return np.inf if problem.memory_bytes is None else float(problem.memory_bytes)


def _least_time(problem: Problem, steps: Steps, best: Score) -> Iterator[Integers]:
    """Lowers the bound on the slowest stage repeatedly, minimizing transfers under each bound.

    As in Alpa, but a bound that cannot pay off is skipped: a tighter bound never reduces transfers,
    so it has to make up for the difference to the best plan so far.
    """
    arithmetic, repeats = float(problem.ticks.sum()), problem.microbatches - 1
    steps = steps.where(steps.bytes <= most_bytes(problem, best))
    limit, fastest = most_ticks(problem, best), np.inf
    for _ in range(_MOST_LIMITS):
        steps = steps.where(steps.ticks <= limit)
        chain = steps.best_chain(steps.moved, problem.num_partitions)
        if chain is None:
            return
        yield steps.cuts(chain)
        if not repeats:
            return
        slowest = float(steps.ticks[chain].max())
        fixed = arithmetic + float(steps.moved[chain].sum())
        fastest = min(fastest, fixed + repeats * slowest)
        limit = min(slowest - 1, (fastest - fixed - 1) // repeats)


def _fewest_bytes(problem: Problem, steps: Steps) -> Iterator[Integers]:
    """Minimizes the fullest partition, then the transfers under that bound."""
    count = problem.num_partitions
    fullest = steps.least(steps.bytes, count, maximum=True)[-1][-1]
    steps = steps.where(steps.bytes <= fullest)
    chain = steps.best_chain(steps.moved, count)
    if chain is not None:
        yield steps.cuts(chain)
