"""Plans for models that share variables which an earlier model has already placed.

Units that read such a variable are pinned to its partition; the rest is cut around them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.partitioner.local_search import refine
from opensmp.compiler.plan.partitioner.partitioner import MEMORY_TOLERANCE
from opensmp.compiler.plan.partitioner.problem import Problem, Score, price
from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph
from opensmp.compiler.trace.trace import TracedGraph

_logger = logging.getLogger("opensmp")
_NUM_REFINED = 4
_NUM_NAMED = 4
# Warn if a step takes this many times as long as without pinned units.
_SLOW = 1.5

Assignment = NDArray[np.int64]


def kept_units(traced: TracedGraph, graph: CoarseGraph, homes: Mapping[int, int]) -> dict[int, int]:
    """Returns the units that read placed variables, with the partition of most of their bytes."""
    unit_of = {name: unit for unit, names in enumerate(graph.operations) for name in names}
    weights: dict[int, dict[int, int]] = {}
    for leaf in traced.variables:
        if id(leaf.variable) not in homes:
            continue
        home, tensor = homes[id(leaf.variable)], leaf.placeholder
        size = 1 + tensor.dtype.size * (tensor.shape.num_elements() or 0)
        for unit in {unit_of[op.name] for op in tensor.consumers() if op.name in unit_of}:
            found = weights.setdefault(unit, {})
            found[home] = found.get(home, 0) + size
    return {
        unit: min(found, key=lambda home: (-found[home], home))
        for unit, found in sorted(weights.items())
    }


def partition_around(
    graph: CoarseGraph,
    kept: Mapping[int, int],
    num_partitions: int,
    settings: PlanSettings,
    free: Assignment,
) -> Assignment:
    """Assigns the units that are not pinned to partitions.

    Tensors may go back to lower partitions, and partitions may consist of several pieces. As few
    partitions as possible stay empty.
    """
    # More partitions than units are possible: some stay empty.
    problem = replace(price(graph, num_partitions, settings), num_partitions=num_partitions)
    starts = list(_starts(graph, kept, num_partitions, free))
    if settings.optimize == "memory":
        least = _best(replace(problem, minimise_bytes=True), kept, starts)
        cap = int(problem.loads(least)[1].max() * (1 + MEMORY_TOLERANCE))
        problem, starts = replace(problem, memory_bytes=cap), [least, *starts]
    return _best(problem, kept, starts)


def tell_of_kept(plan: Plan, kept: Mapping[int, int], free: Assignment) -> None:
    """Logs which layers are pinned, as a warning if that makes the plan much slower."""
    if not kept:
        return
    layers = list(dict.fromkeys(plan.costs.names[unit] for unit in kept))
    more = f" and {len(layers) - _NUM_NAMED} more" if len(layers) > _NUM_NAMED else ""
    named = ", ".join(map(repr, layers[:_NUM_NAMED])) + more
    seconds, without = plan.prediction.step_seconds, plan.predict(free).step_seconds
    if seconds <= _SLOW * without:
        _logger.info("model '%s': %s stay where they were put before.", plan.model, named)
        return
    _logger.warning(
        "model '%s': %s stay where an earlier model, or a part of this one, has put them. The "
        "results are right, but a step is expected to take %.1f times as long as with a plan made "
        "for this model alone. For such a plan, make it of a copy of the earlier model: copy = "
        "keras.models.clone_model(earlier); copy.set_weights(earlier.get_weights()).",
        plan.model,
        named,
        seconds / without if without else 1.0,
    )


def _starts(
    graph: CoarseGraph, kept: Mapping[int, int], num_partitions: int, free: Assignment
) -> Iterable[Assignment]:
    """Yields initial assignments."""

    def keeping(placed: Assignment) -> Assignment:
        placed = placed.copy()
        for unit, partition in kept.items():
            placed[unit] = partition
        return placed

    for shift in range(num_partitions):
        yield keeping((free + shift) % num_partitions)
    for partition in range(num_partitions):
        yield keeping(np.full(len(graph), partition, dtype=np.int64))
    yield _beside(graph, kept)


def _beside(graph: CoarseGraph, kept: Mapping[int, int]) -> Assignment:
    """Places each unit with one that it reads from; units before all pinned ones, with a reader."""
    placed = np.full(len(graph), -1, dtype=np.int64)
    for unit, partition in kept.items():
        placed[unit] = partition
    made_for: dict[int, list[int]] = {}
    for tensor in graph.tensors:
        for unit in tensor.consumers:
            made_for.setdefault(unit, []).append(tensor.producer)
    for unit in range(len(graph)):
        near = [placed[other] for other in made_for.get(unit, ()) if placed[other] >= 0]
        if placed[unit] < 0 and near:
            placed[unit] = max(near)
    for tensor in reversed(graph.tensors):  # ordered by their producers
        near = [placed[other] for other in tensor.consumers if placed[other] >= 0]
        if placed[tensor.producer] < 0 and near:
            placed[tensor.producer] = min(near)
    return np.where(placed < 0, 0, placed)


def _best(problem: Problem, kept: Mapping[int, int], starts: Iterable[Assignment]) -> Assignment:
    unique = list({placed.tobytes(): placed for placed in starts}.values())

    def rank(placed: Assignment) -> tuple[int, Score]:
        return problem.num_partitions - len(np.unique(placed)), problem.score(placed)

    ranked = sorted(unique, key=rank)[:_NUM_REFINED]
    ranked += [refine(problem, placed, None, kept) for placed in ranked]
    return min(ranked, key=rank)
