"""Coarsens a traced graph: groups operations into units that are planned as a whole."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opensmp.base.types import Op, Tensor
from opensmp.compiler.costs.graph_costs import (
    UNKNOWN_SIZE,
    Costs,
    graph_costs,
    trainable_placeholders,
)
from opensmp.compiler.costs.op_graph import Port
from opensmp.compiler.costs.work import Work
from opensmp.compiler.plan.coarsening.units import HEAVY, Units
from opensmp.compiler.plan.unit_graph import CoarseGraph, CutTensor, Machine, SharedVariable
from opensmp.compiler.recomputation.selective_costs import selective_costs
from opensmp.compiler.trace.layer_calls import MODEL
from opensmp.compiler.trace.trace import TracedGraph

MAX_UNITS = 2000
"""Maximum number of units that `coarsen` returns."""

OPTIMIZER_SLOTS = 2.0
"""Bytes of optimizer state per byte of parameters: two for Adam (Kingma and Ba, 2015)."""


LOSS_FLOPS = 300.0
"""FLOPs per element of the model's outputs that are counted for the loss and its gradient.

The loss is computed in the partition of the outputs, by a function that the planner does not see.
Most models with large outputs use a cross entropy, whose exponentials take as long as that many
multiplications of a matrix product (measured on a CPU; on a GPU, the time is about that of reading
and writing the elements, which is about the same).
"""


def seconds(work: Work, machine: Machine) -> float:
    """Returns the predicted time of some work on a device.

    This is the launch time of its operations plus the longer of arithmetic and memory traffic, as
    in the roofline model (Williams, Waterman and Patterson, CACM 2009).
    """
    busy = max(work.flops / machine.flops_per_second, work.bytes / machine.bytes_per_second)
    if machine.narrow_flops_per_second is not None:
        busy = max(busy, work.narrow / machine.narrow_flops_per_second)
    return work.launches * machine.operation_seconds + busy


def coarsen(
    traced: TracedGraph,
    machine: Machine,
    *,
    required: Collection[Tensor] | None = None,
    unknown_size: int = UNKNOWN_SIZE,
    optimizer_slots: float = OPTIMIZER_SLOTS,
    max_units: int = MAX_UNITS,
) -> CoarseGraph:
    """Groups the operations of a graph into units and computes the cost of each unit.

    The operations of one layer call form a unit. Three kinds of operations are instead divided into
    runs: operations outside of layers, the own operations of a layer that contains other layers,
    and layers that are more than an eighth of the model. A run begins with a heavy operation or
    where several runs meet, and continues with the operations that depend on it alone. A loop, a
    branch and a function call count as one operation each. Units are joined if they read the same
    variable, if TensorFlow requires them on one device (colocation), or if a tensor list passes
    between them, unless that would create a cycle; variables that several units still read are
    listed as shared. Operations that are replicated into every segment (constants, shapes, seeds)
    belong to no unit.

    The run time is linear in the number of operations.

    Args:
        traced: The traced model.
        machine: Speed of the devices.
        required: Inputs and variables (their placeholders) whose gradients are needed; None for all
            trainable variables, empty for inference.
        unknown_size: Assumed size of unknown dimensions, such as the batch.
        optimizer_slots: Bytes of optimizer state per byte of trained parameters.
        max_units: Maximum number of units; excess units are joined, light chains first.

    Returns:
        The units in topological order.

    Raises:
        PlanError: If the operations of the graph are not in topological order.
    """
    wanted = trainable_placeholders(traced) if required is None else tuple(required)
    costs = graph_costs(traced, required=wanted, unknown_size=unknown_size)
    forward = [seconds(work, machine) for work in costs.forward]
    backward = [seconds(work, machine) for work in costs.backward]
    units = Units(traced, costs, [f + b for f, b in zip(forward, backward, strict=True)], max_units)
    if wanted:
        for index, count in _loss_sizes(traced, costs):
            forward[index] += LOSS_FLOPS * count / machine.flops_per_second
    summary = _Summary(costs, units, {costs.wiring.index[t.op] for t in wanted}, optimizer_slots)
    return summary.graph(forward, backward)


def place(traced: TracedGraph, graph: CoarseGraph, assignment: ArrayLike) -> dict[str, int]:
    """Returns operation name to partition for all operations but inputs, variables and captures.

    An operation in no unit is placed in the lowest partition that reads it.
    """
    partition_of: dict[str, int] = {}
    for operations, partition in zip(graph.operations, np.asarray(assignment), strict=True):
        partition_of.update(dict.fromkeys(operations, int(partition)))
    lowest: dict[Op, int] = {}
    for op in reversed(traced.operations):
        if op in traced.sources:
            continue
        partition = partition_of.setdefault(op.name, lowest.get(op, 0))
        for producer in (*(t.op for t in op.inputs), *op.control_inputs):
            lowest[producer] = min(partition, lowest.get(producer, partition))
    return partition_of


def _loss_sizes(traced: TracedGraph, costs: Costs) -> list[tuple[int, int]]:
    """Returns the operations that compute outputs for a loss, with their numbers of elements."""
    wiring = costs.wiring
    ports = {
        (wiring.index[t.op], t.value_index)
        for t in traced.outputs
        if t.dtype.is_floating and t.op not in traced.sources
    }
    return [(index, wiring.array((index, slot)).elements) for index, slot in sorted(ports)]


# --- unit costs -------------------------------------------------------------------------------


class _Summary:
    """Sums the costs of operations by unit."""

    def __init__(
        self, costs: Costs, units: Units, required: Collection[int], optimizer_slots: float
    ) -> None:
        self._costs = costs
        self._wiring = costs.wiring
        self._labels = units.labels
        self._variables = units.variables
        self._required = required
        self._slots = optimizer_slots
        self._units = units.find()
        self._count = max(self._units.values(), default=-1) + 1
        self._members: list[list[int]] = [[] for _ in range(self._count)]
        for i, unit in self._units.items():
            self._members[unit].append(i)

    def graph(self, forward: Sequence[float], backward: Sequence[float]) -> CoarseGraph:
        """Returns the units with their costs, from the seconds of operations and gradients."""
        parameters, state, shared = self._memory()
        layers = tuple(self._layer(members) for members in self._members)
        kept, again = selective_costs(self._costs)
        operations = self._wiring.operations
        return CoarseGraph(
            names=self._names(layers),
            forward_seconds=self._sum(forward),
            backward_seconds=self._sum(backward),
            parameter_bytes=parameters,
            state_bytes=state,
            residual_bytes=self._sum(self._costs.residual_bytes).astype(np.int64),
            tensors=self._tensors(),
            shared=shared,
            operations=tuple(tuple(operations[i].name for i in m) for m in self._members),
            layers=layers,
            forward_flops=self._sum([work.flops for work in self._costs.forward]),
            backward_flops=self._sum([work.flops for work in self._costs.backward]),
            selective_bytes=self._sum(kept).astype(np.int64),
            full_bytes=self._sum(self._costs.source_bytes).astype(np.int64),
            selective_seconds=self._sum(
                [cost if runs else 0.0 for cost, runs in zip(forward, again, strict=True)]
            ),
        )

    def _sum(self, values: Sequence[float] | NDArray[Any]) -> NDArray[np.float64]:
        sums = [float(sum(values[i] for i in members)) for members in self._members]
        return np.array(sums, dtype=np.float64)

    def _memory(
        self,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[SharedVariable, ...]]:
        """Returns each unit's bytes of parameters and state, and the shared variables."""
        parameters = np.zeros(self._count, dtype=np.int64)
        state = np.zeros(self._count, dtype=np.int64)
        readers: dict[int, set[int]] = {}
        for i, unit in self._units.items():
            for p, _ in self._wiring.inputs[i]:
                if p in self._variables:
                    readers.setdefault(p, set()).add(unit)
        shared = []
        for p in sorted(readers):
            units, size = sorted(readers[p]), self._wiring.array((p, 0)).nbytes
            gradient = size if p in self._required else 0
            slots = int(gradient * self._slots)
            if len(units) == 1:
                parameters[units[0]] += size
                state[units[0]] += gradient + slots
            else:
                state[units[0]] += slots  # slots exist at home only, gradients at every reader
                name = self._variables[p].name
                shared.append(SharedVariable(tuple(units), size, gradient, name))
        return parameters, state, tuple(shared)

    def _tensors(self) -> tuple[CutTensor, ...]:
        """Returns the tensors between units; a control edge becomes a tensor without bytes."""
        consumers: dict[Port, set[int]] = {}
        waits: dict[int, set[int]] = {}
        differentiated: set[Port] = set()
        for i, unit in self._units.items():
            for slot, port in enumerate(self._wiring.inputs[i]):
                if self._units.get(port[0], unit) != unit:
                    consumers.setdefault(port, set()).add(unit)
                    if slot in self._costs.flow.wanted[i]:
                        differentiated.add(port)
            for p in self._wiring.controls[i]:
                if self._units.get(p, unit) != unit:
                    waits.setdefault(p, set()).add(unit)
        found = []
        for port, units in consumers.items():
            name = self._wiring.operations[port[0]].outputs[port[1]].name
            size = self._wiring.array(port).nbytes
            back = size if port in differentiated else 0
            found.append(CutTensor(self._units[port[0]], tuple(sorted(units)), size, back, name))
        for p, units in waits.items():
            name = f"^{self._wiring.operations[p].name}"
            found.append(CutTensor(self._units[p], tuple(sorted(units)), 0, 0, name))
        return tuple(sorted(found, key=lambda t: (t.producer, t.consumers, t.name)))

    def _layer(self, members: Sequence[int]) -> str:
        """Returns the layer that contains all operations of a unit, or their common ancestor."""
        labels = list(dict.fromkeys(self._labels[i] for i in members))
        if len({_NUMBER.sub("", label) for label in labels}) == 1:
            return "" if labels[0] == MODEL else labels[0]  # all are calls of the same layer
        paths = [() if label == MODEL else tuple(label.split("/")) for label in labels]
        # Operations of an enclosing layer do not count if an inner layer is present.
        inner = [a for a in paths if not any(a == b[: len(a)] and a != b for b in paths)]
        around = []
        for names in zip(*inner, strict=False):
            if len(set(names)) > 1:
                break
            around.append(names[0])
        return "/".join(around)

    def _names(self, layers: Sequence[str]) -> tuple[str, ...]:
        """Names units after their layer, with a heavy operation if the layer has several units."""
        num_units = Counter(layers)
        seen: Counter[str] = Counter()
        names = []
        for layer, members in zip(layers, self._members, strict=True):
            name = layer
            if not layer or num_units[layer] > 1:
                heavy = [i for i in members if self._wiring.types[i] in HEAVY]
                first = self._wiring.operations[(heavy or members)[0]].name.rsplit("/", 1)[-1]
                name = f"{layer}/{first}" if layer else first
            seen[name] += 1
            names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
        return tuple(names)


_NUMBER = re.compile(r"#\d+")
