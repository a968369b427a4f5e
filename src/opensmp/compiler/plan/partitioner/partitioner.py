"""Cuts a graph of units into partitions: the plan when nobody says how to cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.cost_model import microbatches_in_flight
from opensmp.compiler.plan.partitioner.baselines import simple_runs
from opensmp.compiler.plan.partitioner.connectivity import Neighbourhood, excess_pieces, join_pieces
from opensmp.compiler.plan.partitioner.ideals import (
    LatticeError,
    all_ideals,
    cut_lattice,
    ideals_near,
)
from opensmp.compiler.plan.partitioner.interval_cuts import cut_order
from opensmp.compiler.plan.partitioner.local_search import refine
from opensmp.compiler.plan.partitioner.memory_advice import describe_shortage
from opensmp.compiler.plan.partitioner.problem import Problem, Score, price
from opensmp.compiler.plan.partitioner.topological_orders import Order, follow, topological_orders
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph, Machine
from opensmp.errors import PlanError

Assignment = NDArray[np.int64]

# Plans whose fullest device is this much fuller than the least possible are as good.
MEMORY_TOLERANCE = 0.02

# How hard to try. All are counts, not times: the same graph gets the same plan.
_MOST_UNITS_TO_MIX = 400  # above, there are so many units that the details matter little
_MOST_UNITS_TO_CUT_CONNECTED = 1500
_MOST_IDEALS = 600
_NUM_LOOSE = 8
_NUM_ELITES, _NUM_ELITES_OF_MANY = 6, 2
_MOST_ROUNDS, _MOST_ROUNDS_OF_MANY = 6, 3


def partition_units(
    graph: CoarseGraph,
    num_partitions: int,
    machine: Machine,
    microbatches: int,
    *,
    optimize: str = "memory",
    contiguous: bool = True,
    pipeline: str = "interleaved",
    active_microbatches: int | None = None,
) -> Assignment:
    """Assigns units to partitions so that a step is fast, or the fullest device small.

    Many topological orders are each cut at their best places by dynamic programming; the
    best results are improved unit by unit, and cut again along orders that follow them.
    What `evaluate` says decides throughout, also about simple plans such as runs of equally
    many units (`opensmp.compiler.plan.partitioner.baselines`): the result is never worse than one
    of these that keeps to the rules. For a chain it is the optimum, as long as there are few enough
    places to cut to look at all.

    Args:
        graph: What to cut.
        num_partitions: Number of partitions, >= 1. No partition stays empty, unless there
            are fewer units than partitions: then each unit has a partition of its own and
            the last partitions are empty (`Prediction.empty_partitions`).
        machine: Speed and memory of the devices. No partition is larger than the memory.
        microbatches: Microbatches of a step, >= 1.
        optimize: `"speed"` makes the step as fast as it gets. `"memory"` makes the fullest
            device as small as it gets, and among plans within 2 % of that the step as fast.
        contiguous: Whether every partition is a connected piece of the graph (of each part
            of it, if the graph itself is not connected). Given up if no such plan is found
            to fit the memory.
        pipeline: See `evaluate`.
        active_microbatches: See `evaluate`.

    Returns:
        The partition of each unit, of shape (len(graph),): the same on every machine and
        in every process.

    Raises:
        PlanError: If no plan is found that fits the memory: says how much is missing, and
            what would help. Also if an argument is not one of the above.

    Example:
        >>> placed = partition_units(graph, 4, Machine(), microbatches=8, optimize="speed")
        >>> evaluate(graph, placed, 4, Machine(), microbatches=8).step_seconds
    """
    faults = [
        f"{name} is an integer >= 1, received {value!r}"
        for name, value in (("num_partitions", num_partitions), ("microbatches", microbatches))
        if value < 1
    ]
    if optimize not in ("memory", "speed"):
        faults.append(f"optimize is 'memory' or 'speed', received {optimize!r}")
    if faults:
        raise PlanError(f"Plan: {'; '.join(faults)}.")
    held = microbatches_in_flight(num_partitions, microbatches, pipeline, active_microbatches)
    used = min(num_partitions, len(graph))
    if not used:
        return np.zeros(0, dtype=np.int64)
    problem = price(graph, used, machine, microbatches, held)
    placed = _solve(problem, optimize, contiguous)
    if contiguous and _excess(problem, placed):
        placed = _solve(problem, optimize, contiguous=False)
    if _excess(problem, placed):
        raise PlanError(
            describe_shortage(
                graph, placed, num_partitions, machine, microbatches, pipeline, active_microbatches
            )
        )
    return placed


def partition_for(graph: CoarseGraph, num_partitions: int, settings: PlanSettings) -> Assignment:
    """As `partition_units`, for what a plan is made for.

    Args:
        graph: What to cut.
        num_partitions: Number of partitions, >= 1.
        settings: What to cut it for.

    Raises:
        PlanError: As `partition_units` does.
    """
    return partition_units(
        graph,
        num_partitions,
        settings.machine,
        settings.microbatches,
        optimize=settings.optimize,
        contiguous=settings.contiguous,
        pipeline=settings.pipeline,
        active_microbatches=settings.active_microbatches,
    )


def _excess(problem: Problem, placed: Assignment) -> int:
    return problem.score(placed).excess_bytes


def _solve(problem: Problem, optimize: str, contiguous: bool) -> Assignment:
    """The best plan found; above the cap only if all that were found are."""
    cap = problem.memory_bytes
    starts = simple_runs(problem)
    if optimize == "memory" or cap is not None:
        starts = _search(replace(problem, minimise_bytes=True), contiguous, starts)
        least = int(problem.loads(starts[0])[1].max())
        if cap is not None and least > cap:
            return starts[0]
        if optimize == "memory":
            near_least = int(least * (1 + MEMORY_TOLERANCE))
            cap = near_least if cap is None else min(cap, near_least)
    return _search(replace(problem, memory_bytes=cap), contiguous, starts)[0]


def _search(problem: Problem, contiguous: bool, starts: Iterable[Assignment]) -> list[Assignment]:
    """Assignments from best to worst; the best is as good as all of `starts` at least."""
    orders = topological_orders(problem)
    loose = _Found(problem)
    loose.add(*starts)
    for order in orders:
        loose.add(*cut_order(problem, order, loose.best, contiguous=False))
    if not contiguous:
        return _improve(problem, loose, orders, None)
    found = _Found(problem)
    for placed in (*starts, *loose.ranked[:_NUM_LOOSE]):
        found.add(join_pieces(problem, placed) if excess_pieces(problem, placed) else placed)
    for order in orders:
        found.add(*_cut(problem, order, found.best, contiguous=True))
    return _improve(problem, found, orders, Neighbourhood(problem))


def _improve(
    problem: Problem, found: _Found, orders: list[Order], near: Neighbourhood | None
) -> list[Assignment]:
    contiguous = near is not None
    small = len(problem) <= _MOST_UNITS_TO_MIX
    num_elites = _NUM_ELITES if small else _NUM_ELITES_OF_MANY
    lattice: list[int] = []
    if small:
        try:
            lattice = all_ideals(problem, _MOST_IDEALS)
            found.add(*cut_lattice(problem, lattice, found.best, contiguous=contiguous))
        except LatticeError:
            pass
    for placed in found.ranked[:num_elites]:
        found.add(refine(problem, placed, near))
    for _ in range(_MOST_ROUNDS if small else _MOST_ROUNDS_OF_MANY):
        best = found.ranked[0]
        for order in orders:
            along = follow(best, order)
            cuts = np.searchsorted(best[along], np.arange(1, problem.num_partitions))
            found.add(*_cut(problem, along, found.best, contiguous=contiguous, near=cuts))
        if small and not lattice:
            mixed = ideals_near(problem, found.ranked[:_NUM_ELITES], orders, _MOST_IDEALS)
            found.add(*cut_lattice(problem, mixed, found.best, contiguous=contiguous))
        found.add(refine(problem, found.ranked[0], near))
        if found.ranked[0] is best:
            break
    return found.ranked


def _cut(
    problem: Problem,
    order: Order,
    best: Score,
    *,
    contiguous: bool,
    near: NDArray[np.int64] | None = None,
) -> list[Assignment]:
    exact = len(problem) <= _MOST_UNITS_TO_CUT_CONNECTED
    plans = cut_order(problem, order, best, contiguous=contiguous and exact, near=near)
    if contiguous and not exact:
        plans = [join_pieces(problem, plan) for plan in sorted(plans, key=problem.score)[:1]]
    return plans


class _Found:
    """Different assignments, ranked."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._scores: dict[bytes, tuple[Score, int, Assignment]] = {}

    def add(self, *assignments: Assignment) -> None:
        for placed in assignments:
            score = self._problem.score(placed)
            self._scores.setdefault(placed.tobytes(), (score, len(self._scores), placed))

    @property
    def ranked(self) -> list[Assignment]:
        """From best to worst; of equals, the one found first."""
        return [entry[2] for entry in sorted(self._scores.values(), key=lambda e: e[:2])]

    @property
    def best(self) -> Score:
        """The best score; the worst there is if nothing has been found."""
        if not self._scores:
            return Score(0, 2**62, 0)
        return min(entry[0] for entry in self._scores.values())
