"""Determines which operations of a graph form a unit in every plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from opensmp.compiler.costs.families import ALIASES, CONTRACTIONS
from opensmp.compiler.costs.graph_costs import Costs
from opensmp.compiler.plan.coarsening.contraction import (
    Pair,
    chained,
    contracted,
    joined,
    reduced,
    topological_order,
)
from opensmp.compiler.trace.control_flow import CONTROL_FLOW
from opensmp.compiler.trace.layer_calls import MODEL, operation_labels
from opensmp.compiler.trace.trace import TracedGraph

HEAVY = CONTRACTIONS | CONTROL_FLOW
"""Types of operations that start a run."""

# A layer whose share of the model exceeds this is divided if it has several heavy operations.
_LARGE_SHARE = 1 / 8

# Light operations outside of layers are joined up to this share of the model's time.
_LIGHT_SHARE = 1 / 256

_HANDLES = (tf.variant, tf.resource)


class Units:
    """The units of a traced graph; see `opensmp.compiler.plan.coarsening.coarsen.coarsen`.

    Attributes:
        wiring: The operations by index.
        variables: Maps the index of a variable's placeholder to the variable.
        labels: Maps the index of each operation in a unit to the label of its layer call.
    """

    def __init__(
        self, traced: TracedGraph, costs: Costs, times: Sequence[float], max_units: int
    ) -> None:
        self.wiring = costs.wiring
        self.variables = {self.wiring.index[v.placeholder.op]: v for v in traced.variables}
        self._graph = traced.graph
        self._times = times
        self._max_units = max_units
        sources = {self.wiring.index[op] for op in traced.sources}
        _, label_of = operation_labels(traced)
        self.labels = {
            i: label_of[op.name]
            for i, op in enumerate(self.wiring.operations)
            if i not in sources and i not in costs.replicated
        }
        self._composite = {MODEL} | {
            label[:cut]
            for label in set(self.labels.values())
            for cut, character in enumerate(label)
            if character == "/"
        }
        self._limit = _LIGHT_SHARE * sum(times[i] for i in self.labels)

    def find(self) -> dict[int, int]:
        """Returns operation index to unit, with units numbered in topological order."""
        units = self._layers_and_runs()
        needs = self._needs(units)
        units, needs = _regroup(units, needs, joined(needs, self._pairs(units))[0])
        for by_reader in (True, False):
            weights = self._light(units, len(needs), aliases=not by_reader)
            groups = chained(needs, weights, self._limit, by_reader=by_reader)
            units, needs = _regroup(units, needs, groups)
        if len(needs) > self._max_units:
            weights = self._shares(units, len(needs))
            units, needs = _regroup(units, needs, reduced(needs, weights, self._max_units))
        position = {unit: at for at, unit in enumerate(topological_order(needs))}
        return {i: position[unit] for i, unit in units.items()}

    def _layers_and_runs(self) -> dict[int, int]:
        """Maps operations to units: one unit per layer call, and runs of the other operations.

        This creates no cycle: calls are contiguous in a topological order, and edges into a run
        lead to its first operation.
        """
        opened = self._composite | self._large_layers()
        units: dict[int, int] = {}
        unit_of_label: dict[str, int] = {}
        label_of_run: dict[int, str] = {}
        light_time: dict[int, float] = {}
        count = 0
        for i, label in self.labels.items():
            if label not in opened:
                if label not in unit_of_label:
                    unit_of_label[label] = count
                    count += 1
                units[i] = unit_of_label[label]
                continue
            before = {units[p] for p in self.wiring.producers(i) if p in units}
            run = before.pop() if len(before) == 1 else -1
            heavy = self.wiring.types[i] in HEAVY
            time = light_time.get(run, 0.0) + (0.0 if heavy else self._times[i])
            if heavy or label_of_run.get(run) != label or time > self._limit:
                run, count = count, count + 1
                label_of_run[run] = label
                time = 0.0 if heavy else self._times[i]
            light_time[run] = time
            units[i] = run
        return units

    def _large_layers(self) -> set[str]:
        """Returns the layers that are a large part of the model with several heavy operations."""
        time: dict[str, float] = {}
        size: dict[str, int] = {}
        heavy: dict[str, int] = {}
        for i, label in self.labels.items():
            time[label] = time.get(label, 0.0) + self._times[i]
            size[label] = size.get(label, 0) + self._parameter_bytes(i)
            heavy[label] = heavy.get(label, 0) + (self.wiring.types[i] in HEAVY)
        much_time = _LARGE_SHARE * sum(time.values())
        much_size = _LARGE_SHARE * sum(size.values())
        return {
            label
            for label, count in heavy.items()
            if count > 1 and (time[label] > much_time or size[label] > much_size)
        }

    def _parameter_bytes(self, i: int) -> int:
        ports = {port for port in self.wiring.inputs[i] if port[0] in self.variables}
        return sum(self.wiring.array(port).nbytes for port in ports)

    def _needs(self, units: Mapping[int, int]) -> list[set[int]]:
        needs: list[set[int]] = [set() for _ in range(max(units.values(), default=-1) + 1)]
        for i, unit in units.items():
            producers = {units[p] for p in self.wiring.producers(i) if p in units}
            needs[unit] |= producers - {unit}
        return needs

    def _pairs(self, units: Mapping[int, int]) -> list[Pair]:
        """Returns pairs of units to join: by tensor lists, colocation and shared variables."""
        lists: list[Pair] = []
        colocated: list[Pair] = []
        shared: list[Pair] = []
        leaders: dict[bytes, int] = {}
        last_reader: dict[int, int] = {}
        for i, unit in units.items():
            op = self.wiring.operations[i]
            for p, k in self.wiring.inputs[i]:
                if p in self.variables:
                    shared.append((last_reader.get(p, unit), unit))
                    last_reader[p] = unit
                elif p in units and self.wiring.operations[p].outputs[k].dtype in _HANDLES:
                    lists.append((units[p], unit))
            for group in op.colocation_groups():
                if group != b"loc:@" + op.name.encode():
                    if group not in leaders:
                        leaders[group] = units.get(self._index_of(group), unit)
                    colocated.append((leaders[group], unit))
        pairs = dict.fromkeys([*lists, *colocated, *shared])
        return [(a, b) for a, b in pairs if a != b]

    def _index_of(self, group: bytes) -> int:
        """Returns the operation that a colocation group is named after; -1 if there is none."""
        try:
            op = self._graph.get_operation_by_name(group.decode().removeprefix("loc:@"))
        except KeyError:
            return -1
        return self.wiring.index.get(op, -1)

    def _light(self, units: Mapping[int, int], count: int, *, aliases: bool) -> list[float]:
        """Returns the time of each unit of light operations outside of layers, else infinity.

        With `aliases`, only units of alias operations (no arithmetic, no traffic) count as light.
        """
        weights = [0.0] * count
        for i, unit in units.items():
            kind = self.wiring.types[i]
            if self.labels[i] not in self._composite or kind in HEAVY:
                weights[unit] = float("inf")
            elif kind not in ALIASES:
                weights[unit] += float("inf") if aliases else self._times[i]
        return weights

    def _shares(self, units: Mapping[int, int], count: int) -> list[float]:
        """Returns the sum of each unit's shares of the time, the parameters and the unit count."""
        time, size = np.zeros(count), np.zeros(count)
        for i, unit in units.items():
            time[unit] += self._times[i]
            size[unit] += self._parameter_bytes(i)
        shares = time / max(time.sum(), 1e-30) + size / max(size.sum(), 1) + 1 / count
        return [float(share) for share in shares]


def _regroup(
    units: Mapping[int, int], needs: Sequence[Iterable[int]], groups: Sequence[int]
) -> tuple[dict[int, int], list[set[int]]]:
    return {i: groups[unit] for i, unit in units.items()}, contracted(needs, groups)
