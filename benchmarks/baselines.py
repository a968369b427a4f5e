"""Other ways to cut a graph of units, for comparison: each knows less than the objective."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opensmp.compiler.plan.cost_model import seconds_to_move
from opensmp.compiler.plan.partitioner.baselines import block_runs
from opensmp.compiler.plan.partitioner.problem import price
from opensmp.compiler.plan.settings import PlanSettings
from opensmp.compiler.plan.unit_graph import CoarseGraph, Machine

try:
    import pymetis
except ImportError:  # the comparison goes without it
    pymetis = None

Assignment = NDArray[np.int64]

# METIS takes whole numbers, and adds them up in 32 bits.
_MOST_WEIGHT = 10**8


def equal_layers(graph: CoarseGraph, num_partitions: int) -> Assignment:
    """Runs of equally many units, as when a list of layers is split by its length."""
    used = min(num_partitions, len(graph))
    return np.arange(len(graph), dtype=np.int64) * used // len(graph)


def block_partition(graph: CoarseGraph, num_partitions: int, machine: Machine) -> Assignment:
    """Runs of units of about equal time: what torchgpipe does with measured times."""
    used = min(num_partitions, len(graph))
    return block_runs(price(graph, used, PlanSettings(machine=machine)).ticks, used)


def metis(graph: CoarseGraph, num_partitions: int, machine: Machine) -> Assignment | None:
    """METIS on the same graph, times as weights; repaired so that tensors only go forward.

    Returns:
        None if `pymetis` is not installed.
    """
    if pymetis is None:
        return None
    size = len(graph)
    times = graph.forward_seconds + graph.backward_seconds
    pairs: dict[tuple[int, int], float] = {}
    for tensor in graph.tensors:
        cost = seconds_to_move(machine, tensor.forward_bytes)
        if tensor.backward_bytes:
            cost += seconds_to_move(machine, tensor.backward_bytes)
        for unit in tensor.consumers:
            _add(pairs, tensor.producer, unit, cost)
    for variable in graph.shared:
        cost = seconds_to_move(machine, variable.parameter_bytes + variable.gradient_bytes)
        for unit in variable.units[1:]:
            _add(pairs, variable.units[0], unit, cost)
    near: list[list[tuple[int, float]]] = [[] for _ in range(size)]
    for (a, b), cost in sorted(pairs.items()):
        near[a].append((b, cost))
        near[b].append((a, cost))
    starts = [0, *itertools.accumulate(len(others) for others in near)]
    _, parts = pymetis.part_graph(
        num_partitions,
        pymetis.CSRAdjacency(starts, [other for others in near for other, _ in others]),
        vweights=_whole(times.tolist()),
        eweights=_whole([cost for others in near for _, cost in others]),
        options=pymetis.Options(seed=0),
    )
    return forward_only(graph, np.array(parts, dtype=np.int64), num_partitions)


def _add(pairs: dict[tuple[int, int], float], a: int, b: int, cost: float) -> None:
    if a != b:
        key = (min(a, b), max(a, b))
        pairs[key] = pairs.get(key, 0.0) + cost


def _whole(weights: Sequence[float]) -> list[int]:
    scale = _MOST_WEIGHT / max(sum(weights), 1e-300)
    return [max(1, round(weight * scale)) for weight in weights]


def forward_only(graph: CoarseGraph, parts: Assignment, num_partitions: int) -> Assignment:
    """Numbers parts by where they lie, and raises units until tensors only go forward.

    A partition that is empty then takes the later half of the largest one, so that every
    partition has units, as the rules want it.
    """
    index = np.arange(len(graph))
    where = [
        index[parts == p].mean() if (parts == p).any() else np.inf for p in range(num_partitions)
    ]
    rank = np.argsort(np.argsort(where, kind="stable"), kind="stable")
    placed: Any = rank[parts].astype(np.int64)
    for tensor in sorted(graph.tensors, key=lambda tensor: tensor.producer):
        readers = list(tensor.consumers)
        placed[readers] = np.maximum(placed[readers], placed[tensor.producer])
    while len(used := np.unique(placed)) < min(num_partitions, len(graph)):
        placed = np.searchsorted(used, placed)
        largest = int(np.bincount(placed).argmax())
        units = np.flatnonzero(placed == largest)
        placed[placed > largest] += 1
        placed[units[len(units) // 2 :]] += 1
    return np.searchsorted(used, placed).astype(np.int64)
