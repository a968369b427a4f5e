"""The rows of a plan's table: contents, costs and transfers of each partition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opensmp.compiler.plan.plan import Plan
from opensmp.compiler.trace.layer_calls import MODEL


@dataclass(frozen=True)
class PartitionRow:
    """One partition of a plan. Times, FLOPs and moved bytes are per microbatch.

    Attributes:
        partition: Its number.
        layers: Labels of its layers in model order, see `Plan.layers`; a layer whose own operations
            are cut is listed in each partition that has some of them. Operations outside of layers
            are listed only if the partition has nothing else.
        num_operations: Number of operations.
        parameter_bytes: Size of its variables.
        state_bytes: Their gradients and optimizer slots.
        activation_bytes: Other peak memory: residuals and boundary tensors of the microbatches in
            flight.
        peak_bytes: The sum of these three.
        forward_flops: Floating-point operations of the forward pass; 0 if not counted.
        backward_flops: Floating-point operations of the backward pass; 0 if not counted.
        forward_seconds: Predicted time of the forward pass.
        backward_seconds: Predicted time of the backward pass.
        transfer_seconds: Predicted time of waiting for tensors of other partitions.
        sends: Maps a partition to the bytes of activations and variables sent there; gradients go
            in the opposite direction and are not counted.
    """

    partition: int
    layers: tuple[str, ...]
    num_operations: int
    parameter_bytes: int
    state_bytes: int
    activation_bytes: int
    peak_bytes: int
    forward_flops: float
    backward_flops: float
    forward_seconds: float
    backward_seconds: float
    transfer_seconds: float
    sends: Mapping[int, int]

    @property
    def stage_seconds(self) -> float:
        """Predicted total time: forward, backward and transfer."""
        return self.forward_seconds + self.backward_seconds + self.transfer_seconds


def partition_rows(plan: Plan) -> tuple[PartitionRow, ...]:
    """Returns the rows of a plan with costs, one per partition, including empty ones."""
    graph, assignment, prediction = plan.costs, plan.assignment, plan.prediction
    num = plan.num_partitions
    parameters = _sums(assignment, graph.parameter_bytes, num)
    state = _sums(assignment, graph.state_bytes, num)
    sends = _sends(plan)
    for variable in graph.shared:
        # Every partition that reads a shared variable holds a copy and a gradient of it.
        for partition in sorted({int(assignment[unit]) for unit in variable.units}):
            parameters[partition] += variable.parameter_bytes
            state[partition] += variable.gradient_bytes
    flops = [
        np.bincount(assignment, counted, num) if counted is not None else np.zeros(num)
        for counted in (graph.forward_flops, graph.backward_flops)
    ]
    layers = _layers_by_partition(plan.layers, num)
    return tuple(
        PartitionRow(
            partition=p,
            layers=tuple(layers[p]),
            num_operations=plan.sizes[p],
            parameter_bytes=parameters[p],
            state_bytes=state[p],
            activation_bytes=max(0, prediction.peak_bytes[p] - parameters[p] - state[p]),
            peak_bytes=prediction.peak_bytes[p],
            forward_flops=float(flops[0][p]),
            backward_flops=float(flops[1][p]),
            forward_seconds=prediction.forward_seconds[p],
            backward_seconds=prediction.backward_seconds[p],
            transfer_seconds=prediction.transfer_seconds[p],
            sends=sends[p],
        )
        for p in range(num)
    )


def _sums(assignment: Any, values: Any, num_partitions: int) -> list[int]:
    totals = np.zeros(num_partitions, dtype=np.int64)
    np.add.at(totals, assignment, values)
    return [int(total) for total in totals]


def _sends(plan: Plan) -> list[dict[int, int]]:
    """Returns for each partition the forward bytes that it sends to each other partition."""
    graph, assignment = plan.costs, plan.assignment
    moved = [(t.producer, t.consumers, t.forward_bytes) for t in graph.tensors]
    moved += [(v.units[0], v.units, v.parameter_bytes) for v in graph.shared]
    sends: list[dict[int, int]] = [{} for _ in range(plan.num_partitions)]
    for producer, consumers, size in moved:
        home = int(assignment[producer])
        for reader in sorted({int(assignment[unit]) for unit in consumers} - {home}):
            sends[home][reader] = sends[home].get(reader, 0) + size
    return [dict(sorted(sent.items())) for sent in sends]


def _layers_by_partition(layers: Mapping[str, Any], num_partitions: int) -> list[list[str]]:
    """Returns the labels of each partition's layers."""
    found: list[list[str]] = [[] for _ in range(num_partitions)]
    for label, entry in layers.items():
        for partition in sorted(set(entry.values())) if isinstance(entry, Mapping) else [entry]:
            found[partition].append(label)
    own = "(the model's own)"
    return [
        # Operations outside of layers are listed only if there is nothing else.
        [label for label in labels if label != MODEL] or [own] * len(labels)
        for labels in found
    ]
