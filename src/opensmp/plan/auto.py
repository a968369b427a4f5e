"""A plan without help from the user: a balanced cut of the layers in their order of call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opensmp.graph import TracedGraph
from opensmp.plan.plan import Plan

Op = Any
LayerCall = tuple[int, int]


@dataclass
class _Unit:
    """Consecutive operations of the same innermost layer call; they stay together."""

    key: LayerCall | None
    operations: list[Op] = field(default_factory=list)
    parameters: int = 0


def auto_plan(
    traced: TracedGraph, num_partitions: int, known: Mapping[LayerCall, int] | None = None
) -> Plan:
    """Cuts the layers, in their order of call, into runs of about equal weight.

    The weight of a layer call is its share of the parameters plus its share of the
    operations. Cutting at the order of call keeps the partitions connected.

    Args:
        traced: The traced model.
        num_partitions: Number of partitions.
        known: Partitions of layer calls from an earlier plan of the same model
            (for other shapes, or for inference); they are kept, since the
            variables already have their places.
    """
    units = _units(traced)
    placed = _follow(units, known) if known else _balance(units, num_partitions)
    partition_of = {
        op.name: partition
        for unit, partition in zip(units, placed, strict=True)
        for op in unit.operations
    }
    return Plan(traced.name, num_partitions, partition_of)


def _units(traced: TracedGraph) -> list[_Unit]:
    owner: list[LayerCall | None] = [None] * len(traced.operations)
    for span in traced.spans:  # outer spans come first, inner ones overwrite
        owner[span.start : span.stop] = [(id(span.layer), span.call_index)] * (
            span.stop - span.start
        )
    parameters = {
        v.placeholder.op: int(np.prod(v.placeholder.shape.as_list())) for v in traced.variables
    }
    units: list[_Unit] = []
    for op, key in zip(traced.operations, owner, strict=True):
        if op in traced.sources and op not in parameters:
            continue
        if not units or units[-1].key != key:
            units.append(_Unit(key))
        if op in parameters:
            units[-1].parameters += parameters[op]
        else:
            units[-1].operations.append(op)
    return units


def _follow(units: Sequence[_Unit], known: Mapping[LayerCall, int]) -> list[int]:
    placed, last = [], 0
    for unit in units:
        last = known.get(unit.key, last) if unit.key is not None else last
        placed.append(last)
    return placed


def _balance(units: Sequence[_Unit], num_partitions: int) -> list[int]:
    """Minimises the heaviest run by dynamic programming over cut positions."""
    parameters = np.array([unit.parameters for unit in units], dtype=float)
    operations = np.array([len(unit.operations) for unit in units], dtype=float)
    weights = parameters / max(parameters.sum(), 1) + operations / max(operations.sum(), 1)
    total = np.concatenate([[0.0], np.cumsum(weights)])
    n = len(units)
    best = total.copy()  # best[j]: heaviest run when the first j units form one run
    cuts = np.zeros((num_partitions, n + 1), dtype=int)
    for k in range(1, num_partitions):
        cost = np.maximum(best[None, :], total[:, None] - total[None, :])
        cost[np.triu_indices(n + 1, 1)] = np.inf  # the last run starts at or before its end
        cuts[k] = cost.argmin(axis=1)
        best = cost.min(axis=1)
    placed, stop = [0] * n, n
    for k in range(num_partitions - 1, -1, -1):
        start = int(cuts[k][stop]) if k else 0
        placed[start:stop] = [k] * (stop - start)
        stop = start
    return placed
