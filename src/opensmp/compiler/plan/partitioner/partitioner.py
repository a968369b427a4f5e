"""The automatic partitioner: cuts a graph of units into partitions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.cost_model import evaluate
from opensmp.compiler.plan.partitioner.baselines import evenly_full_runs, simple_runs
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
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.config.recompute import AUTO, FULL, NONE, SELECTIVE
from opensmp.errors import PlanError

Assignment = NDArray[np.int64]

# Peaks within this fraction of the least possible count as equally good.
MEMORY_TOLERANCE = 0.02

# Search effort, as counts instead of times: the same graph gets the same plan.
_MOST_UNITS_TO_MIX = 400  # with more units, details matter little
_MOST_UNITS_TO_CUT_CONNECTED = 1500
_MOST_IDEALS = 600
_NUM_LOOSE = 8
_NUM_ELITES, _NUM_ELITES_OF_MANY = 6, 2
_MOST_ROUNDS, _MOST_ROUNDS_OF_MANY = 6, 3


def partition_units(graph: CoarseGraph, num_partitions: int, settings: PlanSettings) -> Assignment:
    """Assigns units to partitions, minimizing the step time or the peak memory.

    Several topological orders are cut optimally by dynamic programming; the best results are
    improved by local search, and cut again along orders that follow them. `evaluate` decides
    throughout, also about baselines such as runs of equal unit count
    (`opensmp.compiler.plan.partitioner.baselines`): the result is never worse than a valid
    baseline. For a chain it is optimal as long as there are few enough possible cuts to try all.

    Args:
        graph: The graph to cut.
        num_partitions: Number of partitions, >= 1. No partition stays empty, unless there are fewer
            units than partitions: then each unit has its own partition and the last partitions are
            empty (`Prediction.empty_partitions`).
        settings: What to optimize, and for which machine.

    Returns:
        The partition of each unit, of shape (len(graph),), identical on every machine and in every
            process.
    """
    optimize, contiguous = settings.optimize, settings.contiguous
    faults = [
        f"{name} is an integer >= 1, received {value!r}"
        for name, value in (
            ("num_partitions", num_partitions),
            ("microbatches", settings.microbatches),
        )
        if value < 1
    ]
    if optimize not in ("memory", "speed"):
        faults.append(f"optimize is 'memory' or 'speed', received {optimize!r}")
    if faults:
        raise PlanError(f"Plan: {'; '.join(faults)}.")
    if not len(graph):
        return np.zeros(0, dtype=np.int64)
    if settings.recompute == AUTO:
        return _with_least_recomputation(graph, num_partitions, settings)
    problem = price(graph, num_partitions, settings)
    placed = _solve(problem, optimize, contiguous)
    if contiguous and _excess(problem, placed):
        placed = _solve(problem, optimize, contiguous=False)
    if _excess(problem, placed):
        placed = _where_few_are_held(graph, placed, num_partitions, settings)
    return placed


def _where_few_are_held(
    graph: CoarseGraph, placed: Assignment, num_partitions: int, settings: PlanSettings
) -> Assignment:
    """Returns a plan that fits because some partitions hold fewer microbatches than are in flight.

    The search counts all partitions alike; here runs of units are as long as their own memory asks
    for.
    """
    cap = settings.machine.memory_bytes
    assert cap is not None
    found = [placed, evenly_full_runs(graph, num_partitions, settings)]

    def peak(plan: Assignment) -> int:
        return max(evaluate(graph, plan, num_partitions, settings, by_schedule=True).peak_bytes)

    fitting = [plan for plan in found if peak(plan) <= cap]
    if not fitting:
        raise PlanError(describe_shortage(graph, min(found, key=peak), num_partitions, settings))
    return min(
        fitting, key=lambda plan: evaluate(graph, plan, num_partitions, settings).step_seconds
    )


def _with_least_recomputation(
    graph: CoarseGraph, num_partitions: int, settings: PlanSettings
) -> Assignment:
    """Returns a plan for the lowest level with which one fits the memory."""
    for level in (NONE, SELECTIVE):
        try:
            return partition_units(graph, num_partitions, replace(settings, recompute=level))
        except PlanError:
            if settings.machine.memory_bytes is None:
                raise
    return partition_units(graph, num_partitions, replace(settings, recompute=FULL))


def _excess(problem: Problem, placed: Assignment) -> int:
    return problem.score(placed).excess_bytes


def _solve(problem: Problem, optimize: str, contiguous: bool) -> Assignment:
    """Returns the best plan found; it exceeds the memory only if all plans found do."""
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
    """Returns assignments from best to worst; the best is at least as good as all of `starts`."""
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
    """Improves assignments by local search and repeated cuts; returns them from best to worst."""
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
    """Cuts an order; large problems are cut without the connectivity rule and then repaired."""
    exact = len(problem) <= _MOST_UNITS_TO_CUT_CONNECTED
    plans = cut_order(problem, order, best, contiguous=contiguous and exact, near=near)
    if contiguous and not exact:
        plans = [join_pieces(problem, plan) for plan in sorted(plans, key=problem.score)[:1]]
    return plans


class _Found:
    """Distinct assignments, ranked by score."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._scores: dict[bytes, tuple[Score, int, Assignment]] = {}

    def add(self, *assignments: Assignment) -> None:
        for placed in assignments:
            score = self._problem.score(placed)
            self._scores.setdefault(placed.tobytes(), (score, len(self._scores), placed))

    @property
    def ranked(self) -> list[Assignment]:
        """The assignments from best to worst; of equal ones, the first found comes first."""
        return [entry[2] for entry in sorted(self._scores.values(), key=lambda e: e[:2])]

    @property
    def best(self) -> Score:
        """The best score; the worst possible score if nothing has been found."""
        if not self._scores:
            return Score(0, 2**62, 0)
        return min(entry[0] for entry in self._scores.values())
