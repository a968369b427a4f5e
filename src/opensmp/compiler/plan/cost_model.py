"""The cost model of plans: time per stage, time per step, and peak memory per device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opensmp.compiler.plan.unit_graph import CoarseGraph, Machine
from opensmp.config.pipelines import DEFAULT_PIPELINE, PIPELINES
from opensmp.errors import PlanError

_MOST_LISTED = 5


@dataclass(frozen=True)
class Prediction:
    """The predicted costs of an assignment. Tuples have one entry per partition.

    Times and moved bytes are per microbatch, except for `step_seconds`.

    Attributes:
        stage_seconds: Time per microbatch: the sum of the next three.
        forward_seconds: Compute time of the forward pass.
        backward_seconds: Compute time of the backward pass.
        transfer_seconds: Time spent waiting for tensors of other partitions, forward and backward.
        peak_bytes: Peak memory of the partition's device.
        cut_bytes: Bytes that all partitions together send to each other.
        step_seconds: Sum of `stage_seconds` plus (microbatches - 1) times the largest.
        bubble: Idle share of all devices' time, 0 <= bubble < 1.
        balance: Largest of `stage_seconds` divided by their mean; 1 is perfect.
        num_units: Number of units in each partition.
    """

    stage_seconds: tuple[float, ...]
    forward_seconds: tuple[float, ...]
    backward_seconds: tuple[float, ...]
    transfer_seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    cut_bytes: int
    step_seconds: float
    bubble: float
    balance: float
    num_units: tuple[int, ...]

    @property
    def empty_partitions(self) -> tuple[int, ...]:
        """Partitions without units."""
        return tuple(p for p, count in enumerate(self.num_units) if not count)


def evaluate(
    graph: CoarseGraph,
    assignment: ArrayLike,
    num_partitions: int,
    machine: Machine,
    microbatches: int,
    *,
    pipeline: str = DEFAULT_PIPELINE,
    active_microbatches: int | None = None,
    monotone: bool = True,
) -> Prediction:
    """Predicts time and memory of an assignment of units to partitions.

    The time of a stage is that of its units plus its transfers, which the receiver pays for. A
    partition that reads a tensor of another partition pays latency plus bytes over bandwidth, once
    regardless of how many of its units read it. The producing partition pays the same for each
    gradient that it receives from such a reader. A variable of several units belongs to the
    partition of the first of them; any other partition that reads it pays for its value, and the
    home partition for each gradient.

    The time of a step is the sum of the stages plus (microbatches - 1) times the slowest stage, as
    in Alpa (Zheng et al., "Automating Inter- and Intra-Operator Parallelism for Distributed Deep
    Learning", OSDI 2022, section 5).

    The memory of a partition is that of its variables and their state, plus, for each microbatch in
    flight, the residuals of its units and the tensors that it sends and receives. A partition holds
    one copy and one gradient of every shared variable that it reads.

    Args:
        graph: Units, their costs and the tensors between them.
        assignment: Integers of shape (len(graph),): the partition of each unit. Tensors may stay in
            a partition or go to a higher one.
        num_partitions: Number of partitions, >= 1; some may be empty.
        machine: Speed of the devices.
        microbatches: Microbatches per step, >= 1.
        pipeline: Name of the schedule, which tells whether all microbatches are in flight or at
            most `active_microbatches`.
        active_microbatches: None means `num_partitions + 2`.
        monotone: False allows tensors to go back to lower partitions, as in manual plans; the time
            of a partition is then that of all its stages.

    Raises:
        PlanError: If the assignment does not match the `len(graph)` units or the partitions, or a
            tensor goes back to a lower partition although `monotone` is set.

    Example:
        >>> import numpy as np
        >>> graph = CoarseGraph(
        ...     names=("first", "second"),
        ...     forward_seconds=np.array([1.0, 1.0]),
        ...     backward_seconds=np.array([2.0, 2.0]),
        ...     parameter_bytes=np.array([8, 8]),
        ...     state_bytes=np.array([16, 16]),
        ...     residual_bytes=np.array([4, 4]),
        ...     tensors=(CutTensor(0, (1,), forward_bytes=10, backward_bytes=10),),
        ... )
        >>> machine = Machine(transfer_seconds=0.5, transfer_bytes_per_second=20.0)
        >>> prediction = evaluate(graph, [0, 1], 2, machine, microbatches=4)
        >>> prediction.stage_seconds, prediction.step_seconds
        ((4.0, 4.0), 20.0)
    """
    placed = checked_assignment(graph, assignment, num_partitions, monotone)
    held = microbatches_in_flight(num_partitions, microbatches, pipeline, active_microbatches)
    forward = np.bincount(placed, graph.forward_seconds, num_partitions)
    backward = np.bincount(placed, graph.backward_seconds, num_partitions)
    kept = graph.parameter_bytes + graph.state_bytes + held * graph.residual_bytes
    peak = np.zeros(num_partitions, dtype=np.int64)
    np.add.at(peak, placed, kept)
    transfer = np.zeros(num_partitions)
    cut_bytes = 0
    for tensor in graph.tensors:
        home = placed[tensor.producer]
        readers = sorted({int(placed[unit]) for unit in tensor.consumers} - {int(home)})
        if not readers:
            continue
        transfer[readers] += seconds_to_move(machine, tensor.forward_bytes)
        peak[readers] += held * tensor.forward_bytes
        peak[home] += held * tensor.forward_bytes
        if tensor.backward_bytes:
            transfer[home] += len(readers) * seconds_to_move(machine, tensor.backward_bytes)
        cut_bytes += len(readers) * (tensor.forward_bytes + tensor.backward_bytes)
    for variable in graph.shared:
        home = placed[variable.units[0]]
        readers = sorted({int(placed[unit]) for unit in variable.units} - {int(home)})
        size = variable.parameter_bytes + variable.gradient_bytes
        peak[[int(home), *readers]] += size
        transfer[readers] += seconds_to_move(machine, variable.parameter_bytes)
        if variable.gradient_bytes:
            transfer[home] += len(readers) * seconds_to_move(machine, variable.gradient_bytes)
        cut_bytes += len(readers) * size
    stage = forward + backward + transfer
    total, slowest = float(stage.sum()), float(stage.max())
    step = total + (microbatches - 1) * slowest
    return Prediction(
        stage_seconds=tuple(stage.tolist()),
        forward_seconds=tuple(forward.tolist()),
        backward_seconds=tuple(backward.tolist()),
        transfer_seconds=tuple(transfer.tolist()),
        peak_bytes=tuple(peak.tolist()),
        cut_bytes=cut_bytes,
        step_seconds=step,
        bubble=max(0.0, 1 - microbatches * total / (num_partitions * step)) if step else 0.0,
        balance=slowest * num_partitions / total if total else 1.0,
        num_units=tuple(np.bincount(placed, minlength=num_partitions).tolist()),
    )


def seconds_to_move(machine: Machine, num_bytes: int) -> float:
    """Returns the time to receive `num_bytes` from another device: latency plus transfer."""
    return machine.transfer_seconds + num_bytes / machine.transfer_bytes_per_second


def microbatches_in_flight(
    num_partitions: int, microbatches: int, pipeline: str, active_microbatches: int | None
) -> int:
    """Returns the maximum number of microbatches whose residuals a device holds at once."""
    if PIPELINES[pipeline].holds_all:
        return microbatches
    active = num_partitions + 2 if active_microbatches is None else active_microbatches
    return min(microbatches, active)


def checked_assignment(
    graph: CoarseGraph, assignment: ArrayLike, num_partitions: int, monotone: bool = True
) -> NDArray[np.int64]:
    """Returns the assignment as an int64 array if a pipeline can run it.

    Raises:
        PlanError: See `evaluate`.
    """
    placed = np.asarray(assignment)
    if placed.size and not np.issubdtype(placed.dtype, np.integer):
        raise PlanError(
            f"Plan: partitions are integers; received an assignment of dtype {placed.dtype}."
        )
    if placed.shape != (len(graph),):
        raise PlanError(
            f"Plan: an assignment gives a partition to each of the {len(graph)} units, an array "
            f"of shape ({len(graph)},); received shape {placed.shape}."
        )
    outside = np.flatnonzero((placed < 0) | (placed >= num_partitions))
    if outside.size:
        faults = [f"unit {graph.names[u]!r} is in partition {placed[u]}" for u in outside]
        raise PlanError(
            f"Plan: partitions go from 0 to {num_partitions - 1}, but {_listed(faults)}."
        )
    faults = [
        f"tensor {tensor.name!r} of unit {graph.names[tensor.producer]!r} goes from partition "
        f"{placed[tensor.producer]} back to {placed[unit]}, to unit {graph.names[unit]!r}"
        for tensor in graph.tensors
        for unit in tensor.consumers
        if monotone and placed[unit] < placed[tensor.producer]
    ]
    if faults:
        raise PlanError(
            "Plan: tensors stay in a partition or go to a higher one, but "
            f"{_listed(faults)}. Raise the partition of the readers, or lower that of the makers."
        )
    return placed.astype(np.int64)


def _listed(faults: Sequence[str]) -> str:
    more = len(faults) - _MOST_LISTED
    return "; ".join(faults[:_MOST_LISTED]) + (f"; and {more} more" if more > 0 else "")
